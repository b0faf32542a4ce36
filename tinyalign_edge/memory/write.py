"""Change a bank folder: every change is a new generation, which stands once the manifest names it.

New files are written under names that no manifest has held, and reach the disk before the manifest does; files that it
no longer names are removed after it. A process that dies in between leaves the old generation, or the new one, and
files that the next writer sweeps away.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tinyalign_edge.errors import InputError
from tinyalign_edge.folders import sync
from tinyalign_edge.memory import journal, layout
from tinyalign_edge.memory.check import LARGEST_SCALE
from tinyalign_edge.memory.join import Selected, whole, write_joined
from tinyalign_edge.memory.layout import BankManifest, BankSpec, JournalEntry, Kind, SegmentEntry
from tinyalign_edge.memory.manifest import TEMPORARY, write_manifest
from tinyalign_edge.memory.record import Record
from tinyalign_edge.memory.search import quantize_keys
from tinyalign_edge.memory.segment import write_segment
from tinyalign_edge.memory.snapshot import Snapshot
from tinyalign_edge.memory.table import Array, Row, Table, offsets

JOURNAL_ENTRIES = 1024  # sealed beyond these
JOURNAL_BYTES = 1 << 20


@dataclass(frozen=True)
class Part:
    """A segment, or, without an `entry`, what will be one."""

    entries: tuple[Selected, ...]
    entry: SegmentEntry | None = None

    def __len__(self) -> int:
        return sum(int(keep.sum()) for _, keep in self.entries)


def write_bank(
    folder: Path,
    keys: npt.NDArray[np.float32],
    records: Sequence[Record],
    *,
    fingerprint: str,
    vocab_size: int,
    token_ids: Sequence[Sequence[int]] | None = None,
    latents: npt.NDArray[np.float32] | None = None,
) -> BankManifest:
    """Write a new bank into the empty `folder`.

    Args:
        keys: (E, key_dim) float32, unit rows.
        records: E of them.
        fingerprint: of the encoder and key projection that made the keys.
        vocab_size: bound of the token ids.
        token_ids: the values of a bank of kind "tokens", E sequences; with `latents`, of kind "hybrid".
        latents: the values of a bank of kind "latents", or part of them, (E, L, latent_dim) float32.

    Raises:
        InputError: a key is not of length 1, a latent is not finite, or there are no values.
    """
    if token_ids is None and latents is None:
        raise InputError("token_ids and latents: an entry carries at least one of them; give one, or both")
    folder.mkdir(parents=True, exist_ok=True)
    kind: Kind = "tokens" if latents is None else "latents" if token_ids is None else "hybrid"
    if latents is None:
        latents = np.zeros((len(keys), 0, 0), np.float32)
    spec = BankSpec(kind, keys.shape[1], latents.shape[1], latents.shape[2], vocab_size, fingerprint)
    more = dict[str, Array]()
    if token_ids is not None:
        more["value_offsets"] = offsets(len(ids) for ids in token_ids)
        more["token_ids"] = np.array([i for ids in token_ids for i in ids], "<i4")
    quantised_latents, latent_scales = quantize_latents(latents)
    quantised, key_scales = quantize_keys(keys)
    encoded = [record.encode() for record in records]
    table = Table(
        np.arange(len(keys), dtype="<u8"),
        key_scales,
        quantised,
        latent_scales,
        quantised_latents,
        offsets(len(record) for record in encoded),
        np.frombuffer(b"".join(encoded), np.uint8),
        **more,
    )
    segments = (write_segment(folder / segment_name(1, 0), table, spec),) if len(table) else ()
    manifest = BankManifest(layout.SCHEMA_VERSION, 1, len(table), spec, segments, None, "")
    sync(folder)
    write_manifest(folder, manifest)
    return manifest


def quantize_latents(latents: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Latents (..., latent_dim) float32 to int8 and a float32 scale a latent.

    Raises:
        InputError: one is not finite, or too large to be kept.
    """
    peak = np.maximum(np.abs(latents).max(axis=-1, initial=0), 1e-12)
    scales = (peak / 127).astype(np.float32)
    if not np.all(scales <= LARGEST_SCALE):  # not a number is not
        raise InputError("latents: one is not finite, or too large to be kept; look for a damaged value encoder")
    return np.round(latents / peak[..., None] * 127).astype(np.int8), scales


