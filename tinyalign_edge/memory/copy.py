"""Start a bank as a copy of another: the writable memory beside a read-only bundle."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from tinyalign_edge.errors import InputError, TinyAlignError
from tinyalign_edge.folders import cause, sync, temporary_beside
from tinyalign_edge.memory.layout import GraphEntry
from tinyalign_edge.memory.manifest import is_bank
from tinyalign_edge.memory.snapshot import Snapshot, open_snapshot
from tinyalign_edge.memory.write import commit


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
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target}: exists and is not a memory bank; choose another folder")
    snapshot = open_snapshot(source)
    temporary = temporary_beside(target)
    try:
        manifest = replace(snapshot.manifest, graph=_copy_graph(source, temporary, snapshot))
        commit(temporary, manifest, [(None, table) for table in snapshot.tables], None)
        temporary.rename(target)
        sync(target.parent)
    except OSError as error:
        if not is_bank(target):
            raise TinyAlignError(f"{target}: cannot be written ({cause(error)}); nothing was changed") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
