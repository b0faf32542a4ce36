"""The memory's graph: from retrieved entries to memory tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyalign_edge.bundle import Manifest
from tinyalign_edge.memory import Entry, Value, latents_of, reading_order, token_ids_of
from tinyalign_edge.runtime.decoder import Decoder
from tinyalign_edge.runtime.sessions import check_shapes, onnxruntime_errors, open_session

Float = npt.NDArray[np.float32]


class Recall:
    """The graph that a `MemoryBlock` describes.

    Raises:
        BundleError: onnxruntime does not take the file, or the graph is not the one the manifest describes.
    """

    def __init__(self, folder: Path, manifest: Manifest, decoder: Decoder) -> None:
        self._settings, self._decoder = manifest.memory, decoder
        self._path = folder / str(self._settings.file)
        self._session: Any = open_session(self._path, threads=1)
        width = manifest.decoder.width
        value_dim = self._settings.latent_dim if self._settings.kind == "latents" else width
        shapes = {"values": [value_dim], "rank": [], "similarity": [], "memory_tokens": [width]}
        if self._settings.kind == "hybrid":
            shapes |= {"latents": [self._settings.latent_dim], "order": []}
        check_shapes(self._session, shapes, self._path)

    def tokens(self, inputs: Mapping[str, npt.NDArray[Any]]) -> Float:
        """Memory tokens (M, D) of what `inputs` gives."""
        with onnxruntime_errors(self._path):
            out: Float = self._session.run(["memory_tokens"], dict(inputs))[0]
        return out

    def inputs(self, entries: Sequence[Entry]) -> dict[str, npt.NDArray[Any]]:
        """What the graph reads of retrieved entries, as `MemoryBlock` says."""
        lengths = [len(entry.value) for entry in entries]
        return {
            **self._values([entry.value for entry in entries]),
            "rank": np.repeat(np.arange(len(entries), dtype=np.int64), lengths),
            "similarity": np.repeat(np.array([e.similarity for e in entries], np.float32), lengths),
        }

    def _values(self, values: Sequence[Value]) -> dict[str, npt.NDArray[Any]]:
        latents, texts = [latents_of(value) for value in values], [token_ids_of(value) for value in values]
        if self._settings.kind == "latents":
            return {"values": np.concatenate(latents)}
        embedded = self._decoder.embed(np.concatenate(texts).astype(np.int64))
        if self._settings.kind == "tokens":
            return {"values": embedded}
        order = reading_order(self._settings.latents, np.array([len(text) for text in texts]))
        return {"values": embedded, "latents": np.concatenate(latents), "order": order}
