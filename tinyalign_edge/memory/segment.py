"""A sealed file of entries: written once, mapped by readers, never changed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from tinyalign_edge.errors import BundleError
from tinyalign_edge.files import FileEntry, check_files, inside
from tinyalign_edge.folders import sync
from tinyalign_edge.memory.layout import MAX_ENTRY_BYTES, MAX_RECORD_BYTES, BankSpec, SegmentEntry, aligned, sections
from tinyalign_edge.memory.table import Array, Table
from tinyalign_edge.memory.verified import VerifiedFiles


def write_segment(path: Path, table: Table, spec: BankSpec) -> SegmentEntry:
    """Write `table` to the new file `path`, down to the disk."""
    token_count = table.values.size if spec.kind == "tokens" else 0
    digest, written = hashlib.sha256(), 0
    with path.open("xb") as file:
        for section in sections(spec, len(table), token_count, table.records.size):
            array = np.ascontiguousarray(getattr(table, section.name), section.dtype)
            padding = bytes(aligned(section.bytes) - section.bytes)
            for data in (array.reshape(-1).view(np.uint8).data, padding):
                file.write(data)
                digest.update(data)
            written += section.bytes + len(padding)
    sync(path)
    return SegmentEntry(path.name, written, digest.hexdigest(), len(table), token_count, table.records.size)


def open_segment(folder: Path, entry: SegmentEntry, spec: BankSpec, verified: VerifiedFiles) -> Table:
    """Map a segment, once its bytes are the manifest's, or were and have not changed since.

    Raises:
        BundleError: missing or changed, or its offsets, ids or scales are impossible.
    """
    path = inside(folder, entry.file)
    known = verified.holds(path, (entry, spec))
    if not known:
        check_files(folder, {entry.file: FileEntry(entry.bytes, entry.sha256)})
    data = np.asarray(np.memmap(path, np.uint8, "r"))
    arrays = {
        s.name: data[s.offset : s.offset + s.bytes].view(s.dtype).reshape(s.shape)
        for s in sections(spec, entry.count, entry.token_count, entry.record_bytes)
    }
    table = Table(**arrays)
    if not known:
        _check(path, table, entry, spec)
        verified.add(path, (entry, spec))
    return table


def _check(path: Path, table: Table, entry: SegmentEntry, spec: BankSpec) -> None:
    if not np.all(table.ids[1:] > table.ids[:-1]):
        raise BundleError(f"{path}: its ids do not rise; build the bank again")
    if not np.all(np.isfinite(table.key_scales)):
        raise BundleError(f"{path}: a key is not finite; build the bank again")
    _check_offsets(path, table.record_offsets, entry.record_bytes, MAX_RECORD_BYTES)
    if spec.kind == "tokens":
        _check_offsets(path, table.value_offsets, entry.token_count, MAX_ENTRY_BYTES // table.values.itemsize)


def _check_offsets(path: Path, offsets: Array, end: int, longest: int) -> None:
    if offsets[0] != 0 or int(offsets[-1]) != end or np.any(np.diff(offsets) > longest):  # a fall wraps around
        raise BundleError(f"{path}: its offsets do not fit its sections; build the bank again")
