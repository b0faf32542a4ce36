"""The copy term: what follows may be a token of the texts that the memory gave."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyalign_edge.bundle import Manifest
from tinyalign_edge.runtime.sessions import check_shapes, onnxruntime_errors, open_session
from tinyalign_edge.runtime.sight import EncodedImage

Float = npt.NDArray[np.float32]
Int = npt.NDArray[np.int64]

NOTHING = -1  # in place of the token before an entry's first


@dataclass(frozen=True)
class MemoryTexts:
    """The memory tokens of a sequence: where they stand, which tokens they are, and the token before each in its
    entry, or `NOTHING`; (M,) each."""

    positions: Int
    token_ids: Int
    before: Int

    def __len__(self) -> int:
        return len(self.positions)


def memory_texts(pictures: Iterable[tuple[int, EncodedImage]]) -> MemoryTexts:
    """The memory tokens of pictures, each given with the position at which it begins."""
    positions, ids, before = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for start, image in pictures:
        first = start + (0 if image.memory_first else len(image.visual_tokens))
        positions.append(np.arange(first, first + len(image.memory_tokens)))
        for entry in image.memories if len(image.memory_tokens) else ():
            value = entry.value.astype(np.int64)
            ids.append(value)
            before.append(np.concatenate([[NOTHING], value[:-1]])[: len(value)])
    return MemoryTexts(*(np.concatenate(parts) for parts in (positions, ids, before)))


class Copying:
    """The graph that `MemoryBlock.copy_file` describes.

    Raises:
        BundleError: onnxruntime does not take the file, or the graph is not the one the manifest describes.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._path = folder / str(manifest.memory.copy_file)
        self._session: Any = open_session(self._path, threads=1)
        vocabulary, width = [manifest.decoder.vocab_size], [manifest.decoder.width]
        shapes = {"logits": vocabulary, "states": width, "texts": [2, *width], "token_ids": [], "match": []}
        check_shapes(self._session, shapes | {"log_probabilities": vocabulary}, self._path)

    def mix(self, logits: Float, hidden: Float, read: Sequence[Hashable], texts: MemoryTexts) -> Float:
        """What follows the last positions of a sequence, (A, V): log probabilities where there are `texts`.

        Args:
            logits: (A, V) of the language model.
            hidden: (S, D), last hidden states of the whole sequence.
            read: token ids of its last A positions; what is no number matches no text.
            texts: the memory tokens among its positions.
        """
        if not len(texts):
            return logits
        ids = np.array([token if isinstance(token, int | np.integer) else NOTHING - 1 for token in read])
        feed = {
            "logits": logits,
            "states": hidden[len(hidden) - len(logits) :],
            "texts": np.stack([hidden[np.maximum(texts.positions - 1, 0)], hidden[texts.positions]], axis=1),
            "token_ids": texts.token_ids,
            "match": (ids[:, None] == texts.before).astype(np.float32),
        }
        with onnxruntime_errors(self._path):
            mixed: Float = self._session.run(["log_probabilities"], feed)[0]
        return mixed
