"""The gate: torch, ONNX float32 and the exported files are compared on held-out samples before anything is kept.

Every sample is a question with its reference answer. The distributions compared are those that predict the tokens
of the reference, with the memories that torch retrieved; `answers_equal` is free generation, each side with its own
retrieval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinyalign_edge.bundle import GateResult
from tinyalign_edge.data import Row, Turn
from tinyalign_edge.errors import GateError
from tinyalign_edge.evaluate import normalize
from tinyalign_edge.export.distances import Floats, divergences, log_softmax, row_cosines
from tinyalign_edge.export.source import MAX_SAMPLES, Reference
from tinyalign_edge.progress import progress
from tinyalign_edge.runtime.model import Model

MAX_FP32_LOGIT_ERROR = 1e-3
MAX_KL = 0.005
MIN_AGREEMENT = 0.97
MAX_NLL_CHANGE = 0.01
MIN_COSINE = 0.999


@dataclass
class _Tally:
    """What is gathered over the samples."""

    fp32_error: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    decoder_kl: list[float] = field(default_factory=list)
    agree: list[bool] = field(default_factory=list)
    nll: list[tuple[float, float]] = field(default_factory=list)  # torch, exported
    visual_cosine: list[float] = field(default_factory=list)
    memory_cosine: list[float] = field(default_factory=list)
    value_cosine: list[float] = field(default_factory=list)
    equal: list[bool] = field(default_factory=list)


class Gate:
    """Compares a bundle on the first question of each row; torch reads and answers them once."""

    def __init__(self, reference: Reference, fp32: Model, rows: Sequence[Row]) -> None:
        self._torch, self._fp32, self._rows = reference, fp32, rows[:MAX_SAMPLES]
        self._examples = reference.prepare(self._rows).examples
        self._answers = reference.answers(self._examples)

    def measure(self, exported: Model) -> GateResult:
        """The figures of an open bundle.

        Raises:
            GateError: the float32 graphs do not compute what torch computes, so no format can help.
        """
        tally = _Tally()
        with progress("Comparing with torch", len(self._rows)) as advance:
            for row, example, answer in zip(self._rows, self._examples, self._answers, strict=True):
                self._compare(tally, exported, row, example)
                tally.equal.append(normalize(exported.ask(row.path, row.turns[0].question).text) == normalize(answer))
                advance()
        error = float(np.max(tally.fp32_error))
        if not error <= MAX_FP32_LOGIT_ERROR:  # not a number fails too
            raise GateError(f"the graphs do not compute what torch computes: {_failure('fp32 logit error', error)}")
        return _result(tally, len(self._rows))

    def _compare(self, tally: _Tally, exported: Model, row: Row, example: Any) -> None:
        memories = self._torch.memories(example)
        question, answer = row.turns[0].question, row.turns[0].answer
        reference = self._torch.logits(example)  # (A, V)
        own_image, image = (side.encode(row.path, memories=memories) for side in (self._fp32, exported))
        own, ids = self._fp32.answer_logits(own_image, question, answer)
        tally.fp32_error.append(float(np.abs(own - reference).max()))
        log_p, log_q = log_softmax(reference), log_softmax(exported.answer_logits(image, question, answer)[0])
        alone = log_softmax(exported.answer_logits(own_image, question, answer)[0])
        tally.kl += divergences(log_p, log_q).tolist()
        tally.decoder_kl += divergences(log_p, alone).tolist()
        tally.agree += (log_p.argmax(axis=1) == log_q.argmax(axis=1)).tolist()
        at = np.arange(len(ids))
        tally.nll += zip((-log_p[at, ids]).tolist(), (-log_q[at, ids]).tolist(), strict=True)
        tally.visual_cosine += row_cosines(self._torch.visual_tokens(example), image.visual_tokens).tolist()
        tally.memory_cosine += row_cosines(own_image.memory_tokens, image.memory_tokens).tolist()
        latents = self._torch.latents(example, answer)
        if latents is not None:
            made = np.asarray(exported.values.make(image.features, [Turn("", answer)]), np.float32)
            tally.value_cosine += row_cosines(latents.reshape(1, -1), made.reshape(1, -1)).tolist()


def _result(tally: _Tally, answers: int) -> GateResult:
    nll = np.array(tally.nll)  # (tokens, 2)
    kl, agreement = float(np.mean(tally.kl)), float(np.mean(tally.agree))
    nll_change = float(nll[:, 1].mean() / nll[:, 0].mean() - 1)
    cosines: Floats = np.array(tally.visual_cosine)
    figures = {
        "mean KL": kl,
        "next-token agreement": agreement,
        "NLL change": abs(nll_change),
        "visual token cosine": float(cosines.mean()),
    }
    memory_cosine = float(np.mean(tally.memory_cosine)) if tally.memory_cosine else None
    if memory_cosine is not None:
        figures["memory token cosine"] = memory_cosine
    value_cosine = float(np.mean(tally.value_cosine)) if tally.value_cosine else None
    if value_cosine is not None:
        figures["value cosine"] = value_cosine
    failures = tuple(filter(None, (_failure(name, value) for name, value in figures.items())))
    return GateResult(
        passed=not failures,
        failures=failures,
        answers=answers,
        tokens=len(nll),
        fp32_max_logit_error=float(np.max(tally.fp32_error)),
        mean_kl=kl,
        decoder_mean_kl=float(np.mean(tally.decoder_kl)),
        top1_agreement=agreement,
        nll_change=nll_change,
        visual_cosine_min=float(cosines.min()),
        visual_cosine_mean=float(cosines.mean()),
        memory_cosine_mean=memory_cosine,
        answers_equal=float(np.mean(tally.equal)),
        value_cosine_mean=value_cosine,
    )


LIMITS: dict[str, tuple[str, float]] = {
    "fp32 logit error": ("<=", MAX_FP32_LOGIT_ERROR),
    "mean KL": ("<=", MAX_KL),
    "next-token agreement": (">=", MIN_AGREEMENT),
    "NLL change": ("<=", MAX_NLL_CHANGE),
    "visual token cosine": (">=", MIN_COSINE),
    "memory token cosine": (">=", MIN_COSINE),
    "value cosine": (">=", MIN_COSINE),
}


def _failure(name: str, value: float) -> str:
    """What is wrong with a figure, or nothing; not a number is wrong."""
    sign, limit = LIMITS[name]
    good = value <= limit if sign == "<=" else value >= limit
    return "" if good else f"{name} is {value:.5f}, must be {sign} {limit}"
