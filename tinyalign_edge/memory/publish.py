"""Put a bank that was built from data in the place of what a folder holds, at once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tinyalign_edge.errors import BundleError, InputError, TinyAlignError
from tinyalign_edge.folders import cause, sync
from tinyalign_edge.memory.join import Selected, write_joined
from tinyalign_edge.memory.layout import LOCK, SCHEMA_VERSION, BankManifest, BankSpec
from tinyalign_edge.memory.lock import exclusive
from tinyalign_edge.memory.manifest import TEMPORARY, is_bank, read_manifest, write_manifest
from tinyalign_edge.memory.write import generation_of, is_ours, segment_name, sweep


def check_target(folder: Path) -> None:
    """Refuse to put a bank in the place of something else.

    Raises:
        InputError: `folder` is no folder, or holds what no bank holds.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise InputError(f"{folder}: is not a folder; choose another")
    if folder.is_dir() and not is_bank(folder):
        stranger = next((path for path in folder.iterdir() if path.name != LOCK and not is_ours(path.name)), None)
        if stranger:
            raise InputError(f"{folder}: holds {stranger.name!r} and is not a memory bank; choose another folder")


def publish(folder: Path, spec: BankSpec, parts: Sequence[Selected]) -> BankManifest:
    """Make the selected entries of `parts` all that the bank `folder` holds; a new folder becomes a bank.

    Readers see the old bank until the new one stands. Ids go on after those that the old bank gave.

    Raises:
        InputError: as `check_target`.
        TinyAlignError: the folder cannot be written; what it held is as it was.
    """
    check_target(folder)
    fresh = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(folder):
            return _replace(folder, spec, parts)
    except OSError as error:
        with suppress(OSError):
            if fresh:
                (folder / LOCK).unlink(missing_ok=True)
                folder.rmdir()
        raise TinyAlignError(f"{folder}: cannot be written ({cause(error)}); nothing was changed") from error


def _replace(folder: Path, spec: BankSpec, parts: Sequence[Selected]) -> BankManifest:
    before = _current(folder)
    used = [generation_of(path.name) for path in folder.iterdir()]  # also of what killed writers left
    generation = 1 + max([before.generation if before else 0, *used])
    path = folder / segment_name(generation, 0)
    next_id = before.next_id if before else 0
    try:
        (folder / TEMPORARY).unlink(missing_ok=True)  # left by a writer that died
        segment = write_joined(path, parts, spec, first_id=next_id)
        segments = (segment,) if segment else ()
        next_id += segment.count if segment else 0
        manifest = BankManifest(SCHEMA_VERSION, generation, next_id, spec, segments, None, "")
        sync(folder)
        write_manifest(folder, manifest)
    except OSError:
        with suppress(OSError):
            for left in (path, folder / TEMPORARY):
                left.unlink(missing_ok=True)
        raise
    sweep(folder, manifest)
    return manifest


def _current(folder: Path) -> BankManifest | None:
    """The manifest that stands; None where there is none, or it is damaged: a new bank is what mends that."""
    try:
        return read_manifest(folder)
    except (InputError, BundleError):
        return None
