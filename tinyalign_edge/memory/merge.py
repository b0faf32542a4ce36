"""What one bank holds that another does not."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from tinyalign_edge.errors import InputError
from tinyalign_edge.memory.layout import BankSpec
from tinyalign_edge.memory.record import decode_record
from tinyalign_edge.memory.snapshot import Snapshot
from tinyalign_edge.memory.table import Table
from tinyalign_edge.memory.value import latents_of, token_ids_of


def check_alike(folder: Path, spec: BankSpec, other_folder: Path, other: BankSpec) -> None:
    """Entries of two banks can stand together only if encoder and sizes are the same.

    Raises:
        InputError: they are not; the message names both.
    """
    if spec.fingerprint != other.fingerprint:
        raise InputError(
            f"{other_folder}: its keys are of the encoder {other.fingerprint[:12]}, those of {folder} of "
            f"{spec.fingerprint[:12]}; merge banks of one encoder"
        )
    if spec != other:
        raise InputError(f"{other_folder}: holds {other}, {folder} holds {spec}; merge banks of one kind")


def new_entries(snapshot: Snapshot, other: Snapshot) -> list[Table]:
    """The entries of `other` that `snapshot` does not hold, each once, with ids that follow `snapshot`'s.

    Entries are the same if key, value, text, question and source are; the time does not count.
    """
    seen = {content_digest(table, row) for table in snapshot.tables for row in range(len(table))}
    next_id, found = snapshot.manifest.next_id, list[Table]()
    for table in other.tables:
        keep = np.zeros(len(table), np.bool_)
        for row in range(len(table)):
            content = content_digest(table, row)
            keep[row] = content not in seen
            seen.add(content)
        if keep.any():
            taken = table.take(keep)
            found.append(replace(taken, ids=np.arange(next_id, next_id + len(taken), dtype="<u8")))
            next_id += len(taken)
    return found


def content_digest(table: Table, row: int) -> bytes:
    """SHA-256 of what an entry holds, but for its id and time."""
    record = decode_record(table.record(row), f"entry {table.ids[row]}")
    texts = [record.text, record.question, record.source]
    digest = hashlib.sha256(repr(texts).encode())
    value = table.value(row)
    for array in (table.keys[row], table.key_scales[row : row + 1], token_ids_of(value), latents_of(value)):
        digest.update(array.tobytes())
    return digest.digest()
