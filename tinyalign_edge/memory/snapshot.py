"""One generation of a bank, opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tinyalign_edge.errors import BundleError
from tinyalign_edge.folders import cause
from tinyalign_edge.memory import journal
from tinyalign_edge.memory.check import check_table
from tinyalign_edge.memory.graph import Graph, open_graph
from tinyalign_edge.memory.layout import BankManifest
from tinyalign_edge.memory.manifest import read_manifest
from tinyalign_edge.memory.segment import open_segment
from tinyalign_edge.memory.table import Array, Table, concat, from_rows
from tinyalign_edge.memory.verified import VerifiedFiles


@dataclass(frozen=True)
class Part:
    """Neighbouring entries of a table, as a search reads them."""

    ids: Array  # (E,) uint64
    keys: Array  # (E, key_dim) int8
    scales: Array  # (E,) float32


@dataclass(frozen=True)
class Snapshot:
    """A manifest and the entries that it names. It stays readable when the files are replaced."""

    manifest: BankManifest
    segments: tuple[Table, ...]
    journal: Table
    graph: Graph | None

    @property
    def tables(self) -> tuple[Table, ...]:
        """All entries, in the order of their ids."""
        return (*self.segments, self.journal) if len(self.journal) else self.segments

    @cached_property
    def parts(self) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
        """The entries that the graph knows, and those that it does not."""
        after = [table.first_after(self.graph.last_id) if self.graph else 0 for table in self.tables]
        pairs = list(zip(self.tables, after, strict=True))
        known = tuple(_part(table, 0, end) for table, end in pairs if end)
        return known, tuple(_part(table, start, None) for table, start in pairs if start < len(table))


def open_snapshot(
    folder: Path, previous: Snapshot | None = None, *, trusted: bool = True, recorded: bool = True
) -> Snapshot:
    """Open the newest generation; what `previous` has verified is neither read nor hashed again.

    Args:
        trusted: what this user has verified before, and has not changed since, is not hashed again either.
        recorded: what is verified now is remembered for that.

    Raises:
        InputError: it is not a bank.
        BundleError: damaged, hostile, written by a newer version, or not readable.
    """
    try:
        return _open_newest(folder, previous, VerifiedFiles(folder, trusted=trusted, recorded=recorded))
    except OSError as error:
        raise BundleError(f"{folder}: cannot be read ({cause(error)}); look at the rights of its files") from error


def _open_newest(folder: Path, previous: Snapshot | None, verified: VerifiedFiles) -> Snapshot:
    while True:
        manifest = read_manifest(folder)
        if previous and previous.manifest == manifest:
            return previous
        try:
            return _open(folder, manifest, previous, verified)
        except (BundleError, OSError):  # a writer may have replaced the files meanwhile
            if read_manifest(folder).generation == manifest.generation:
                raise


def _open(folder: Path, manifest: BankManifest, previous: Snapshot | None, verified: VerifiedFiles) -> Snapshot:
    kept = dict(zip(previous.manifest.segments, previous.segments, strict=True)) if previous else {}
    segments = tuple(
        kept[entry] if entry in kept else open_segment(folder, entry, manifest.spec, verified)
        for entry in manifest.segments
    )
    entries = _journal(folder, manifest, previous)
    tables = (*segments, entries) if len(entries) else segments
    last = -1
    for table in tables:
        if int(table.ids[0]) <= last:
            raise BundleError(f"{folder}: the ids of its files do not rise; build the bank again")
        last = int(table.ids[-1])
    if last >= manifest.next_id:
        raise BundleError(f"{folder}: holds the id {last}, the next was to be {manifest.next_id}; build the bank again")
    graph = _graph(folder, manifest, tables, previous, verified)
    verified.save()
    return Snapshot(manifest, segments, entries, graph)


def _journal(folder: Path, manifest: BankManifest, previous: Snapshot | None) -> Table:
    entry = manifest.journal
    if entry is None:
        return from_rows([], manifest.spec)
    before = previous.manifest.journal if previous else None
    if previous is None or before is None or before.file != entry.file or before.bytes > entry.bytes:
        table = journal.read(folder, entry, manifest.spec)
    else:
        table = concat(previous.journal, journal.read(folder, entry, manifest.spec, after=before))
    check_table(table, manifest.spec, str(folder / entry.file))
    return table


def _graph(
    folder: Path,
    manifest: BankManifest,
    tables: Sequence[Table],
    previous: Snapshot | None,
    verified: VerifiedFiles,
) -> Graph | None:
    entry = manifest.graph
    if entry is None or sum(table.first_after(entry.last_id) for table in tables) != entry.count:
        return None
    if previous and previous.graph and previous.manifest.graph == entry:
        return previous.graph
    return open_graph(folder, entry, manifest.spec, verified)


def _part(table: Table, start: int, end: int | None) -> Part:
    return Part(table.ids[start:end], table.keys[start:end], table.key_scales[start:end])
