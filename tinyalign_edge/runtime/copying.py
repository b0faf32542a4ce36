"""The copy term: what follows may be a token of the texts that the memory gave."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyalign_edge.bundle import Manifest, MemoryBlock
from tinyalign_edge.memory import token_ids_of
from tinyalign_edge.runtime.sessions import check_shapes, onnxruntime_errors, open_session
from tinyalign_edge.runtime.sight import EncodedImage

Float = npt.NDArray[np.float32]
Int = npt.NDArray[np.int64]

NOTHING = -1  # in place of the token before an entry's first


@dataclass(frozen=True)
class MemoryTexts:
    """What can be copied in a sequence, (M,) each: the memory tokens that have an id and, after whole entries, the
    answer's end.

    Attributes:
        states: the positions whose hidden states make the key, (M, 2).
        token_ids: which tokens they are.
        before: the token before each in its entry, or `NOTHING`.
        similarity: of the entries that they are of.
    """

    states: Int
    token_ids: Int
    before: Int
    similarity: Float

    def __len__(self) -> int:
        return len(self.token_ids)


def memory_texts(pictures: Iterable[tuple[int, EncodedImage]], block: MemoryBlock) -> MemoryTexts:
    """What can be copied of pictures, each given with the position at which it begins."""
    states, ids, before = [np.zeros((0, 2), np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    similarity = [np.zeros(0, np.float32)]
    for start, image in pictures:
        position = start + (0 if image.memory_first else len(image.visual_tokens))
        for entry in image.memories if len(image.memory_tokens) else ():
            value = token_ids_of(entry.value).astype(np.int64)
            position += len(entry.value) - len(value)  # latents stand before them, and are not copied
            places = position + np.arange(len(value))
            position += len(value)
            states.append(np.stack([np.maximum(places - 1, 0), places], axis=1))
            ids.append(value)
            before.append(np.concatenate([[NOTHING], value[:-1]])[: len(value)])
            ends = block.copy_end is not None and 0 < len(value) < block.value_tokens
            if ends:
                states.append(places[-1:, None].repeat(2, axis=1))
                ids.append(np.array([block.copy_end]))
                before.append(value[-1:])
            similarity.append(np.full(len(value) + ends, entry.similarity, np.float32))
    return MemoryTexts(np.concatenate(states), np.concatenate(ids), np.concatenate(before), np.concatenate(similarity))


class Copying:
    """The graph that `MemoryBlock.copy_file` describes.

    Raises:
        BundleError: onnxruntime does not take the file, or the graph is not the one the manifest describes.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._path, self._block = folder / str(manifest.memory.copy_file), manifest.memory
        self._session: Any = open_session(self._path, threads=1)
        vocabulary, width = [manifest.decoder.vocab_size], [manifest.decoder.width]
        shapes = {"logits": vocabulary, "states": width, "texts": [2, *width], "token_ids": [], "match": []}
        if self._block.copy_similarity:
            shapes["similarity"] = []
        check_shapes(self._session, shapes | {"log_probabilities": vocabulary}, self._path)

    def texts(self, pictures: Iterable[tuple[int, EncodedImage]]) -> MemoryTexts:
        """What can be copied of pictures, each given with the position at which it begins."""
        return memory_texts(pictures, self._block)

    def mix(self, logits: Float, hidden: Float, read: Sequence[Hashable], texts: MemoryTexts) -> Float:
        """What follows the last positions of a sequence, (A, V): log probabilities where there are `texts`.

        Args:
            logits: (A, V) of the language model.
            hidden: (S, D), last hidden states of the whole sequence.
            read: token ids of its last A positions; what is no number matches no text.
            texts: what can be copied, of the same sequence.
        """
        if not len(texts):
            return logits
        ids = np.array([token if isinstance(token, int | np.integer) else NOTHING - 1 for token in read])
        feed = {
            "logits": logits,
            "states": hidden[len(hidden) - len(logits) :],
            "texts": hidden[texts.states],
            "token_ids": texts.token_ids,
            "match": (ids[:, None] == texts.before).astype(np.float32),
        }
        if self._block.copy_similarity:
            feed["similarity"] = texts.similarity[None]
        with onnxruntime_errors(self._path):
            mixed: Float = self._session.run(["log_probabilities"], feed)[0]
        return mixed
