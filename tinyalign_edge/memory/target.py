"""The folder that a whole bank is written into: whether it may be, and by whom."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tinyalign_edge.errors import BundleError, InputError, TinyAlignError
from tinyalign_edge.folders import cause, sync
from tinyalign_edge.memory.layout import LOCK, MANIFEST, BankManifest
from tinyalign_edge.memory.lock import exclusive
from tinyalign_edge.memory.manifest import is_bank, is_newer, read_manifest
from tinyalign_edge.memory.write import generation_of, is_ours


def check_target(folder: Path) -> None:
    """Refuse to put a bank in the place of something else.

    Raises:
        InputError: `folder` is no folder, cannot be read, or holds what no bank holds.
        BundleError: it holds a bank of a newer version.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise InputError(f"{folder}: is not a folder; choose another")
    try:
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({cause(error)}); choose another folder") from None
    stranger = next((name for name in names if name != LOCK and not is_ours(name)), None)
    if is_bank(folder):
        stranger = None if standing(folder) or any(map(generation_of, names)) else MANIFEST
    if stranger:
        raise InputError(f"{folder}: holds {stranger!r} and is not a memory bank; choose another folder")


def standing(folder: Path) -> BankManifest | None:
    """The manifest that stands; None where there is none, or it is damaged: a new bank is what mends that.

    Raises:
        BundleError: a newer version wrote it.
    """
    try:
        return read_manifest(folder)
    except (InputError, BundleError):
        if is_newer(folder):
            raise
        return None


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`, which is made where there is none. If the block raises, no new folder is left, unless
    the block leaves something in it.

    Raises:
        TinyAlignError: the folder cannot be written.
    """
    new = list[Path]()
    try:
        new = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for path in new:
            sync(path.parent)  # or a power cut takes the folder with all that is in it
        with exclusive(folder):
            yield
    except BaseException as error:
        with suppress(OSError):
            if new:
                (folder / LOCK).unlink(missing_ok=True)
            for path in new:
                path.rmdir()
        if isinstance(error, OSError):
            raise TinyAlignError(f"{folder}: cannot be written ({cause(error)}); nothing was changed") from error
        raise
