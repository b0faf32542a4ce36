"""From tokens to the text that is shown, as far as it is certain."""

from __future__ import annotations

from collections.abc import Sequence

from tinyalign_edge.prompt import Prompt


class Text:
    """The text of one answer, token by token, without white space at its ends.

    What may be the beginning of a stop text is held back, and white space until more follows.

    Attributes:
        shown: what `push` and `end` have given so far.
        stopped: a stop text has come; `shown` ends before it.
    """

    def __init__(self, prompt: Prompt, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._decode, self._stop = prompt.tokenizer, prompt.stream(), stop
        self._held = ""
        self.shown, self.stopped = "", False

    def push(self, token: int) -> str:
        """The text that becomes certain with this token; "" where none does."""
        self._held += self._decode.step(self._tokenizer, token) or ""
        if not self.shown:
            self._held = self._held.lstrip()
        found = [at for at in map(self._held.find, self._stop) if at >= 0]
        self.stopped = bool(found)
        return self._show(min(found) if found else len(self._held) - self._beginning())

    def end(self) -> str:
        """What was held back, now that no more tokens come."""
        return "" if self.stopped else self._show(len(self._held))

    def _show(self, length: int) -> str:
        piece = self._held[:length].rstrip()
        self._held = self._held[len(piece) :]
        self.shown += piece
        return piece

    def _beginning(self) -> int:
        """How many of the last characters are the beginning of a stop text, at most."""
        lengths = (n for stop in self._stop for n in range(1, len(stop)) if self._held.endswith(stop[:n]))
        return max(lengths, default=0)
