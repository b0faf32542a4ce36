"""A bundle under evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tinyalign_edge.data import Row
from tinyalign_edge.errors import InputError
from tinyalign_edge.evaluate import Asked, MemoryMode, partners
from tinyalign_edge.progress import progress
from tinyalign_edge.runtime.model import Model
from tinyalign_edge.runtime.sight import EncodedImage


class BundleAnswerer:
    """Answers questions from an open bundle, one after another, as an app would."""

    def __init__(self, model: Model) -> None:
        self.model = model

    @property
    def has_memory(self) -> bool:
        """Whether the bundle has a memory."""
        return self.model.memory is not None

    def ask_all(self, rows: Sequence[Row], *, memory: MemoryMode = "own") -> Iterator[Asked]:
        """The answer to the first question of every row, and the loss of its reference.

        Raises:
            InputError: a picture cannot be read; the message names it and its row.
        """
        with progress("Asking", len(rows)) as advance:
            for row, image in self._see(rows, memory):
                turn = row.turns[0]
                answer = self.model.ask(image, turn.question)
                nll = self.model.answer_nll(image, turn.question, turn.answer)
                advance()
                yield Asked(turn.question, turn.answer, answer.text, float(nll.sum()), len(nll))

    def reference_losses(self, rows: Sequence[Row], *, memory: MemoryMode = "own") -> Iterator[tuple[float, int]]:
        """The loss of the first reference of every row, in nats, and over how many tokens.

        Raises:
            InputError: a picture cannot be read; the message names it and its row.
        """
        with progress("Reading references", len(rows)) as advance:
            for row, image in self._see(rows, memory):
                nll = self.model.answer_nll(image, row.turns[0].question, row.turns[0].answer)
                advance()
                yield float(nll.sum()), len(nll)

    def _see(self, rows: Sequence[Row], memory: MemoryMode) -> Iterator[tuple[Row, EncodedImage]]:
        """Every row with its picture; rows that follow each other and share one share the work."""
        if memory == "shuffled" and self.model.memory is None:
            raise InputError("--shuffle-memory: this model has no memory")
        others = partners([row.image for row in rows]) if memory == "shuffled" else []
        last: tuple[tuple[str, Row | None], EncodedImage] | None = None
        for i, row in enumerate(rows):
            other = rows[others[i]] if others else None
            if last is None or last[0] != (row.image, other):
                last = (row.image, other), self._encode(row, memory, other)
            yield row, last[1]

    def _encode(self, row: Row, memory: MemoryMode, other: Row | None) -> EncodedImage:
        try:
            if other is not None:
                theirs = self.model.encode(other.path, question=other.turns[0].question).memories
                return self.model.encode(row.path, memories=theirs)
            return self.model.encode(row.path, memories=() if memory == "none" else None)
        except InputError as error:
            raise InputError(f"{row.where}: {error}") from None
