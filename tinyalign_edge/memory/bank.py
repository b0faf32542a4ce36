"""Open and search a bank folder. Every file is hashed and measured against the manifest before it is mapped."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyalign_edge.bundle import check_files, inside
from tinyalign_edge.config import read_versioned
from tinyalign_edge.errors import BundleError, InputError
from tinyalign_edge.memory import layout
from tinyalign_edge.memory.search import Neighbours, nearest


@dataclass(frozen=True)
class Entry:
    """One retrieved entry. `value` is token ids (T,) int32 or latents (L, latent_dim) float32, by the bank's kind."""

    row: int
    text: str
    question: str
    source: str
    similarity: float
    value: npt.NDArray[np.int32] | npt.NDArray[np.float32]


class Bank:
    """A bank opened for reading: keys and values are memory-mapped, records are read by row."""

    def __init__(self, folder: Path) -> None:
        """Open `folder`.

        Raises:
            InputError: it is not a bank.
            BundleError: damaged, hostile or written by a newer version.
        """
        self.folder = folder
        if not (folder / layout.MANIFEST).is_file():
            raise InputError(f"{folder}: not a memory bank (no {layout.MANIFEST})")
        manifest = inside(folder, layout.MANIFEST)
        self.manifest = read_versioned(layout.BankManifest, manifest, newest=layout.SCHEMA_VERSION)
        self._check_shape()
        check_files(folder, self.manifest.files)
        count, dim = self.manifest.count, self.manifest.key_dim
        self._keys = self._map(layout.KEYS, np.int8, (count, dim))
        self._scales = self._map(layout.KEY_SCALES, "<f4", (count,))
        self._record_offsets = self._offsets(layout.RECORD_OFFSETS, layout.RECORDS, 1)
        if self.manifest.kind == "tokens":
            self._value_offsets = self._offsets(layout.VALUE_OFFSETS, layout.VALUES, 4)
            self._values = self._map(layout.VALUES, "<i4", (int(self._value_offsets[-1]),))
        else:
            shape = (count, self.manifest.latents, self.manifest.latent_dim)
            self._values = self._map(layout.VALUES, np.int8, shape)
            self._value_scales = self._map(layout.VALUE_SCALES, "<f4", shape[:2])

    def __len__(self) -> int:
        return self.manifest.count

    def nearest(self, queries: npt.NDArray[np.float32], k: int, *, floor: float = -1.0) -> Neighbours:
        """The `k` entries most similar to each of `queries` (Q, key_dim), at or above `floor`."""
        return nearest(self._keys, self._scales, queries, k, floor=floor)

    def search(self, query: npt.NDArray[np.float32], k: int, *, floor: float = -1.0) -> tuple[Entry, ...]:
        """The entries most similar to one `query` (key_dim,), most similar first."""
        found = self.nearest(query[None], k, floor=floor)
        pairs = zip(found.rows[0].tolist(), found.similarity[0].tolist(), strict=True)
        return tuple(self.entry(row, similarity) for row, similarity in pairs if row >= 0)

    def entry(self, row: int, similarity: float = 1.0) -> Entry:
        """Read one entry."""
        record = self._record(row)
        return Entry(row, record["text"], record["question"], record["source"], similarity, self._value(row))

    def _value(self, row: int) -> npt.NDArray[np.int32] | npt.NDArray[np.float32]:
        if self.manifest.kind == "latents":
            scaled = self._values[row].astype(np.float32) * self._value_scales[row][:, None]
            return np.asarray(scaled, np.float32)
        start, end = self._value_offsets[row : row + 2].tolist()
        ids = np.array(self._values[start:end], np.int32)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.manifest.vocab_size:
            raise BundleError(
                f"{self.folder}: entry {row} holds a token id outside the vocabulary; build the bank again"
            )
        return ids

    def _record(self, row: int) -> dict[str, str]:
        start, end = self._record_offsets[row : row + 2].tolist()
        with (self.folder / layout.RECORDS).open("rb") as file:
            file.seek(start)
            line = file.read(end - start)
        try:
            record = json.loads(line)
            return {key: str(record[key]) for key in ("text", "question", "source")}
        except (ValueError, KeyError, TypeError, RecursionError):
            raise BundleError(f"{self.folder}: record {row} cannot be read; build the bank again") from None

    def _check_shape(self) -> None:
        m = self.manifest
        if not (0 <= m.count <= layout.MAX_ENTRIES and 0 < m.key_dim <= layout.MAX_DIM):
            raise BundleError(f"{self.folder}: count {m.count} or key_dim {m.key_dim} is out of bounds")
        if m.kind == "latents" and not (0 < m.latents <= layout.MAX_DIM and 0 < m.latent_dim <= layout.MAX_DIM):
            raise BundleError(f"{self.folder}: latents {m.latents} x {m.latent_dim} is out of bounds")
        wanted = {layout.KEYS, layout.KEY_SCALES, layout.VALUES, layout.RECORDS, layout.RECORD_OFFSETS}
        wanted.add(layout.VALUE_OFFSETS if m.kind == "tokens" else layout.VALUE_SCALES)
        if set(m.files) != wanted:
            raise BundleError(f"{self.folder}: the manifest lists {sorted(m.files)}, needed {sorted(wanted)}")

    def _map(self, name: str, dtype: Any, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        wanted_bytes = int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize
        if self.manifest.files[name].bytes != wanted_bytes:
            raise BundleError(f"{self.folder / name}: need {wanted_bytes} bytes for {shape}, build the bank again")
        if wanted_bytes == 0:  # an empty file cannot be mapped
            return np.zeros(shape, dtype)
        return np.memmap(self.folder / name, dtype, "r", shape=shape)

    def _offsets(self, name: str, target: str, item_bytes: int) -> npt.NDArray[Any]:
        """Offsets (count + 1,) into the file `target`: rising, from 0 to its end."""
        offsets = self._map(name, "<u8", (self.manifest.count + 1,))
        end = self.manifest.files[target].bytes
        if offsets[0] != 0 or int(offsets[-1]) * item_bytes != end or np.any(offsets[1:] < offsets[:-1]):
            raise BundleError(f"{self.folder / name}: offsets do not fit {target}; build the bank again")
        return offsets
