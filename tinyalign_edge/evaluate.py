"""Score answers: exact match, token F1 and the loss of the reference. Every question is asked alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from tinyalign_edge.bundle import MANIFEST
from tinyalign_edge.data import Row, read_rows
from tinyalign_edge.errors import InputError

MemoryMode = Literal["own", "none", "shuffled"]
Z95 = 1.959964


@dataclass(frozen=True)
class Asked:
    """One question, its reference, the answer given, and the loss of the reference (nats, over `tokens` tokens)."""

    question: str
    reference: str
    answer: str
    nll: float
    tokens: int


class Answerer(Protocol):
    """What can be evaluated: a checkpoint in torch, or a bundle."""

    @property
    def has_memory(self) -> bool:
        """Whether there is a memory to be read."""

    def reference_losses(self, rows: Sequence[Row], *, memory: MemoryMode = "own") -> Iterator[tuple[float, int]]:
        """The loss of the first reference of every row, in nats, and over how many tokens; nothing is answered."""

    def ask_all(self, rows: Sequence[Row], *, memory: MemoryMode = "own") -> Iterator[Asked]:
        """The answer to the first question of every row, and the loss of its reference."""


@dataclass(frozen=True)
class Scores:
    """Means over `n` questions; `exact_match_ci95` is the half width of Wilson's 95 % interval.

    `nll_per_token` counts every token of the reference and the one that ends it.
    """

    n: int
    exact_match: float
    exact_match_ci95: float
    token_f1: float
    nll_per_token: float


def evaluate(target: Path, *, data: Path, images: Path, memory: MemoryMode = "own", limit: int | None = None) -> Scores:
    """Ask every question of a conversation file, each alone, of the checkpoint or bundle `target`.

    Args:
        memory: "own" neighbours, "none", or those of another picture ("shuffled"), the control.
        limit: ask only the first questions.

    Raises:
        InputError: `target` is neither a checkpoint nor a bundle, or the data cannot be read.
    """
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}: must be at least 1")
    rows = single_questions(read_rows(data, images), limit)
    return score(open_answerer(target).ask_all(rows, memory=memory))


def open_answerer(target: Path) -> Answerer:
    """Open a bundle or, with the extra `train`, a checkpoint."""
    if (target / MANIFEST).is_file():
        from tinyalign_edge.runtime.answerer import BundleAnswerer
        from tinyalign_edge.runtime.model import load

        return BundleAnswerer(load(target))
    if not target.is_dir():
        raise InputError(f"{target}: no such checkpoint or bundle folder")
    from tinyalign_edge.train.answer import TorchAnswerer
    from tinyalign_edge.train.checkpoint import load_checkpoint

    return TorchAnswerer(load_checkpoint(target))


def normalize(text: str) -> str:
    """Lower case, without punctuation, articles and extra white space."""
    text = re.sub(r"[^\w\s]", "", text.lower())
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over normalised words, as in SQuAD (Rajpurkar et al., 2016)."""
    given, wanted = normalize(answer).split(), normalize(reference).split()
    if not given or not wanted:
        return float(given == wanted)
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted))


def ci95(share: float, n: int) -> float:
    """Half width of the Wilson score interval (Wilson, 1927) of a share among `n`."""
    spread = share * (1 - share) / n + Z95**2 / (4 * n**2)
    return float(Z95 * np.sqrt(spread) / (1 + Z95**2 / n))


def score(asked: Iterable[Asked]) -> Scores:
    """Score a run of questions; at least one."""
    items = list(asked)
    exact = float(np.mean([normalize(item.answer) == normalize(item.reference) for item in items]))
    return Scores(
        n=len(items),
        exact_match=exact,
        exact_match_ci95=ci95(exact, len(items)),
        token_f1=float(np.mean([token_f1(item.answer, item.reference) for item in items])),
        nll_per_token=sum(item.nll for item in items) / sum(item.tokens for item in items),
    )


def single_questions(rows: Sequence[Row], limit: int | None = None) -> list[Row]:
    """A row for every question, so that none sees another's answer; the first `limit` of them."""
    single = [replace(row, turns=(turn,)) for row in rows for turn in row.turns]
    return single[:limit]


def partners(images: Sequence[str]) -> list[int]:
    """For each row the index of a row with another picture, the same for all rows of one picture.

    With a single picture there is no other: the rows keep their own.
    """
    unique = list(dict.fromkeys(images))
    other = {image: unique[(i + max(1, len(unique) // 2)) % len(unique)] for i, image in enumerate(unique)}
    first = {image: i for i, image in reversed(list(enumerate(images)))}
    return [first[other[image]] for image in images]
