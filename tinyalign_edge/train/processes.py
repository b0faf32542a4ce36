"""This process among those of `accelerate launch`; alone where there was none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from tinyalign_edge.errors import TinyAlignError

PATIENCE = timedelta(days=1)  # with one that works alone, as on a large memory's graph; torch's with NCCL: ten minutes
ANOTHER_STOPPED = "another process of this run has stopped; what it said is the reason"
DIST_ERROR = getattr(torch.distributed, "DistError", ())  # a build of torch may have none
LOST_CONNECTION = ("Connection closed by peer", "Connection reset by peer")  # as gloo says it


class Processes:
    """`rank` of `count` processes."""

    def __init__(self, device: str) -> None:
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        self._state = PartialState(cpu=device == "cpu", timeout=PATIENCE) if several else None
        self.rank: int = self._state.process_index if self._state else 0
        self.count: int = self._state.num_processes if self._state else 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all have come so far."""
        if self._state:
            self._state.wait_for_everyone()

    def of_first(self, value: Any) -> Any:
        """The first process's value, in all of them."""
        return broadcast_object_list([value])[0] if self._state else value

    def joined(self, own: dict[int, str]) -> dict[int, str]:
        """What each process has, in all of them."""
        parts = gather_object([own]) if self._state else [own]
        return {number: said for part in parts for number, said in part.items()}

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block at whose end all processes meet; what stops one stops all, which then work on nothing any more.

        Raises:
            TinyAlignError: what the block raised here; or one process says that, and the others that it does.
        """
        failed = None
        try:
            yield
        except TinyAlignError as error:
            failed = error
        stopped = gather_object([failed is not None]) if self._state else [failed is not None]
        if failed is not None and not any(stopped[: self.rank]):
            raise failed
        if any(stopped):
            raise TinyAlignError(ANOTHER_STOPPED)

    @contextmanager
    def one_line(self) -> Iterator[None]:
        """Say that another process has stopped, in place of what the network says of it.

        Raises:
            TinyAlignError: it has.
        """
        try:
            yield
        except RuntimeError as error:
            lost = isinstance(error, DIST_ERROR) or any(text in str(error) for text in LOST_CONNECTION)
            if self.count == 1 or not lost:
                raise
            raise TinyAlignError(ANOTHER_STOPPED) from None


def is_first() -> bool:
    """Whether this is the process that writes, before any `Processes` is made."""
    return int(os.environ.get("RANK", "0")) == 0
