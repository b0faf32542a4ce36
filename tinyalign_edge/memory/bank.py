"""A bank folder: search it, add to it, forget from it. No byte is read that was not compared with the manifest."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tinyalign_edge.errors import InputError, TinyAlignError
from tinyalign_edge.folders import cause
from tinyalign_edge.memory.addition import new_row
from tinyalign_edge.memory.graph import build_index
from tinyalign_edge.memory.layout import BankManifest
from tinyalign_edge.memory.lock import exclusive
from tinyalign_edge.memory.lookup import nearest_entries
from tinyalign_edge.memory.merge import check_alike, new_entries
from tinyalign_edge.memory.rebuild import install, is_due, is_large
from tinyalign_edge.memory.record import Record, decode_record
from tinyalign_edge.memory.search import Neighbours
from tinyalign_edge.memory.snapshot import Snapshot, open_snapshot
from tinyalign_edge.memory.stats import BankStats, stats_of
from tinyalign_edge.memory.table import Table
from tinyalign_edge.memory.value import Value
from tinyalign_edge.memory.write import append, extend, remove, sweep

Float = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Entry:
    """One entry. `value` is token ids (T,) int32, latents (L, latent_dim) float32, or both, by the bank's kind."""

    id: int
    text: str
    question: str
    source: str
    time: str  # UTC in ISO 8601, empty for entries that came with the training data
    similarity: float
    value: Value
    thumbnail: bytes = b""  # JPEG, decoded by `open_thumbnail`; empty where there is none


