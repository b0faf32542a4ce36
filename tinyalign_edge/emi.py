"""Effective mutual information (Hu et al., 2025, arXiv 2505.12884) as it can be measured: what picture and memory take
from the loss of held-out answers, in nats per answer token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tinyalign_edge.data import Row, read_rows
from tinyalign_edge.errors import InputError
from tinyalign_edge.evaluate import Answerer, MemoryMode, open_answerer, partners, single_questions


@dataclass(frozen=True)
class Emi:
    """Information about `tokens` answer tokens of `n` questions, each asked alone. All in nats per answer token.

    `nll` is the mean negative log-likelihood of the reference answer. None where the model has no memory.

    Attributes:
        image: nll(another picture) - nll(picture), both without memory.
        memory: nll(picture, no memory) - nll(picture, memory).
        shuffled_memory: nll(picture, no memory) - nll(picture, another picture's memory), the control: of a model that
            was trained with its own memory it is mostly below zero.
    """

    n: int
    tokens: int
    image: float
    memory: float | None
    shuffled_memory: float | None
    nll_other_image: float
    nll_image: float
    nll_memory: float | None
    nll_shuffled_memory: float | None


def emi(target: Path, *, data: Path, images: Path, limit: int | None = None) -> Emi:
    """The EMI of the checkpoint or bundle `target` on a conversation file.

    Raises:
        InputError: `target` is neither, or the data cannot be read or shows one picture alone.
    """
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}: must be at least 1")
    return measure(open_answerer(target), single_questions(read_rows(data, images), limit))


def measure(answerer: Answerer, rows: Sequence[Row]) -> Emi:
    """The EMI of an open checkpoint or bundle on rows of one question each.

    Raises:
        InputError: the rows show one picture alone, which cannot be exchanged for another.
    """
    names = [row.image for row in rows]
    if len(set(names)) < 2:
        raise InputError("--emi: the rows show one picture; it takes others to exchange it for")
    elsewhere = [replace(row, pictures=rows[i].pictures) for row, i in zip(rows, partners(names), strict=True)]
    tokens, other = _nll(answerer, elsewhere, "none")
    _, alone = _nll(answerer, rows, "none")
    own = _nll(answerer, rows, "own")[1] if answerer.has_memory else None
    shuffled = _nll(answerer, rows, "shuffled")[1] if answerer.has_memory else None
    return Emi(
        n=len(rows),
        tokens=tokens,
        image=other - alone,
        memory=None if own is None else alone - own,
        shuffled_memory=None if shuffled is None else alone - shuffled,
        nll_other_image=other,
        nll_image=alone,
        nll_memory=own,
        nll_shuffled_memory=shuffled,
    )


def _nll(answerer: Answerer, rows: Sequence[Row], memory: MemoryMode) -> tuple[int, float]:
    """Answer tokens, and the mean negative log-likelihood of one."""
    found = list(answerer.reference_losses(rows, memory=memory))
    tokens = sum(count for _, count in found)
    return tokens, sum(nll for nll, _ in found) / tokens
