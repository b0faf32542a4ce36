"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from tinyalign_edge.errors import InputError, TinyAlignError


@contextmanager
def whole_folder(target: Path, *, marker: str) -> Iterator[Path]:
    """Give a temporary folder beside `target`; put it in `target`'s place when the block ends well.

    When the block raises, is interrupted or terminated, the temporary folder is removed and what stood at `target`
    stays as it was. An existing `target` is replaced only if it is empty or holds `marker`, the file that says the
    folder is ours.

    Raises:
        InputError: `target` is something else, or its parent cannot be written.
        TinyAlignError: the disk is full, or another failure of the file system.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise InputError(f"{target}: is not a folder; choose another output")
    if target.is_dir() and any(target.iterdir()) and not (target / marker).is_file():
        raise InputError(f"{target}: exists and is not ours (no {marker}); choose another output folder")
    with _terminate_as_interrupt():
        temporary = temporary_beside(target)
        try:
            yield temporary
            for path in temporary.rglob("*"):
                if path.is_file():
                    sync(path)
            _replace(temporary, target)
        except OSError as error:
            raise TinyAlignError(f"{target}: cannot be written ({cause(error)}); nothing was changed") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def cause(error: OSError) -> str:
    """What went wrong, and where, for a message."""
    where = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{where}"


def temporary_beside(target: Path) -> Path:
    """A new folder beside `target`, on the same file system.

    Raises:
        InputError: the parent cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        temporary.chmod(0o777 & ~_umask())
    except OSError as error:
        raise InputError(f"{target.parent}: cannot be written ({error.strerror}); choose another output") from None
    return temporary


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _replace(new: Path, target: Path) -> None:
    """Swap by renames; the old folder is deleted only after the new one stands."""
    if not target.exists():
        new.rename(target)
        sync(target.parent)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    try:
        target.rename(old / target.name)
        new.rename(target)
    except BaseException:
        if (old / target.name).exists() and not target.exists():
            (old / target.name).rename(target)
        old.rmdir()
        raise
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM ends the block like an interrupt, so that what it began is removed."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
