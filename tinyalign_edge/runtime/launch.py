"""Which share of the work is this process's, where `torchrun` or `accelerate launch` started many."""

from __future__ import annotations

import os
from dataclasses import dataclass

from tinyalign_edge.errors import InputError


@dataclass(frozen=True)
class Part:
    """The `index`-th of `count` processes, from 0."""

    index: int = 0
    count: int = 1


def parse_part(given: str) -> Part:
    """`I/N` as people count, from 1.

    Raises:
        InputError: it is something else.
    """
    index, _, count = given.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 0 < int(index) <= int(count)):
        raise InputError(f"--shard {given}: must be I/N with I from 1 to N, such as 2/8")
    return Part(int(index) - 1, int(count))


def part_of_environment() -> Part:
    """What `RANK` and `WORLD_SIZE` say; all of the work where there was no launcher.

    Raises:
        InputError: they are not numbers that fit.
    """
    index, count = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise InputError(f"RANK {index!r} of WORLD_SIZE {count!r}: must be numbers, the first below the second")
    return Part(int(index), int(count))


def threads() -> int | None:
    """Threads of an operator where `LOCAL_WORLD_SIZE` processes share the cores; None: one process has them all."""
    neighbours = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if not neighbours.isdecimal() or int(neighbours) < 2:
        return None
    return max(1, (os.cpu_count() or 1) // int(neighbours))
