"""Memory that does not suffice, of the GPU or the machine: one line that says what takes less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tinyalign_edge.errors import TinyAlignError


@contextmanager
def out_of_memory(when: str, remedy: str) -> Iterator[None]:
    """Say when there was not memory enough for the block, and the remedy.

    Raises:
        TinyAlignError: in place of torch's or Python's own error.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's own error of a GPU is a RuntimeError
        text = str(error).lower()
        if not isinstance(error, MemoryError) and "out of memory" not in text and "can't allocate memory" not in text:
            raise
        raise TinyAlignError(f"out of memory {when}; {remedy}") from None
