"""Entries side by side in arrays, as a segment stores them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyalign_edge.config import WITH_TOKENS
from tinyalign_edge.memory.layout import BankSpec
from tinyalign_edge.memory.value import Hybrid, Ints, Value

Array = npt.NDArray[Any]


def _empty(dtype: npt.DTypeLike) -> Array:
    return np.zeros(0, dtype)


@dataclass(frozen=True)
class Row:
    """One entry, as the journal stores it."""

    id: int
    key_scale: np.float32
    key: npt.NDArray[np.int8]  # (key_dim,)
    token_ids: Ints | None  # (T,); None for "latents"
    latents: npt.NDArray[np.int8]  # (L, latent_dim); none for "tokens"
    value_scales: npt.NDArray[np.float32]  # (L,)
    record: bytes


@dataclass(frozen=True)
class Table:
    """E entries; the arrays may be maps of a file. Ids rise.

    L is 0 for "tokens"; `value_offsets` and `token_ids` are empty for "latents". Offsets count ids and bytes.
    """

    ids: Array  # (E,) uint64
    key_scales: Array  # (E,) float32
    keys: Array  # (E, key_dim) int8; key = int8 row * scale, of unit length
    value_scales: Array  # (E, L) float32
    latents: Array  # (E, L, latent_dim) int8
    record_offsets: Array  # (E + 1,) uint64
    records: Array  # (bytes,) uint8
    value_offsets: Array = field(default_factory=lambda: _empty("<u8"))  # (E + 1,) uint64
    token_ids: Array = field(default_factory=lambda: _empty("<i4"))  # (all T,) int32, one entry after another

    def __len__(self) -> int:
        return len(self.ids)

    def first_after(self, id: int) -> int:
        """The first row whose id is greater than `id`."""
        return int(np.searchsorted(self.ids, np.uint64(id), side="right"))

    def record(self, row: int) -> bytes:
        """The bytes of one record."""
        start, end = self.record_offsets[row : row + 2].tolist()
        return self.records[start:end].tobytes()

    def value(self, row: int) -> Value:
        """One entry's value, by the bank's kind."""
        latents = np.asarray(self.latents[row].astype(np.float32) * self.value_scales[row][:, None], np.float32)
        if not len(self.value_offsets):
            return latents
        start, end = self.value_offsets[row : row + 2].tolist()
        token_ids = np.array(self.token_ids[start:end], np.int32)
        return Hybrid(token_ids, latents) if len(latents) else token_ids

    def part(self, start: int, stop: int) -> Table:
        """The entries from `start` up to `stop`, as views."""
        records, record_offsets = _part_ragged(self.records, self.record_offsets, start, stop)
        token_ids, value_offsets = _part_ragged(self.token_ids, self.value_offsets, start, stop)
        return self._of(slice(start, stop), record_offsets, records, value_offsets, token_ids)

    def take(self, keep: npt.NDArray[np.bool_]) -> Table:
        """The entries for which `keep` (E,) is true."""
        records, record_offsets = _take_ragged(self.records, self.record_offsets, keep)
        token_ids, value_offsets = _take_ragged(self.token_ids, self.value_offsets, keep)
        return self._of(keep, record_offsets, records, value_offsets, token_ids)

    def _of(self, rows: slice | npt.NDArray[np.bool_], *ragged: Array) -> Table:
        """Some entries, whose `record_offsets` and all that follows are given."""
        fixed = (self.ids, self.key_scales, self.keys, self.value_scales, self.latents)
        return Table(*(column[rows] for column in fixed), *ragged)


def from_rows(rows: Sequence[Row], spec: BankSpec) -> Table:
    """A table of single entries."""
    count, dims = len(rows), (spec.latents, spec.latent_dim)
    texts = [row.token_ids for row in rows if row.token_ids is not None]
    return Table(
        np.array([row.id for row in rows], "<u8"),
        np.array([row.key_scale for row in rows], "<f4"),
        np.array([row.key for row in rows], np.int8).reshape(count, spec.key_dim),
        np.array([row.value_scales for row in rows], "<f4").reshape(count, spec.latents),
        np.array([row.latents for row in rows], np.int8).reshape(count, *dims),
        offsets(len(row.record) for row in rows),
        np.frombuffer(b"".join(row.record for row in rows), np.uint8),
        offsets(map(len, texts)) if spec.kind in WITH_TOKENS else _empty("<u8"),
        np.concatenate([_empty("<i4"), *texts]).astype("<i4"),
    )


def concat(first: Table, second: Table) -> Table:
    """The entries of both, in this order."""

    def both(name: str) -> Array:
        return np.concatenate([getattr(first, name), getattr(second, name)])

    def chained(name: str) -> Array:
        head, tail = getattr(first, name), getattr(second, name)
        return np.concatenate([head, tail[1:] + head[-1:]]) if len(head) else head

    plain = ("ids", "key_scales", "keys", "value_scales", "latents", "records", "token_ids")
    return Table(**{name: both(name) for name in plain}, **{n: chained(n) for n in ("record_offsets", "value_offsets")})


def offsets(lengths: Iterable[int]) -> Array:
    """Where each of neighbouring items begins, and the end of the last (E + 1,)."""
    return np.concatenate([[0], np.cumsum(list(lengths), dtype=np.uint64)]).astype("<u8")


def _part_ragged(items: Array, starts: Array, start: int, stop: int) -> tuple[Array, Array]:
    if not len(starts):
        return items, starts
    first, last = starts[[start, stop]].tolist()
    return items[first:last], starts[start : stop + 1] - np.uint64(first)


def _take_ragged(items: Array, starts: Array, keep: npt.NDArray[np.bool_]) -> tuple[Array, Array]:
    if not len(starts):
        return items, starts
    lengths = np.diff(starts)
    return items[np.repeat(keep, lengths.astype(np.int64))], offsets(lengths[keep].tolist())
