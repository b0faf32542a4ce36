"""One generation of a bank, opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tinyalign_edge.errors import BundleError
from tinyalign_edge.memory import journal
from tinyalign_edge.memory.layout import BankManifest
from tinyalign_edge.memory.manifest import read_manifest
from tinyalign_edge.memory.segment import open_segment
from tinyalign_edge.memory.table import Table, concat, from_rows


@dataclass(frozen=True)
class Snapshot:
    """A manifest and the entries that it names. It stays readable when the files are replaced."""

    manifest: BankManifest
    segments: tuple[Table, ...]
    journal: Table

    @property
    def tables(self) -> tuple[Table, ...]:
        """All entries, in the order of their ids."""
        return (*self.segments, self.journal) if len(self.journal) else self.segments


def open_snapshot(folder: Path, previous: Snapshot | None = None) -> Snapshot:
    """Open the newest generation; what `previous` has verified is neither read nor hashed again.

    Raises:
        InputError: it is not a bank.
        BundleError: damaged, hostile or written by a newer version.
    """
    while True:
        manifest = read_manifest(folder)
        if previous and previous.manifest == manifest:
            return previous
        try:
            return _open(folder, manifest, previous)
        except (BundleError, OSError):  # a writer may have replaced the files meanwhile
            if read_manifest(folder).generation == manifest.generation:
                raise


def _open(folder: Path, manifest: BankManifest, previous: Snapshot | None) -> Snapshot:
    kept = dict(zip(previous.manifest.segments, previous.segments, strict=True)) if previous else {}
    segments = tuple(
        kept[entry] if entry in kept else open_segment(folder, entry, manifest.spec) for entry in manifest.segments
    )
    snapshot = Snapshot(manifest, segments, _journal(folder, manifest, previous))
    last = -1
    for table in snapshot.tables:
        if int(table.ids[0]) <= last:
            raise BundleError(f"{folder}: the ids of its files do not rise; build the bank again")
        last = int(table.ids[-1])
    if last >= manifest.next_id:
        raise BundleError(f"{folder}: holds the id {last}, the next was to be {manifest.next_id}; build the bank again")
    return snapshot


def _journal(folder: Path, manifest: BankManifest, previous: Snapshot | None) -> Table:
    entry = manifest.journal
    if entry is None:
        return from_rows([], manifest.spec)
    before = previous.manifest.journal if previous else None
    if previous is None or before is None or before.file != entry.file or before.bytes > entry.bytes:
        return journal.read(folder, entry, manifest.spec)
    return concat(previous.journal, journal.read(folder, entry, manifest.spec, after=before))
