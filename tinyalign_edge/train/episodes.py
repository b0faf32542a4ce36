"""Training examples whose names are replaced by others, so that a name has to be taken from the memory.

In an episode a name that is an answer of the row, and stands in its neighbours' texts, is another one, the same in all
of them: what the language model knows of the old name does not help. Other names are replaced as well, in every second
episode each, so that an unusual word is not always the right one. Turns that a common word answers, such as yes or
no, are left out: they would ask whether the picture shows what nobody has seen. No new name is the word of an answer:
what a neighbour says of its own picture is often not true of this one, and a known word should not be copied for it.
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
PARTS = re.compile(r",\s+")  # a caption may list several names
WORD = re.compile("[▁Ġ]([a-z]{4,12})")  # how tokenizers write a token that begins a word

Texts = tuple[tuple[int, ...], ...]


class Episodes:
    """Makes episodes of training rows.

    Attributes:
        possible: whether an answer is a name; if none is, no row becomes an episode.

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
        self.possible = bool(counts.keys() - self.common)
        vocabulary = {m[1] for token in prompt.tokenizer.get_vocab() if (m := WORD.fullmatch(token))}
        self.words = sorted(vocabulary - {word for name in counts for word in re.findall(r"\w+", name)})

    def play(self, row: Row, neighbours: Sequence[int], random: np.random.Generator) -> tuple[Row, Texts | None]:
        """A row with other names, and the token ids of its neighbours' texts with the same ones.

        Where it is no episode, the row as it is and None.
        """
        if random.random() >= self.share or not neighbours:
            return row, None
        said = [self.rows[number].memory_turns for number in neighbours]
        theirs = self._names(turn for about in said for turn in about)
        asked = [turn for turn in row.turns if name_in(turn.answer).lower() not in self.common]
        mine = _told(self._names(asked), [turn.answer for about in said for turn in about])
        if not mine:
            return row, None
        others = [name for name in dict.fromkeys([*mine, *theirs]) if not _told(mine[:1], [name])]
        chosen = [mine[0], *(name for name in others if random.random() < 0.5)]
        rename = Renaming({name: self._new_name(random) for name in chosen})
        episode = replace(row, turns=tuple(rename.turn(turn) for turn in asked))
        if not self.fits(episode):
            return row, None
        alone = random.random() < 0.5
        texts = []
        for about in said:
            renamed = [rename.turn(turn) for turn in about]
            named = [new for old, new in zip(about, renamed, strict=True) if set(self._names([old])) & set(chosen)]
            if alone and named:  # as a device is taught: the text by itself
                renamed = [replace(named[0], question="")]
            texts.append(self.prompt.memory_ids(renamed, self.value_tokens))
        return episode, tuple(texts)

    def _names(self, turns: Iterable[Turn]) -> list[str]:
        """The names that answers and captions are made of, in lower case, each once."""
        names = (name_in(part).lower() for turn in turns for part in PARTS.split(turn.answer))
        return list(dict.fromkeys(name for name in names if name and name not in self.common))

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
        self._any = _any_of(names)

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


def _told(names: Sequence[str], texts: Sequence[str]) -> list[str]:
    """The names that stand in one of the texts."""
    if not names:
        return []
    found = {match[0].lower() for text in texts for match in _any_of(names).finditer(text)}
    return [name for name in names if name in found]


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Finds names where they stand as whole words, the longest one first."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile(rf"(?<!\w)({'|'.join(map(re.escape, longest_first))})(?!\w)", re.IGNORECASE)


def _one(of: Sequence[str], random: np.random.Generator) -> str:
    return of[int(random.integers(len(of)))]
