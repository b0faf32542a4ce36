"""Which files of a bank this user has verified on this device, so that opening it again does not hash them again.

One small file a bank, in the user's cache folder: it neither travels with a bank nor can be delivered with one. A file
counts as verified while its device, inode, size and times are what they were when its bytes were hashed; anything else,
a record that cannot be read included, only means that it is hashed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from tinyalign_edge.config import read_small
from tinyalign_edge.errors import InputError

SETTLED_NS = 2_000_000_000  # a file changed later than this ago may change again without its times showing it
MAX_MARKS = 256  # of one bank; beyond them the record begins anew
MAX_RECORDS = 256  # of banks; the oldest are dropped


class VerifiedFiles:
    """The record of the bank `folder`. With `trusted=False` nothing in it counts, and it begins anew; with
    `recorded=False` there is none, as for banks that will not last."""

    def __init__(self, folder: Path, *, trusted: bool = True, recorded: bool = True) -> None:
        self._folder, self._trusted, self._recorded = folder, trusted, recorded
        self._settled = dict[Path, str]()
        self._found = set[str]()
        if not trusted and self._path is not None:
            with suppress(OSError):
                self._path.unlink()  # also where damage is found now

    def holds(self, path: Path, meaning: Any) -> bool:
        """Whether the file `path` was found to be what `meaning` says, and is unchanged since."""
        try:
            mark = _mark(path, meaning)
            stat = path.stat()
        except OSError:
            return False
        if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > SETTLED_NS:  # now, before its bytes are read
            self._settled[path] = mark
        if mark in self._known:
            self._found.add(mark)
        return mark in self._known

    def add(self, path: Path, meaning: Any) -> None:
        """Note that `path`, which `holds` did not know, has been read since and is what `meaning` says."""
        mark = _mark(path, meaning)
        if mark == self._settled.get(path):
            self._found.add(mark)

    def save(self) -> None:
        """Write what is new. Where that cannot be done, everything is hashed again the next time."""
        path = self._path
        if path is None or not self._found or self._found <= self._known:
            return
        marks = self._found | self._known
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor, temporary = tempfile.mkstemp(dir=path.parent)
            try:
                with os.fdopen(descriptor, "w") as file:
                    json.dump(sorted(marks if len(marks) <= MAX_MARKS else self._found), file)
                Path(temporary).replace(path)
            except OSError:
                Path(temporary).unlink()
                raise
            _drop_oldest(path.parent)

    @cached_property
    def _path(self) -> Path | None:
        """Where the record lies; None where there is none, or the user has no folder for such things."""
        if not self._recorded:
            return None
        try:
            home = Path.home()
            name = hashlib.sha256(os.fsencode(self._folder.resolve())).hexdigest()
        except (OSError, RuntimeError):
            return None
        caches = home / "Library" / "Caches" if sys.platform == "darwin" else home / ".cache"
        caches = Path(os.environ.get("XDG_CACHE_HOME") or caches)
        return Path(os.environ.get("TINYALIGN_CACHE") or caches / "tinyalign-edge") / "verified" / f"{name}.json"

    @cached_property
    def _known(self) -> frozenset[str]:
        if self._path is None or not self._trusted:
            return frozenset()
        try:
            if hasattr(os, "getuid") and self._path.lstat().st_uid != os.getuid():
                return frozenset()
            marks = json.loads(read_small(self._path))
        except (OSError, InputError, ValueError, RecursionError):
            return frozenset()
        return frozenset(mark for mark in marks if isinstance(mark, str)) if isinstance(marks, list) else frozenset()


def _mark(path: Path, meaning: Any) -> str:
    stat = path.stat()
    state = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return hashlib.sha256(repr((path.name, state, meaning)).encode()).hexdigest()


def _drop_oldest(folder: Path) -> None:
    records = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in records[MAX_RECORDS:]:
        path.unlink()
