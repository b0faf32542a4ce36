"""The append journal: entries that were added since the last segment was sealed.

Each ends with the SHA-256 of the digest before it and of itself, so that the last digest, which the manifest names,
vouches for all of them. Bytes after those that the manifest counts are of an entry that was never acknowledged.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tinyalign_edge.config import WITH_TOKENS
from tinyalign_edge.errors import BundleError
from tinyalign_edge.files import inside
from tinyalign_edge.memory.layout import BankSpec, JournalEntry
from tinyalign_edge.memory.table import Row, Table, from_rows

FIRST_DIGEST = bytes(32)
HEAD = struct.Struct("<IQfI")  # bytes of the entry without its digest, id, key scale, token ids or latents


def encode(row: Row, previous: bytes) -> tuple[bytes, bytes]:
    """The bytes of an entry, its digest included, and that digest."""
    scales = row.value_scales.astype("<f4").tobytes()
    ids = b"" if row.token_ids is None else row.token_ids.astype("<i4").tobytes()
    items = len(row.latents if row.token_ids is None else row.token_ids)
    body = row.key.tobytes() + scales + ids + row.latents.tobytes() + row.record
    data = HEAD.pack(HEAD.size + len(body), row.id, row.key_scale, items) + body
    digest = hashlib.sha256(previous + data).digest()
    return data + digest, digest


def append(path: Path, data: bytes, *, at: int) -> None:
    """Write `data` at the byte `at`, the end of what counts, down to the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    with os.fdopen(descriptor, "wb") as file:
        file.seek(at)
        file.write(data)
        file.flush()
        os.fsync(descriptor)


def read(folder: Path, entry: JournalEntry, spec: BankSpec, *, after: JournalEntry | None = None) -> Table:
    """The entries that follow those of `after`, an earlier state of the same journal.

    Raises:
        BundleError: missing, cut or changed.
    """
    path = inside(folder, entry.file)
    start, previous = (after.bytes, bytes.fromhex(after.digest)) if after else (0, FIRST_DIGEST)
    if not path.is_file():
        raise BundleError(f"{path}: the manifest lists it but it is missing; copy the folder again")
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(max(0, entry.bytes - start))
    rows, last = list[Row](), previous
    for row, last in _decode(data, previous, spec, path):  # noqa: B007
        rows.append(row)
    if last.hex() != entry.digest or len(rows) + (after.count if after else 0) != entry.count:
        raise _damaged(path)
    return from_rows(rows, spec)


def _decode(data: bytes, previous: bytes, spec: BankSpec, path: Path) -> Iterator[tuple[Row, bytes]]:
    at, latents, with_tokens = 0, (spec.latents, spec.latent_dim), spec.kind in WITH_TOKENS
    while at < len(data):
        if len(data) - at < HEAD.size:
            raise _damaged(path)
        size, number, key_scale, items = HEAD.unpack_from(data, at)
        head, digest = data[at : at + size], data[at + size : at + size + 32]
        if hashlib.sha256(previous + head).digest() != digest:
            raise _damaged(path)
        key_end = HEAD.size + spec.key_dim
        scale_end = key_end + 4 * spec.latents
        ids_end = scale_end + 4 * items * with_tokens
        value_end = ids_end + math.prod(latents)
        if value_end > size or (not with_tokens and items != spec.latents):
            raise _damaged(path)
        row = Row(
            number,
            np.float32(key_scale),
            np.frombuffer(head[HEAD.size : key_end], "i1"),
            np.frombuffer(head[scale_end:ids_end], "<i4") if with_tokens else None,
            np.frombuffer(head[ids_end:value_end], "i1").reshape(latents),
            np.frombuffer(head[key_end:scale_end], "<f4"),
            head[value_end:],
        )
        yield row, digest
        at, previous = at + size + 32, digest


def _damaged(path: Path) -> BundleError:
    return BundleError(f"{path}: an entry's checksum is not right, it was cut or changed; copy the folder again")
