"""Reference answers read in one pass: their losses, and whether greedy decoding would give them word for word."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from tinyalign_edge.train.batches import Collate, Example
from tinyalign_edge.train.model import IGNORED, AlignModel

PASS = 32  # pictures a pass


@dataclass(frozen=True)
class Reference:
    """What the model makes of one reference answer.

    Attributes:
        nll: negative log-likelihood in nats, over `tokens` tokens, the one that ends the answer among them.
        likeliest: every token is the likeliest after those before it, so that greedy decoding gives this answer.
    """

    nll: float
    tokens: int
    likeliest: bool


def read_references(model: AlignModel, collate: Collate, examples: Sequence[Example]) -> list[Reference]:
    """The reference of the one turn of every example, in their order.

    Examples with the same picture and neighbours share a row of a pass, in which no turn sees another.
    """
    together: dict[tuple[object, ...], list[int]] = {}
    for i, example in enumerate(examples):
        shared = (example.before, example.features.tobytes(), example.neighbours, example.similarity)
        together.setdefault(shared, []).append(i)
    found: dict[int, Reference] = {}
    packs = list(together.values())
    for start in range(0, len(packs), PASS):
        some = packs[start : start + PASS]
        rows = [replace(examples[pack[0]], turns=tuple(examples[i].turns[0] for i in pack)) for pack in some]
        numbers = [i for pack in some for i in pack]
        found.update(zip(numbers, _read(model, collate, rows), strict=True))
    return [found[i] for i in range(len(examples))]


def _read(model: AlignModel, collate: Collate, rows: Sequence[Example]) -> Iterator[Reference]:
    """One `Reference` a turn."""
    batch = collate(rows)
    labels = batch["labels"][batch["labels"] != IGNORED]
    with torch.inference_mode():
        logits = model.answer_logits(**batch)
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        hits = logits.argmax(dim=-1) == labels
    lengths = [len(turn.answer) for row in rows for turn in row.turns]
    for loss, hit in zip(losses.split(lengths), hits.split(lengths), strict=True):
        yield Reference(float(loss.sum()), len(loss), bool(hit.all()))
