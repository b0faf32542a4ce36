"""Guesses at the next tokens, taken from texts that the answer may repeat: memories, question, the answer itself.

Prompt lookup (Saxena, 2023, https://github.com/apoorvumang/prompt-lookup-decoding), with the memories as the texts
that are looked up first. A guess costs nothing to make; a pass that verifies it costs more than a pass over one token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

LONGEST_MATCH = 4
SHORTEST_MATCH = 2  # one token alone repeats by chance; at the beginning of a memory it does not need to be longer
FIRST, MOST = 7, 15  # tokens of a draft: a pass over 8 and one over 16
REST = 4  # passes without a draft after the first one that was wrong from its first token; then twice as many


class Drafts:
    """Proposes continuations of one answer, fewer of them the less they are right.

    Args:
        memories: token ids of texts that an answer may be, the most similar first, with the token that ends an answer.
        prompt: token ids of the question.
    """

    def __init__(self, memories: Sequence[Sequence[int]], prompt: Sequence[int]) -> None:
        self._memories = [list(ids) for ids in memories]
        self._prompt = list(prompt)
        self._length = FIRST
        self._rest, self._pause = 0, REST

    def propose(self, ids: Sequence[int], limit: int) -> list[int]:
        """At most `limit` tokens that may follow the answer's `ids`; none where nothing is alike or it did not pay."""
        if self._rest > 0:
            self._rest -= 1
            return []
        found = self._continuations(list(ids)) if ids else []
        if not found or limit < 1:
            return []
        common, _ = Counter(continuation[0] for continuation in found).most_common(1)[0]
        best = next(continuation for continuation in found if continuation[0] == common)
        return best[: min(self._length, limit)]

    def learn(self, proposed: int, accepted: int) -> None:
        """Take note of how many tokens of a draft were right."""
        if accepted == proposed:
            self._length = min(MOST, 2 * self._length + 1)
        else:
            self._length = max(3, accepted + 1)
        if accepted:
            self._pause = REST
        else:
            self._rest, self._pause = self._pause, 2 * self._pause

    def _continuations(self, ids: list[int]) -> list[list[int]]:
        """What follows the longest match of the end of `ids`, in every place where it does."""
        texts = [*self._memories, self._prompt, ids[:-1]]
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
