"""One writer at a time, across threads and processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tinyalign_edge.memory.layout import LOCK


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Wait until nobody else writes to the bank. The kernel frees the lock when its process ends, however it ends."""
    import fcntl  # not at the top: Windows has none, and can read banks

    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a process that was forked off meanwhile has it open, too
        os.close(descriptor)
