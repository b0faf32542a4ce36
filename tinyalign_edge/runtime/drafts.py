"""Guesses at the next tokens, taken from texts that the answer may repeat: memories, question, the answer itself.

Prompt lookup (Saxena, 2023, https://github.com/apoorvumang/prompt-lookup-decoding), with the memories as the texts
that are looked up first. A guess costs nothing to make; a pass that verifies it costs more than a pass over one token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from math import ceil

LONGEST_MATCH = 4
SHORTEST_MATCH = 2  # one token alone repeats by chance; at the beginning of a memory it does not need to be longer
FIRST, MOST, LEAST = 7, 15, 3  # tokens of a draft; a pass is over one more
COST = 0.75  # of a pass over a draft, beyond one over a token, in passes: small models take more, large ones less
MOST_CREDIT = 2.0  # passes that drafts have saved and may lose again before they rest
MOST_LOST = 0.02  # of all passes, where drafts do not pay


class Pace:
    """How often a model drafts: what drafts have lost, passes without one make up for. Shared by its answers.

    Nothing is locked: what two threads do to it at once can cost a draft, never change an answer.
    """

    def __init__(self) -> None:
        self._credit, self._rest = 0.0, 0

    def pays(self) -> bool:
        """Whether the next pass may have a draft."""
        self._rest = max(self._rest - 1, -1)
        return self._rest < 0

    def learn(self, saved: float) -> None:
        """Take note of how many passes were saved, those that drafts cost taken off."""
        self._credit = min(self._credit + saved, MOST_CREDIT)
        if self._credit < 0:
            self._credit, self._rest = 0.0, ceil(-self._credit / MOST_LOST)


class Drafts:
    """Proposes continuations of one answer.

    Args:
        memories: token ids of texts that an answer may be, the most similar first, with the token that ends an answer.
        prompt: token ids of the question.
        pace: of the model.
    """

    def __init__(self, memories: Sequence[Sequence[int]], prompt: Sequence[int], pace: Pace) -> None:
        self._memories = [list(ids) for ids in memories]
        self._prompt, self._pace = list(prompt), pace
        self._length = FIRST

    def propose(self, ids: Sequence[int], limit: int) -> list[int]:
        """At most `limit` tokens that may follow the answer's `ids`; none where nothing is alike or it does not pay."""
        if not ids or limit < 1 or not self._pace.pays():
            return []
        found = self._continuations(list(ids))
        if not found:
            return []
        common, _ = Counter(continuation[0] for continuation in found).most_common(1)[0]
        best = next(continuation for continuation in found if continuation[0] == common)
        return best[: min(self._length, limit)]

    def learn(self, proposed: int, right: int, *, saved: int) -> None:
        """Take note of how many of the tokens proposed, if any, were right, and how many passes that saved."""
        if proposed:
            self._length = min(MOST, 2 * self._length + 1) if right == proposed else max(LEAST, right + 1)
        self._pace.learn(saved - COST if proposed else saved)

    def _continuations(self, ids: list[int]) -> list[list[int]]:
        """What follows the longest match of the end of `ids`, in every place where it does."""
        texts = [*self._memories, self._prompt, ids]
        matches = [(length, text, place) for text in texts for length, place in _matches(text, ids)]
        longest = max((length for length, _, _ in matches), default=0)
        if longest >= SHORTEST_MATCH:
            return [text[place:] for length, text, place in matches if length == longest]
        return [text[len(ids) :] for text in self._memories if len(text) > len(ids) and text[: len(ids)] == ids]


def _matches(text: list[int], ids: list[int]) -> Iterator[tuple[int, int]]:
    """How many tokens before each place of `text` are the last ones of `ids`, where any are, and something follows."""
    place = 0
    for _ in range(text[:-1].count(ids[-1])):
        place = text.index(ids[-1], place) + 1
        length = 1
        while length < min(LONGEST_MATCH, place, len(ids)) and text[place - 1 - length] == ids[-1 - length]:
            length += 1
        yield length, place
