"""Questions asked of a checkpoint, each alone, by greedy generation; only what greedy decoding may get wrong is
generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tinyalign_edge.bench.study.datasets import is_closed
from tinyalign_edge.data import Row
from tinyalign_edge.evaluate import Asked, MemoryMode, score
from tinyalign_edge.train.answer import TorchAnswerer
from tinyalign_edge.train.references import read_references


def ask(answerer: TorchAnswerer, rows: Sequence[Row], *, memory: MemoryMode = "own") -> list[Asked]:
    """The answer to the question of every row, and the loss of its reference, as `TorchAnswerer.ask_all` gives them.

    Where every token of the reference is the likeliest one, greedy decoding gives the reference: only the other
    questions are answered token by token.
    """
    examples = answerer.prepare(rows, memory=memory).examples
    checkpoint = answerer.checkpoint
    references = read_references(checkpoint.model, answerer.collate, examples)
    texts = [checkpoint.prompt.text(list(example.turns[0].answer)) for example in examples]
    open_ones = [i for i, reference in enumerate(references) if not reference.likeliest]
    answers = answerer.answers([examples[i] for i in open_ones])
    texts = [dict(zip(open_ones, answers, strict=True)).get(i, text) for i, text in enumerate(texts)]
    return [
        Asked(row.turns[0].question, row.turns[0].answer, text, reference.nll, reference.tokens)
        for row, text, reference in zip(rows, texts, references, strict=True)
    ]


def summarise(asked: Sequence[Asked]) -> dict[str, Any]:
    """Loss over all questions; scores of the open and of the yes/no questions, as far as there are any."""
    groups = {
        "open": [item for item in asked if not is_closed(item.reference)],
        "yes_no": [item for item in asked if is_closed(item.reference)],
    }
    return {
        "loss": sum(item.nll for item in asked) / sum(item.tokens for item in asked),
        **{name: asdict(score(items)) for name, items in groups.items() if items},
    }
