"""Training examples whose names are replaced by others, so that a name has to be taken from the memory.

In an episode the answer's name is another one, the same in the row and in its neighbours' texts: what the language
model knows of the old name does not help. Other names of the neighbours are replaced as well, in every second episode
each, so that an unusual word is not always the right one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from tinyalign_edge.data import Row, Turn
from tinyalign_edge.prompt import Prompt

MOST_WORDS = 3  # of a name
COMMON = 0.05  # an answer that more than this share of all questions has is a word (yes, no, a number), not a name
ARTICLES = ("a", "an", "the")
CONSONANTS, VOWELS, ENDS = "bdfgklmnprstvz", "aeiou", ("", "", "n", "r", "s", "l", "t", "k")
WORD = re.compile("[▁Ġ]([a-z]{4,12})")  # how tokenizers write a token that begins a word

Texts = tuple[tuple[int, ...], ...]


class Episodes:
    """Makes episodes of training rows.

    Args:
        share: of the rows that can be one.
        rows: the bank's, by the numbers of their entries.
        answers: all answers of the training rows.
        value_tokens: the most token ids kept of an entry.
        fits: whether a row fits into the context; one that longer names would make too long stays as it is.
    """

    def __init__(
        self,
        share: float,
        rows: Sequence[Row],
        prompt: Prompt,
        answers: Iterable[str],
        *,
        value_tokens: int,
        fits: Callable[[Row], bool],
    ) -> None:
        self.share, self.rows, self.prompt, self.value_tokens, self.fits = share, rows, prompt, value_tokens, fits
        counts = Counter(name.lower() for answer in answers if (name := name_in(answer)))
        self.common = {name for name, count in counts.items() if count > COMMON * counts.total()}
        self.words = sorted(m[1] for token in prompt.tokenizer.get_vocab() if (m := WORD.fullmatch(token)))

    def play(self, row: Row, neighbours: Sequence[int], random: np.random.Generator) -> tuple[Row, Texts | None]:
        """A row with other names, and the token ids of its neighbours' texts with the same ones.

        Where it is no episode, the row as it is and None.
        """
        if random.random() >= self.share or not neighbours:
            return row, None
        said = [self.rows[number].memory_turns for number in neighbours]
        theirs = list(dict.fromkeys(name for about in said for turn in about if (name := self._name(turn))))
        mine = [name for turn in row.turns if (name := self._name(turn)) in theirs]
        if not mine:
            return row, None
        chosen = [name for name in theirs if name == mine[0] or random.random() < 0.5]
        rename = Renaming({name: self._new_name(random) for name in chosen})
        episode = replace(row, turns=tuple(rename.turn(turn) for turn in row.turns))
        if not self.fits(episode):
            return row, None
        alone = random.random() < 0.5
        texts = []
        for about in said:
            renamed = [rename.turn(turn) for turn in about]
            named = [new for old, new in zip(about, renamed, strict=True) if self._name(old) in chosen]
            if alone and named:  # as a device is taught: the text by itself
                renamed = [replace(named[0], question="")]
            texts.append(self.prompt.memory_ids(renamed, self.value_tokens))
        return episode, tuple(texts)

    def _name(self, turn: Turn) -> str:
        name = name_in(turn.answer).lower()
        return "" if name in self.common else name

    def _new_name(self, random: np.random.Generator) -> str:
        return " ".join(self._new_word(random) for _ in range(1 + (random.random() < 0.3)))

    def _new_word(self, random: np.random.Generator) -> str:
        if self.words and random.random() < 0.5:
            return self.words[random.integers(len(self.words))]
        syllables = [_one(CONSONANTS, random) + _one(VOWELS, random) for _ in range(random.integers(2, 4))]
        return "".join(syllables) + _one(ENDS, random)


class Renaming:
    """Replaces names where they stand as whole words."""

    def __init__(self, names: dict[str, str]) -> None:
        self._names = names
        longest_first = sorted(names, key=len, reverse=True)
        self._any = re.compile(rf"\b({'|'.join(map(re.escape, longest_first))})\b", re.IGNORECASE)

    def turn(self, turn: Turn) -> Turn:
        """The turn with other names."""
        return Turn(
            *(self._any.sub(lambda m: self._names.get(m[0].lower(), m[0]), t) for t in (turn.question, turn.answer))
        )


def name_in(answer: str) -> str:
    """The name that a short answer is, without an article; "" for a long one."""
    words = answer.strip().rstrip(".").split()
    if words and words[0].lower() in ARTICLES:
        words = words[1:]
    return " ".join(words) if len(words) <= MOST_WORDS else ""


def _one(of: Sequence[str], random: np.random.Generator) -> str:
    return of[int(random.integers(len(of)))]
