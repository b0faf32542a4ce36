"""What torch and the float32 graphs make of the gate's samples, kept in files: both can be closed afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyalign_edge.data import Row
from tinyalign_edge.export.source import MAX_SAMPLES, Reference
from tinyalign_edge.memory import Entry
from tinyalign_edge.progress import progress
from tinyalign_edge.runtime.sight import EncodedImage

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Expected:
    """One sample: a question with torch's greedy answer to it, and the memories that torch read."""

    row: Row
    answer: str
    memories: tuple[Entry, ...]
    file: Path  # of torch's arrays
    makes_latents: bool  # of new entries

    def logits(self) -> Floats:
        """Logits (A, V) that predict the A tokens of the row's own answer."""
        return _read(self.file, "logits")

    def visual_tokens(self) -> Floats:
        """The picture as the language model reads it: (N, D)."""
        return _read(self.file, "visual_tokens")

    def latents(self) -> Floats:
        """The latents (L, latent_dim) of an entry for the picture with the row's own answer."""
        return _read(self.file, "latents")

    def keep_exact(self, image: EncodedImage) -> None:
        """Keep the picture as the float32 graphs encode it."""
        np.savez(
            self._exact_file,
            visual_tokens=image.visual_tokens,
            memory_tokens=image.memory_tokens,
            memory_first=np.array(image.memory_first),
        )

    def exact_image(self) -> EncodedImage:
        """What `keep_exact` was given, without its key."""
        visual, memory = (_read(self._exact_file, name) for name in ("visual_tokens", "memory_tokens"))
        first = bool(_read(self._exact_file, "memory_first"))
        return EncodedImage(visual, None, self.memories, memory, {}, memory_first=first)

    @property
    def _exact_file(self) -> Path:
        return self.file.with_suffix(".exact.npz")


def _read(file: Path, name: str) -> Floats:
    with np.load(file) as held:
        array: Floats = held[name]
    return array


def ask_torch(reference: Reference, rows: Sequence[Row], folder: Path) -> list[Expected]:
    """Put the first question of each of the first `MAX_SAMPLES` rows to torch; arrays go into the empty `folder`."""
    rows = rows[:MAX_SAMPLES]
    examples = reference.prepare(rows).examples
    answers = reference.answers(examples)
    expected = []
    with progress("Reading (torch)", len(rows)) as advance:
        for i, (row, example, answer) in enumerate(zip(rows, examples, answers, strict=True)):
            file = folder / f"{i}.npz"
            arrays: dict[str, Any] = {
                "logits": reference.logits(example),
                "visual_tokens": reference.visual_tokens(example),
            }
            latents = reference.latents(example, row.turns[0].answer)
            arrays |= {"latents": latents} if latents is not None else {}
            np.savez(file, **arrays)
            expected.append(Expected(row, answer, reference.memories(example), file, latents is not None))
            advance()
    return expected
