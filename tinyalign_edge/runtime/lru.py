"""A bounded store that lets go of what was not used for longest."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """What tells its size."""

    @property
    def nbytes(self) -> int: ...


V = TypeVar("V", bound=Sized)


class Lru(Generic[V]):
    """Values of at most `max_bytes` together; safe to use from several threads."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._values: OrderedDict[Hashable, V] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Of all values."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable) -> V | None:
        """The value of `key`, which counts as used now."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def put(self, key: Hashable, value: V) -> None:
        """Keep a value and let others go for it; one that is too large is not kept."""
        with self._lock:
            self._remove(key)
            if value.nbytes > self.max_bytes:
                return
            self._values[key] = value
            self._bytes += value.nbytes
            while self._bytes > self.max_bytes:
                self._remove(next(iter(self._values)))

    def drop(self, unwanted: Callable[[V], bool]) -> None:
        """Let go of every value that is `unwanted`."""
        with self._lock:
            for key in [key for key, value in self._values.items() if unwanted(value)]:
                self._remove(key)

    def _remove(self, key: Hashable) -> None:
        if key in self._values:
            self._bytes -= self._values.pop(key).nbytes
