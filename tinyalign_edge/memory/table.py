"""Entries side by side in arrays, as a segment stores them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyalign_edge.memory.layout import BankSpec

Array = npt.NDArray[Any]


def _empty(dtype: npt.DTypeLike) -> Array:
    return np.zeros(0, dtype)


@dataclass(frozen=True)
class Row:
    """One entry, as the journal stores it."""

    id: int
    key_scale: np.float32
    key: npt.NDArray[np.int8]  # (key_dim,)
    value: Array  # "tokens": (T,) int32; "latents": (L, latent_dim) int8
    value_scales: npt.NDArray[np.float32]  # "latents": (L,)
    record: bytes


@dataclass(frozen=True)
class Table:
    """E entries; the arrays may be maps of a file. Ids rise.

    Either `value_offsets` is used, by "tokens", or `value_scales`, by "latents". Offsets count ids and bytes.
    """

    ids: Array  # (E,) uint64
    key_scales: Array  # (E,) float32
    keys: Array  # (E, key_dim) int8; key = int8 row * scale, of unit length
    values: Array  # "tokens": (all T,) int32, one entry after another; "latents": (E, L, latent_dim) int8
    record_offsets: Array  # (E + 1,) uint64
    records: Array  # (bytes,) uint8
    value_offsets: Array = field(default_factory=lambda: _empty("<u8"))  # "tokens": (E + 1,)
    value_scales: Array = field(default_factory=lambda: _empty("<f4"))  # "latents": (E, L) float32

    def __len__(self) -> int:
        return len(self.ids)

    def record(self, row: int) -> bytes:
        """The bytes of one record."""
        start, end = self.record_offsets[row : row + 2].tolist()
        return self.records[start:end].tobytes()

    def value(self, row: int) -> Array:
        """One entry's value: token ids (T,) int32, or latents (L, latent_dim) float32."""
        if len(self.value_offsets):
            start, end = self.value_offsets[row : row + 2].tolist()
            return np.array(self.values[start:end], np.int32)
        return np.asarray(self.values[row].astype(np.float32) * self.value_scales[row][:, None], np.float32)

    def part(self, start: int, stop: int) -> Table:
        """The entries from `start` up to `stop`, as views."""
        first, last = self.record_offsets[[start, stop]].tolist()
        records, record_offsets = self.records[first:last], self.record_offsets[start : stop + 1] - np.uint64(first)
        rows = slice(start, stop)
        if len(self.value_offsets):
            first, last = self.value_offsets[[start, stop]].tolist()
            values, offsets = self.values[first:last], self.value_offsets[start : stop + 1] - np.uint64(first)
            more = {"value_offsets": offsets}
        else:
            values, more = self.values[rows], {"value_scales": self.value_scales[rows]}
        return Table(self.ids[rows], self.key_scales[rows], self.keys[rows], values, record_offsets, records, **more)

    def take(self, keep: npt.NDArray[np.bool_]) -> Table:
        """The entries for which `keep` (E,) is true."""
        records = _take_ragged(self.records, self.record_offsets, keep)
        if not len(self.value_offsets):
            values, scales = (self.values[keep], {"value_scales": self.value_scales[keep]})
        else:
            values, offsets = _take_ragged(self.values, self.value_offsets, keep)
            scales = {"value_offsets": offsets}
        return Table(self.ids[keep], self.key_scales[keep], self.keys[keep], values, records[1], records[0], **scales)


def from_rows(rows: Sequence[Row], spec: BankSpec) -> Table:
    """A table of single entries."""
    count, dims = len(rows), (spec.latents, spec.latent_dim)
    keys = np.array([row.key for row in rows], np.int8).reshape(count, spec.key_dim)
    records = np.frombuffer(b"".join(row.record for row in rows), np.uint8)
    if spec.kind == "tokens":
        values = np.concatenate([_empty("<i4"), *(row.value for row in rows)]).astype("<i4")
        more = {"value_offsets": offsets(len(row.value) for row in rows)}
    else:
        values = np.array([row.value for row in rows], np.int8).reshape(count, *dims)
        more = {"value_scales": np.array([row.value_scales for row in rows], "<f4").reshape(count, spec.latents)}
    return Table(
        np.array([row.id for row in rows], "<u8"),
        np.array([row.key_scale for row in rows], "<f4"),
        keys,
        values,
        offsets(len(row.record) for row in rows),
        records,
        **more,
    )


def concat(first: Table, second: Table) -> Table:
    """The entries of both, in this order."""

    def both(name: str) -> Array:
        return np.concatenate([getattr(first, name), getattr(second, name)])

    def chained(name: str) -> Array:
        head, tail = getattr(first, name), getattr(second, name)
        return np.concatenate([head, tail[1:] + head[-1:]]) if len(head) else head

    plain = ("ids", "key_scales", "keys", "values", "records", "value_scales")
    return Table(**{name: both(name) for name in plain}, **{n: chained(n) for n in ("record_offsets", "value_offsets")})


def offsets(lengths: Iterable[int]) -> Array:
    """Where each of neighbouring items begins, and the end of the last (E + 1,)."""
    return np.concatenate([[0], np.cumsum(list(lengths), dtype=np.uint64)]).astype("<u8")


def _take_ragged(items: Array, starts: Array, keep: npt.NDArray[np.bool_]) -> tuple[Array, Array]:
    lengths = np.diff(starts)
    return items[np.repeat(keep, lengths.astype(np.int64))], offsets(lengths[keep].tolist())
