"""Entries of many tables in one segment, written in blocks: what is in memory does not grow with their number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tinyalign_edge.config import WITH_TOKENS
from tinyalign_edge.files import file_sha256
from tinyalign_edge.folders import sync
from tinyalign_edge.memory.layout import BankSpec, SegmentEntry, aligned, sections
from tinyalign_edge.memory.table import Table

BLOCK = 4096  # entries in memory at once

Mask = npt.NDArray[np.bool_]
Selected = tuple[Table, Mask]  # (E,): true for the entries that are meant


def whole(table: Table) -> Selected:
    """All entries of a table."""
    return table, np.ones(len(table), np.bool_)


def write_joined(
    path: Path, parts: Sequence[Selected], spec: BankSpec, *, first_id: int | None = None
) -> SegmentEntry | None:
    """Write the selected entries of `parts`, in their order, to the new file `path`, down to the disk.

    They keep their ids, or have new ones, counted from `first_id`. Returns None, and writes nothing, where there are
    none.
    """
    count = sum(int(keep.sum()) for _, keep in parts)
    if not count:
        return None
    with_tokens = spec.kind in WITH_TOKENS
    token_count = sum(_total(table.value_offsets, keep) for table, keep in parts) if with_tokens else 0
    record_bytes = sum(_total(table.record_offsets, keep) for table, keep in parts)
    placed = sections(spec, count, token_count, record_bytes)
    size = aligned(placed[-1].offset + placed[-1].bytes)
    at = {section.name: section.offset for section in placed}
    last = dict.fromkeys(("value_offsets", "record_offsets"), np.uint64(0))
    for name in at.keys() & last.keys():
        at[name] += 8  # the first offset is 0, and so is the file until it is written
    with path.open("xb") as file:
        file.truncate(size)
        for block in _blocks(parts):
            for section in placed:
                column = getattr(block, section.name)
                if section.name == "ids" and first_id is not None:
                    column, first_id = np.arange(first_id, first_id + len(block)), first_id + len(block)
                elif section.name in last:
                    column = column[1:] + last[section.name]
                    last[section.name] = column[-1]
                data = np.ascontiguousarray(column, section.dtype)
                file.seek(at[section.name])
                file.write(data.reshape(-1).view(np.uint8).data)
                at[section.name] += data.nbytes
    sync(path)
    return SegmentEntry(path.name, size, file_sha256(path), count, token_count, record_bytes)


def _blocks(parts: Sequence[Selected]) -> Iterator[Table]:
    for table, keep in parts:
        for start in range(0, len(table), BLOCK):
            mask = keep[start : start + BLOCK]
            if mask.any():
                yield table.part(start, start + len(mask)).take(mask)


def _total(offsets: npt.NDArray[np.uint64], keep: Mask) -> int:
    return sum(
        int(np.diff(offsets[start : start + BLOCK + 1])[keep[start : start + BLOCK]].sum())
        for start in range(0, len(keep), BLOCK)
    )
