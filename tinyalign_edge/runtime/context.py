"""What the language model has read: positions, with their keys and values, and the prefixes kept for later."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyalign_edge.runtime.copying import Copying, MemoryTexts
from tinyalign_edge.runtime.decoder import Cache, Decoder, Saved
from tinyalign_edge.runtime.lru import Lru
from tinyalign_edge.runtime.sight import EncodedImage

Float = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Span:
    """Some positions of a prompt: token ids, or a picture with its memories.

    Attributes:
        names: what stands at each position; equal names mean equal embeddings.
        image: None for token ids, which are their own names.
    """

    names: tuple[Hashable, ...]
    image: EncodedImage | None = None

    def __len__(self) -> int:
        return len(self.names)


def text_span(ids: Sequence[int]) -> Span:
    """Token ids."""
    return Span(tuple(ids))


def picture_span(image: EncodedImage) -> Span:
    """A picture."""
    return Span(tuple((image.digest, i) for i in range(len(image.tokens))), image)


@dataclass(frozen=True)
class Prefix:
    """Keys and values of the first positions of a prompt, as `Cache.saved` gives them."""

    saved: Saved
    remembered: bool  # a memory is among them

    @property
    def nbytes(self) -> int:
        return self.saved.nbytes


def _pictures(spans: Sequence[Span]) -> Iterator[tuple[int, EncodedImage]]:
    """The pictures of a prompt, and where each begins."""
    position = 0
    for span in spans:
        if span.image is not None:
            yield position, span.image
        position += len(span)


class Context:
    """One sequence of positions that grows, is cut and goes on; not for several threads at once.

    Args:
        decoder: the language model.
        prefixes: where what stands before a question is kept for the next one.
        copying: the memory's copy term, if it has one.

    Attributes:
        kept: positions of the prompt that the last `read` did not compute, since they were there or in `prefixes`.
    """

    def __init__(self, decoder: Decoder, prefixes: Lru[Prefix], copying: Copying | None = None) -> None:
        self._decoder, self._prefixes, self._copying = decoder, prefixes, copying
        self._texts: MemoryTexts | None = None
        self._cache: Cache | None = None
        self._names: list[Hashable] = []
        self.kept = 0

    def __len__(self) -> int:
        return len(self._names)

    def read(self, spans: Sequence[Span], *, room: int) -> Float:
        """Make `spans` the whole sequence, reading only what differs from what is there.

        A prompt is read in two passes: up to the end of the last picture, then the rest. The first may come from
        `prefixes`; since int8 activations are scaled a pass at a time, a prefix must be read alone to give the
        same keys and values each time.

        Args:
            spans: not empty together.
            room: positions that may be appended afterwards.

        Returns:
            (V,) float32: what follows the last position.
        """
        if self._copying is not None:
            self._texts = self._copying.texts(_pictures(spans))
        names = [name for span in spans for name in span.names]
        pictures = [i for i, span in enumerate(spans) if span.image is not None]
        head = sum(map(len, spans[: pictures[-1] + 1])) if pictures else 0
        head = min(head, len(names) - 1)
        same = sum(1 for _ in takewhile(bool, map(operator.eq, self._names, names)))
        same = min(same, len(names) - 1)
        cache = self._reserve(len(names) + room)
        self.truncate(same)
        self.kept = head if same < head and self._read_prefix(cache, spans, names[:head]) else same
        rows = self._embed(spans, len(self), len(names))
        return self._copied(self._forward(cache, rows, names[len(self) :], 1)).squeeze(0)

    def append(self, ids: Sequence[int], num_logits: int = 1) -> Float:
        """Append token ids in one pass; returns what follows each of the last `num_logits`, (num_logits, V)."""
        cache = self._reserve(len(self) + len(ids))
        return self._copied(self._forward(cache, self._decoder.embed(ids), ids, num_logits))

    def truncate(self, length: int) -> None:
        """Forget the positions from `length` on, if there are any."""
        if self._cache is not None:
            self._cache.truncate(min(length, self._cache.length))
        del self._names[length:]

    def _read_prefix(self, cache: Cache, spans: Sequence[Span], names: list[Hashable]) -> bool:
        """Read what stands before a question; tells whether it was kept."""
        key = tuple(names)
        if prefix := self._prefixes.get(key):
            cache.restore(prefix.saved)
            self._names = names
            return True
        alone = not len(self)
        self._forward(cache, self._embed(spans, len(self), len(names)), names[len(self) :], 1)
        if alone:
            remembered = any(span.image is not None and bool(span.image.memories) for span in spans)
            self._prefixes.put(key, Prefix(cache.saved(), remembered))
        return False

    def _forward(self, cache: Cache, rows: Float, names: Sequence[Hashable], num_logits: int) -> Float:
        cache.truncate(len(self))  # a pass may have been interrupted after it wrote
        logits = self._decoder.forward(cache, rows, num_logits)
        self._names.extend(names)
        return logits

    def _copied(self, logits: Float) -> Float:
        """What follows the last positions, (A, V), given their `logits`."""
        if self._copying is None or self._texts is None or self._cache is None:
            return logits
        return self._copying.mix(logits, self._cache.hidden[: len(self)], self._names[-len(logits) :], self._texts)

    def _embed(self, spans: Sequence[Span], start: int, end: int) -> Float:
        """The embeddings (end - start, D) of a stretch of the prompt."""
        parts, position = [], 0
        for span in spans:
            first, last = max(start - position, 0), min(end - position, len(span))
            position += len(span)
            if first < last:
                ids: Any = span.names[first:last]
                parts.append(self._decoder.embed(ids) if span.image is None else span.image.tokens[first:last])
        return np.concatenate(parts)

    def _reserve(self, positions: int) -> Cache:
        """The cache, with room for so many positions in all."""
        old = self._cache
        if old is not None and old.capacity >= positions:
            return old
        doubled = min(2 * old.capacity, self._decoder.block.max_positions) if old else 0
        cache = self._decoder.new_cache(max(positions, doubled))
        if old is not None:
            old.truncate(len(self))
            cache.restore(old.saved())
        self._cache = cache  # not before: what fails above leaves the old one in its place
        return cache
