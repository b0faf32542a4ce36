"""A sealed file of entries: written once, mapped by readers, never changed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from tinyalign_edge.files import FileEntry, check_files, inside
from tinyalign_edge.folders import sync
from tinyalign_edge.memory.check import CHECKS, check_table
from tinyalign_edge.memory.layout import BankSpec, SegmentEntry, aligned, sections
from tinyalign_edge.memory.table import Table
from tinyalign_edge.memory.verified import VerifiedFiles


def write_segment(path: Path, table: Table, spec: BankSpec) -> SegmentEntry:
    """Write `table` to the new file `path`, down to the disk."""
    token_count, digest, written = table.token_ids.size, hashlib.sha256(), 0
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
        BundleError: missing or changed, or as `check_table`.
    """
    path = inside(folder, entry.file)
    meaning = entry, spec, CHECKS
    known = verified.holds(path, meaning)
    if not known:
        check_files(folder, {entry.file: FileEntry(entry.bytes, entry.sha256)})
    data = np.asarray(np.memmap(path, np.uint8, "r"))
    arrays = {
        s.name: data[s.offset : s.offset + s.bytes].view(s.dtype).reshape(s.shape)
        for s in sections(spec, entry.count, entry.token_count, entry.record_bytes)
    }
    table = Table(**arrays)
    if not known:
        check_table(table, spec, str(path))
        verified.add(path, meaning)
    return table