class Bank:
    """An open bank. Safe to use from several threads; other processes may read and write the same folder.

    What another process has written is seen after `refresh`, or after an `add` or `forget` of one's own.
    """

    def __init__(self, folder: Path) -> None:
        """Open `folder`.

        Raises:
            InputError: it is not a bank.
            BundleError: damaged, hostile or written by a newer version.
        """
        self.folder = folder
        self.on_loss: Callable[[], None] = lambda: None  # called when entries that were open are gone
        self._changing = threading.Lock()  # only one thread opens another generation
        self._snapshot = open_snapshot(folder)

    def __len__(self) -> int:
        return self.manifest.count

    @property
    def manifest(self) -> BankManifest:
        """Of the generation that is open."""
        return self._snapshot.manifest

    @property
    def ids(self) -> tuple[int, ...]:
        """Of all entries, in the order in which they were added."""
        return tuple(number for table in self._snapshot.tables for number in table.ids.tolist())

    def nearest(self, queries: Float, k: int, *, floor: float = -1.0) -> Neighbours:
        """The ids of the `k` entries most similar to each of `queries` (Q, key_dim), at or above `floor`.

        Raises:
            InputError: a query is zero, not finite or of another shape, or `k` is below 0.
        """
        return nearest_entries(self._snapshot, queries, k, floor=floor)

    def search(self, query: Float, k: int, *, floor: float = -1.0) -> tuple[Entry, ...]:
        """The `k` entries most similar to one `query` (key_dim,), most similar first; fewer where there are fewer.

        Raises:
            InputError: as `nearest`.
        """
        snapshot = self._snapshot
        k = min(k, snapshot.manifest.count)
        found = nearest_entries(snapshot, query[None], k, floor=floor)
        pairs = zip(found.rows[0].tolist(), found.similarity[0].tolist(), strict=True)
        return tuple(self._entry(snapshot, number, similarity) for number, similarity in pairs if number >= 0)

    def entry(self, id: int, similarity: float = 1.0) -> Entry:
        """Read one entry.

        Raises:
            InputError: there is none of this id.
        """
        return self._entry(self._snapshot, id, similarity)

    def stats(self) -> BankStats:
        """Counts and sizes."""
        return stats_of(self._snapshot)

    def refresh(self) -> None:
        """See what other processes have written since.

        Raises:
            BundleError: as on opening; what was open stays open.
        """
        with self._noticing(), self._changing:
            self._snapshot = open_snapshot(self.folder, self._snapshot)

    def verify(self) -> None:
        """Compare every file with the manifest again, also those that have been and are unchanged since.

        Raises:
            BundleError: one is damaged. A graph is not: it is only not used.
        """
        with self._noticing(), self._changing:
            self._snapshot = open_snapshot(self.folder, trusted=False)

    def add(self, key: Float, record: Record, *, value: Value) -> int:
        """Add an entry; it is on the disk when this returns, and found from then on.

        Args:
            key: (key_dim,) float32 of any length but zero.
            record: its texts.
            value: token ids (T,), latents (L, latent_dim) float32, or both, by the bank's kind.

        Returns:
            Its id.

        Raises:
            InputError: a key or value of another shape, zero or not finite, or an entry too large.
            TinyAlignError: the folder cannot be written; the bank is as it was.
        """
        row = new_row(self.manifest.spec, key, record.encode(), value)
        with self._exclusive() as snapshot:
            append(self.folder, snapshot, replace(row, id=snapshot.manifest.next_id))
            return snapshot.manifest.next_id

    def forget(self, *, id: int | None = None, source: str | None = None, text: str | None = None) -> tuple[int, ...]:
        """Forget the entry of an id, or all of a source or of a text. When this returns, no file holds a byte of them.

        White space at the ends of a text does not count.

        What a file system keeps of deleted files, and what other processes have open until they refresh, is out of
        its reach.

        Returns:
            The ids forgotten; none where nothing matched.

        Raises:
            InputError: not exactly one of the three was given.
            TinyAlignError: the folder cannot be written; try again.
        """
        if sum(given is not None for given in (id, source, text)) != 1:
            raise InputError("forget: give one of id, source and text")
        text = None if text is None else text.strip()
        with self._exclusive() as snapshot:
            found = tuple(
                int(table.ids[row])
                for table in snapshot.tables
                for row in (range(len(table)) if id is None else np.flatnonzero(table.ids == id).tolist())
                if id is not None or _matches(self._record(table, row), source, text)
            )
            if found:
                remove(self.folder, snapshot, found)
            return found

    def merge(self, other: Bank) -> tuple[int, ...]:
        """Take over the entries of `other`, but for those that are here already: the same key, value and texts.

        Returns:
            The ids that the new entries have here.

        Raises:
            InputError: the banks are of different encoders or kinds.
            TinyAlignError: the folder cannot be written; the bank is as it was.
        """
        theirs = other._snapshot
        check_alike(self.folder, self.manifest.spec, other.folder, theirs.manifest.spec)
        with self._exclusive() as snapshot:
            tables = new_entries(snapshot, theirs)
            if tables:
                extend(self.folder, snapshot, tables)
        return tuple(number for table in tables for number in table.ids.tolist())

    @property
    def graph_due(self) -> bool:
        """Whether so many entries are outside the graph that `rebuild` would make searches faster."""
        return is_due(self._snapshot)

    def rebuild(self, advance: Callable[[int], object] | None = None) -> int:
        """Build the graph by which large banks are searched. Others read and write meanwhile.

        It takes minutes for a million entries, so neither `add` nor `merge` does it, and `forget` of an entry that the
        graph holds deletes the graph: all entries are compared then, until this is called.

        Args:
            advance: called with the number of entries done since its last call.

        Returns:
            How many entries the graph holds; 0 in a bank so small that it is searched faster without one.

        Raises:
            UnsupportedError: USearch does not load here.
            TinyAlignError: the folder cannot be written; the bank is as it was.
        """
        self.refresh()
        while is_large(self._snapshot):
            with self._exclusive():
                pass  # a folder that cannot be written is found out before the work
            snapshot = self._snapshot
            index = build_index(snapshot.tables, snapshot.manifest.spec, advance or (lambda _: None))
            with self._exclusive() as now:
                if install(self.folder, now, index, snapshot.manifest.next_id - 1):
                    return len(index)
        return 0

    @contextmanager
    def _exclusive(self) -> Iterator[Snapshot]:
        """Hold the lock, with the newest generation open; afterwards open what the block has written."""
        with self._noticing():
            try:
                with exclusive(self.folder), self._changing:  # in this order: `refresh` waits for no other process
                    self._snapshot = open_snapshot(self.folder, self._snapshot)
                    sweep(self.folder, self._snapshot.manifest)
                    try:
                        yield self._snapshot
                    except OSError:
                        with suppress(OSError, TinyAlignError):
                            self._snapshot = open_snapshot(self.folder, self._snapshot)
                            sweep(self.folder, self._snapshot.manifest)
                        raise
                    self._snapshot = open_snapshot(self.folder, self._snapshot)
            except OSError as error:
                raise TinyAlignError(
                    f"{self.folder}: cannot be written ({cause(error)}); free space there, or keep the memory in a "
                    "writable folder (--memory-dir)"
                ) from error

    @contextmanager
    def _noticing(self) -> Iterator[None]:
        """Tell if entries are gone after the block, whoever has forgotten them. No lock is held then."""
        before = self.manifest
        try:
            yield
        finally:
            after = self.manifest
            if after.next_id - before.next_id != after.count - before.count:  # each addition counts both up
                self.on_loss()

    def _entry(self, snapshot: Snapshot, number: int, similarity: float) -> Entry:
        for table in snapshot.tables:
            row = int(np.searchsorted(table.ids, np.uint64(max(0, number))))
            if row < len(table) and int(table.ids[row]) == number:
                record, value = self._record(table, row), table.value(row)
                return Entry(number, similarity=similarity, value=value, **asdict(record))
        raise InputError(f"{self.folder}: has no entry of the id {number}")

    def _record(self, table: Table, row: int) -> Record:
        return decode_record(table.record(row), f"{self.folder}: entry {table.ids[row]}")


def _matches(record: Record, source: str | None, text: str | None) -> bool:
    return record.source == source if source is not None else record.text.strip() == text
