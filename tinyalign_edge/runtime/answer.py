"""An answer, and the stream of its text."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from tinyalign_edge.errors import InputError
from tinyalign_edge.memory import Entry

FinishReason = Literal["stop", "length", "timeout", "cancelled"]


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        text: without what a stop string cut off.
        tokens: generated, without the one that ends the answer.
        finish_reason: the model's own end or a stop string; the limit; `timeout_s`; or `cancel`.
        memories: what the memory said of the pictures.
        timings_ms: `decode_image`, `preprocess`, `encode`, `retrieve`, `prefill`, `first_token`, `per_token` and
            `total`; 0 where there was nothing to do. Of a picture that came encoded, the first four are what it took
            then. `total` and `first_token` are counted from the call: from the image's bytes, unless it came encoded.
            The time that the caller takes between two pieces of a stream counts in `total` alone.
        passes: of the language model after the prompt was read; fewer than tokens where drafts were accepted.
        prompt_tokens: that the model was asked with, those of pictures and memories included.
        cached_tokens: how many of them were not read, since they were kept from an earlier question.
        likelihoods: with `choices`, the mean log-likelihood of a token of each, in nats.
    """

    text: str
    tokens: int
    finish_reason: FinishReason
    memories: tuple[Entry, ...]
    timings_ms: dict[str, float] = field(default_factory=dict)
    passes: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    likelihoods: tuple[float, ...] = ()


Pieces = Generator[str, None, Answer]


class AnswerStream:
    """Pieces of an answer's text as they come; `answer` holds the whole once they are used up. Iterate once.

    Work begins with the first piece that is asked for. Leaving the loop early ends the answer.
    """

    def __init__(self, begin: Callable[[threading.Event], Pieces]) -> None:
        self._cancelled = threading.Event()
        self._pieces = begin(self._cancelled)
        self.answer: Answer | None = None

    def __iter__(self) -> Iterator[str]:
        if self.answer is None:
            self.answer = yield from self._pieces

    def result(self) -> Answer:
        """The whole answer; takes what is left of the stream."""
        for _ in self:
            pass
        if self.answer is None:
            raise InputError("the stream was left before its end; ask again")
        return self.answer

    def cancel(self) -> None:
        """End the answer after the pass that is running, from any thread; `answer` then holds what there is."""
        self._cancelled.set()


class AsyncAnswerStream:
    """An `AnswerStream` for asyncio: each piece is computed in a thread, the loop goes on meanwhile.

    A task that is cancelled while it waits for a piece cancels the answer; its conversation is busy until the pass
    that is running has ended.
    """

    def __init__(self, stream: AnswerStream) -> None:
        self._stream = stream

    @property
    def answer(self) -> Answer | None:
        """The whole once the pieces are used up."""
        return self._stream.answer

    def cancel(self) -> None:
        """As `AnswerStream.cancel`."""
        self._stream.cancel()

    def __aiter__(self) -> AsyncIterator[str]:
        return _AsyncPieces(self._stream)

    async def result(self) -> Answer:
        """The whole answer; takes what is left of the stream."""
        async for _ in self:
            pass
        return self._stream.result()


class _AsyncPieces:
    """No async generator: the event loop would end one that is left half-way only later, and its conversation would be
    busy until then."""

    def __init__(self, stream: AnswerStream) -> None:
        self._stream = stream
        self._pieces: Any = iter(stream)

    def __del__(self) -> None:
        with suppress(ValueError):  # a thread is at it; it ends with its piece
            self._pieces.close()

    def __aiter__(self) -> _AsyncPieces:
        return self

    async def __anext__(self) -> str:
        try:
            piece: str | None = await asyncio.to_thread(next, self._pieces, None)
        except asyncio.CancelledError:
            self._stream.cancel()
            raise
        if piece is None:
            raise StopAsyncIteration
        return piece
