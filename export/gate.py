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
import numpy.typing as npt

from tinyalign_edge.bundle import GateResult, Precision
from tinyalign_edge.data import Row
from tinyalign_edge.errors import GateError
from tinyalign_edge.evaluate import normalize
from tinyalign_edge.export.source import MAX_SAMPLES, Reference
from tinyalign_edge.progress import progress
from tinyalign_edge.runtime.model import Model

Floats = npt.NDArray[np.floating]

FP32_MAX_LOGIT_ERROR = 1e-3
INT8_MAX_KL = 0.005
INT8_MIN_AGREEMENT = 0.97
INT8_MAX_NLL_CHANGE = 0.01
INT8_MIN_COSINE = 0.999


@dataclass
class _Tally:
    """What is gathered over the samples."""

    fp32_error: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    agree: list[bool] = field(default_factory=list)
    nll: list[tuple[float, float]] = field(default_factory=list)  # torch, exported
    cosine: list[float] = field(default_factory=list)
    equal: list[bool] = field(default_factory=list)


def run_gate(
    torch_side: Reference, fp32: Model, exported: Model, rows: Sequence[Row], *, precision: Precision
) -> GateResult:
    """Compare on the first question of each row.

    Raises:
        GateError: a figure is outside its limit; the message names all of them.
    """
    rows = rows[:MAX_SAMPLES]
    if not rows:
        raise GateError("no held-out samples in the checkpoint: nothing can be proved; train on at least 10 pictures")
    tally = _Tally()
    prepared = torch_side.prepare(rows)
    answers = torch_side.answers(prepared.examples)
    with progress("Comparing with torch", len(rows)) as advance:
        for row, example, answer in zip(rows, prepared.examples, answers, strict=True):
            _compare(tally, torch_side, fp32, exported, row, example)
            tally.equal.append(normalize(exported.ask(row.path, row.turns[0].question).text) == normalize(answer))
            advance()
    result = _result(tally, len(rows))
    if failures := _failures(result, precision):
        raise GateError("the export does not compute what torch computes: " + "; ".join(failures))
    return result


def _compare(tally: _Tally, torch_side: Reference, fp32: Model, exported: Model, row: Row, example: Any) -> None:
    memories = torch_side.memories(example)
    question, answer = row.turns[0].question, row.turns[0].answer
    reference = torch_side.logits(example)  # (A, V)
    own, ids = fp32.answer_logits(fp32.encode(row.path, memories=memories), question, answer)
    image = exported.encode(row.path, memories=memories)
    given, _ = exported.answer_logits(image, question, answer)
    tally.fp32_error.append(float(np.abs(own - reference).max()))
    log_p, log_q = log_softmax(reference), log_softmax(given)
    tally.kl += (np.exp(log_p) * (log_p - log_q)).sum(axis=1).tolist()
    tally.agree += (log_p.argmax(axis=1) == log_q.argmax(axis=1)).tolist()
    at = np.arange(len(ids))
    tally.nll += zip((-log_p[at, ids]).tolist(), (-log_q[at, ids]).tolist(), strict=True)
    tally.cosine += _row_cosines(torch_side.visual_tokens(example), image.visual_tokens).tolist()


def _result(tally: _Tally, answers: int) -> GateResult:
    nll = np.array(tally.nll)  # (tokens, 2)
    return GateResult(
        passed=True,
        answers=answers,
        tokens=len(nll),
        fp32_max_logit_error=float(np.max(tally.fp32_error)),  # not a number stays so, and fails
        int8_mean_kl=float(np.mean(tally.kl)),
        int8_top1_agreement=float(np.mean(tally.agree)),
        int8_nll_change=float(nll[:, 1].mean() / nll[:, 0].mean() - 1),
        int8_visual_cosine_min=float(np.min(tally.cosine)),
        int8_visual_cosine_mean=float(np.mean(tally.cosine)),
        answers_equal=float(np.mean(tally.equal)),
    )


def _failures(result: GateResult, precision: Precision) -> list[str]:
    limits = [("fp32 logit error", result.fp32_max_logit_error, "<=", FP32_MAX_LOGIT_ERROR)]
    if precision == "int8":
        limits += [
            ("int8 mean KL", result.int8_mean_kl, "<=", INT8_MAX_KL),
            ("int8 next-token agreement", result.int8_top1_agreement, ">=", INT8_MIN_AGREEMENT),
            ("int8 NLL change", abs(result.int8_nll_change), "<=", INT8_MAX_NLL_CHANGE),
            ("int8 visual token cosine", result.int8_visual_cosine_mean, ">=", INT8_MIN_COSINE),
        ]
    return [
        f"{name} is {value:.5f}, must be {sign} {limit}"
        for name, value, sign, limit in limits
        if not (value <= limit if sign == "<=" else value >= limit)
    ]


def log_softmax(logits: Floats) -> Floats:
    """Log probabilities of logits (A, V), in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _row_cosines(a: Floats, b: Floats) -> Floats:
    return np.asarray((a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)))
