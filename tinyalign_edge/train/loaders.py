"""Processes that make batches ready beside one that trains: forks of it, since rows hold what cannot be sent."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager

from tinyalign_edge.errors import InputError, TinyAlignError

FORK = "fork"
DEAD = "DataLoader worker (pid"  # begins torch's error of a process that ended
FOREIGN = "Original Traceback"  # stands in the text of an error that torch brings from another process


def check_loaders(loaders: int) -> None:
    """Refuse a number of them that cannot be.

    Raises:
        InputError: names the option.
    """
    if loaders < 0:
        raise InputError(f"--loaders {loaders}: must be at least 0")
    if loaders and FORK not in multiprocessing.get_all_start_methods():
        raise InputError(f"--loaders {loaders}: needs an operating system whose processes fork; leave it out")


@contextmanager
def told_of(loaders: int) -> Iterator[None]:
    """One line for what happens in the processes: an error that was raised there on purpose has its traceback in its
    text, and one that is killed leaves torch's own.

    Raises:
        TinyAlignError: as it was raised, or that a process ended.
    """
    try:
        yield
    except TinyAlignError as error:
        if FOREIGN not in str(error):
            raise
        kind = type(error)
        message = str(error).rstrip().rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2]
        raise kind(message) from None
    except RuntimeError as error:
        if not str(error).startswith(DEAD):
            raise
        raise TinyAlignError(
            f"--loaders {loaders}: one of these processes ended, as they do where memory, or shared memory, is short; "
            "--resume with fewer of them"
        ) from None