def append(folder: Path, snapshot: Snapshot, row: Row) -> None:
    """Add one entry, whose id is the manifest's next."""
    manifest = snapshot.manifest
    before = manifest.journal
    if before and (before.count >= JOURNAL_ENTRIES or before.bytes >= JOURNAL_BYTES):
        manifest = commit(folder, manifest, [*_sealed(snapshot), Part((whole(snapshot.journal),))], None)
        before = None
    generation = manifest.generation + 1
    before = before or JournalEntry(f"journal-{generation}.bin", 0, 0, journal.FIRST_DIGEST.hex())
    data, digest = journal.encode(row, bytes.fromhex(before.digest))
    journal.append(folder / before.file, data, at=before.bytes)
    sync(folder)
    after = replace(before, bytes=before.bytes + len(data), count=before.count + 1, digest=digest.hex())
    write_manifest(folder, replace(manifest, generation=generation, next_id=row.id + 1, journal=after))


def extend(folder: Path, snapshot: Snapshot, tables: Sequence[Table]) -> None:
    """Add whole tables, whose ids follow the manifest's next, and seal them with the journal."""
    manifest = replace(snapshot.manifest, next_id=int(tables[-1].ids[-1]) + 1)
    added = Part(tuple(map(whole, (snapshot.journal, *tables))))
    commit(folder, manifest, [*_sealed(snapshot), added], None)


def remove(folder: Path, snapshot: Snapshot, ids: Sequence[int]) -> None:
    """Write every file that holds one of `ids` anew without it, and delete the old ones."""
    gone = np.array(ids, np.uint64)
    parts, journal_entry = list[Part](), snapshot.manifest.journal
    for part, table in zip(_sealed(snapshot), snapshot.segments, strict=True):
        keep = ~np.isin(table.ids, gone)
        parts.append(part if keep.all() else Part(((table, keep),)))
    keep = ~np.isin(snapshot.journal.ids, gone)
    if not keep.all():
        parts.append(Part(((snapshot.journal, keep),)))
        journal_entry = None
    manifest = snapshot.manifest
    if manifest.graph and min(ids) <= manifest.graph.last_id:  # it would hold their keys
        manifest = replace(manifest, graph=None)
    commit(folder, manifest, [part for part in parts if len(part)], journal_entry)


def sweep(folder: Path, manifest: BankManifest) -> None:
    """Remove what interrupted writers left: files that the manifest does not name, bytes that it does not count."""
    named = manifest.files
    left = [path for path in folder.iterdir() if is_ours(path.name) and path.name not in named]
    for path in left:
        path.unlink()
    if left:
        sync(folder)
    if manifest.journal and (folder / manifest.journal.file).stat().st_size > manifest.journal.bytes:
        os.truncate(folder / manifest.journal.file, manifest.journal.bytes)
        sync(folder / manifest.journal.file)


def commit(
    folder: Path,
    manifest: BankManifest,
    parts: list[Part],
    journal_entry: JournalEntry | None,
) -> BankManifest:
    """Make `parts` the bank's segments, writing those that have no file yet.

    The last takes in those before it that are not much larger, so that the number of segments grows with the
    logarithm of the number of entries.
    """
    while len(parts) > 1 and parts[-1].entry is None and len(parts[-2]) <= 2 * len(parts[-1]):
        *parts, before, last = parts
        parts.append(Part(before.entries + last.entries))
    generation = manifest.generation + 1
    segments = list[SegmentEntry]()
    for number, part in enumerate(parts):
        path = folder / segment_name(generation, number)
        segment = part.entry or write_joined(path, part.entries, manifest.spec)
        segments += [segment] if segment else []
    sync(folder)
    manifest = replace(manifest, generation=generation, segments=tuple(segments), journal=journal_entry)
    write_manifest(folder, manifest)
    sweep(folder, manifest)
    return manifest


def _sealed(snapshot: Snapshot) -> list[Part]:
    pairs = zip(snapshot.manifest.segments, snapshot.segments, strict=True)
    return [Part((whole(table),), entry) for entry, table in pairs]


def segment_name(generation: int, number: int) -> str:
    """The name of the `number`-th segment that a generation writes."""
    return f"segment-{generation}-{number}.bin"


def is_ours(name: str) -> bool:
    """Whether it is the name of a file that a writer makes, but for manifest and lock."""
    return name == TEMPORARY or generation_of(name) > 0


def generation_of(name: str) -> int:
    """The generation that wrote the segment, journal or graph of this name; 0 for other names."""
    if any(pattern.fullmatch(name) for pattern in (layout.SEGMENT_NAME, layout.JOURNAL_NAME, layout.GRAPH_NAME)):
        return int(name.split("-")[1].split(".")[0])
    return 0
