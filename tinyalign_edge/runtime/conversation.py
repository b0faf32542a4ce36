"""Several questions and answers, with pictures, each of which knows those before it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tinyalign_edge.errors import InputError
from tinyalign_edge.image import ImageLike
from tinyalign_edge.prompt import Said
from tinyalign_edge.runtime.answer import Answer, AnswerStream, AsyncAnswerStream, Pieces
from tinyalign_edge.runtime.answering import Answering, Asked
from tinyalign_edge.runtime.context import Context
from tinyalign_edge.runtime.options import Generation, with_changes
from tinyalign_edge.runtime.sight import EncodedImage

if TYPE_CHECKING:
    from tinyalign_edge.runtime.model import Model

Images = ImageLike | EncodedImage | Sequence[ImageLike | EncodedImage]


@dataclass(frozen=True)
class Exchange:
    """A question with the pictures that came with it, and its answer ("" while it is awaited)."""

    question: str
    images: tuple[EncodedImage, ...] = ()
    answer: str = ""


class Conversation:
    """A conversation with an open bundle; made by `Model.chat`.

    What was read stays in memory, so a turn costs its own tokens only. One answer at a time: a second question before
    the end of an answer is an InputError. Any number of conversations share one model.

    When the context is full, the oldest turns are left out, each as a whole, until the question and an answer of full
    length fit; no more than half of the context is kept free for an answer. The newest picture is never left out: it
    then comes with the oldest turn that is left.

    An answer that fails, is interrupted or is left before its end is no part of the conversation, nor is its question;
    one that was ended by `cancel` or timed out is, as far as it came.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._context: Context | None = None  # made when it is needed; it holds the weights
        self._busy = threading.Lock()
        self.exchanges: tuple[Exchange, ...] = ()

    def ask(self, question: str, images: Images = (), options: Generation | None = None, **changes: Any) -> Answer:
        """The answer to the next question.

        Args:
            question: what to ask.
            images: a picture, or several, that come with the question.
            options: how to answer; None: greedily, as `Generation` says.
            changes: fields of `Generation` that differ from `options`.

        Raises:
            InputError: as `Model.ask`; or another answer is being given.
        """
        return self.stream(question, images, options, **changes).result()

    def stream(
        self, question: str, images: Images = (), options: Generation | None = None, **changes: Any
    ) -> AnswerStream:
        """Like `ask`, piece by piece."""
        given = with_changes(options, changes)
        listed = tuple(images) if isinstance(images, list | tuple) else (images,)
        return AnswerStream(lambda cancelled: self._pieces(question, listed, given, cancelled))

    async def aask(
        self, question: str, images: Images = (), options: Generation | None = None, **changes: Any
    ) -> Answer:
        """`ask` for asyncio."""
        return await self.astream(question, images, options, **changes).result()

    def astream(
        self, question: str, images: Images = (), options: Generation | None = None, **changes: Any
    ) -> AsyncAnswerStream:
        """`stream` for asyncio."""
        return AsyncAnswerStream(self.stream(question, images, options, **changes))

    def reset(self) -> None:
        """Begin anew.

        Raises:
            InputError: an answer is being given.
        """
        with self._alone():
            self.exchanges, self._context = (), None

    def forget_read(self) -> None:
        """Let go of what was read and of what the memory said before, if no answer is being given."""
        with suppress(InputError), self._alone():
            self._context = None
            self.exchanges = self._renewed(self.exchanges)

    def _pieces(
        self,
        question: str,
        images: Sequence[ImageLike | EncodedImage],
        options: Generation,
        cancelled: threading.Event,
    ) -> Pieces:
        started = time.perf_counter()
        self._model.prompt.question(question)  # refuse an empty question before the work on the pictures
        encoded = tuple(image if isinstance(image, EncodedImage) else self._model.encode(image) for image in images)
        with self._model.reading() as answering, self._alone():
            exchanges = self._fitted(answering, [*self.exchanges, Exchange(question, encoded)], options)
            asked = Asked(_said(exchanges), _images(exchanges), started, _spent(encoded))
            if self._context is None:
                self._context = answering.context()
            answer = yield from answering.pieces(asked, options, self._context, cancelled)
            self.exchanges = (*exchanges[:-1], replace(exchanges[-1], answer=answer.text))
            return answer

    def _fitted(self, answering: Answering, exchanges: Sequence[Exchange], options: Generation) -> list[Exchange]:
        """`exchanges` with what the memory says now, without the oldest that do not fit."""
        exchanges = list(self._renewed(exchanges))
        room = answering.size - min(answering.wanted(options), answering.size // 2)
        while len(exchanges) > 1 and sum(map(len, answering.spans(_said(exchanges), _images(exchanges)))) > room:
            oldest, following, *rest = exchanges
            newest_elsewhere = any(one.images for one in (following, *rest))
            images = following.images if newest_elsewhere else oldest.images[-1:]
            exchanges = [replace(following, images=images), *rest]
        return exchanges

    def _renewed(self, exchanges: Sequence[Exchange]) -> tuple[Exchange, ...]:
        return tuple(
            replace(one, images=tuple(self._model.renewed(image, one.question) for image in one.images))
            for one in exchanges
        )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):  # to wait could be for ever: the same thread may hold it
            raise InputError("conversation: an answer is being given; wait for its end, or leave its stream")
        try:
            yield
        finally:
            self._busy.release()


def _said(exchanges: Sequence[Exchange]) -> list[Said]:
    *before, last = (Said(one.question, one.answer, len(one.images)) for one in exchanges)
    return [*before, replace(last, answer=None)]


def _images(exchanges: Sequence[Exchange]) -> list[EncodedImage]:
    return [image for one in exchanges for image in one.images]


def _spent(images: Sequence[EncodedImage]) -> dict[str, float]:
    """What the stages took for all pictures together, in ms."""
    stages = dict.fromkeys(stage for image in images for stage in image.timings_ms)
    return {stage: sum(image.timings_ms.get(stage, 0.0) for image in images) for stage in stages}
