"""Start a bank as a copy of another: the writable memory beside a read-only bundle."""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from tinyalign_edge.folders import sync
from tinyalign_edge.memory.join import whole
from tinyalign_edge.memory.layout import GraphEntry
from tinyalign_edge.memory.manifest import is_bank
from tinyalign_edge.memory.snapshot import Snapshot, open_snapshot
from tinyalign_edge.memory.target import check_target, claimed
from tinyalign_edge.memory.write import Part, commit, sweep


def copy_bank(source: Path, target: Path) -> None:
    """Make the new or empty folder `target` a bank with the entries of `source`; a bank that is there already stays.

    Of several processes that do this at once one makes the bank and the others find it.

    Raises:
        InputError: `target` holds something else, or `source` is not a bank.
        BundleError: `source` is damaged.
        TinyAlignError: `target` cannot be written; nothing was left.
    """
    if is_bank(target):
        return
    check_target(target)
    snapshot = open_snapshot(source)
    empty = replace(snapshot.manifest, segments=(), journal=None, graph=None)
    with claimed(target):
        if is_bank(target):
            return
        try:
            sweep(target, empty)  # what one that died has left
            manifest = replace(empty, graph=_copy_graph(source, target, snapshot))
            commit(target, manifest, [Part((whole(table),)) for table in snapshot.tables], None)
        except BaseException:
            if not is_bank(target):
                with suppress(OSError):
                    sweep(target, empty)
            raise


def _copy_graph(source: Path, target: Path, snapshot: Snapshot) -> GraphEntry | None:
    """Take the graph along where it is whole; what arrives is verified when it is opened."""
    entry = snapshot.manifest.graph
    if entry is None or snapshot.graph is None:
        return None
    try:
        shutil.copyfile(source / entry.file, target / entry.file)
    except FileNotFoundError:  # replaced meanwhile
        return None
    sync(target / entry.file)
    return entry
