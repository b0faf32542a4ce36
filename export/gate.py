"""The gate: torch, ONNX float32 and the exported files are compared on held-out samples before anything is kept.

Every sample is a question with its reference answer. The distributions compared are those that predict the tokens
of the reference, with the memories that torch retrieved; `answers_equal` is free generation, each side with its own
retrieval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from tinyalign_edge.bundle import Component, GateResult
from tinyalign_edge.data import Turn
from tinyalign_edge.errors import GateError
from tinyalign_edge.evaluate import normalize
from tinyalign_edge.export.distances import Floats, divergences, log_softmax, row_cosines
from tinyalign_edge.export.expected import Expected
from tinyalign_edge.memory import latents_of
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

    kl: list[float] = field(default_factory=list)
    decoder_kl: list[float] = field(default_factory=list)
    agree: list[bool] = field(default_factory=list)
    nll: list[tuple[float, float]] = field(default_factory=list)  # torch, exported
    visual_cosine: list[float] = field(default_factory=list)
    memory_cosine: list[float] = field(default_factory=list)
    value_cosine: list[float] = field(default_factory=list)
    equal: list[bool] = field(default_factory=list)


class Gate:
    """Compares bundles with torch on samples.

    Args:
        fp32: the bundle in float32; not needed afterwards.
        samples: what torch makes of them.

    Raises:
        GateError: the float32 graphs do not compute what torch computes, so no format can help.
    """

    def __init__(self, fp32: Model, samples: Sequence[Expected]) -> None:
        self._samples = samples
        self._fp32_error = float(np.max([_read_exactly(fp32, sample) for sample in samples]))
        if not self._fp32_error <= MAX_FP32_LOGIT_ERROR:  # not a number fails too
            wrong = failure("fp32 logit error", self._fp32_error)
            raise GateError(f"the graphs do not compute what torch computes: {wrong}")

    def measure(self, exported: Model) -> GateResult:
        """The figures of an open bundle."""
        tally = _Tally()
        with progress("Comparing with torch", len(self._samples)) as advance:
            for sample in self._samples:
                self._compare(tally, exported, sample)
                said = exported.ask(sample.row.path, sample.row.turns[0].question).text
                tally.equal.append(normalize(said) == normalize(sample.answer))
                advance()
        return _result(tally, self._fp32_error)

    def _compare(self, tally: _Tally, exported: Model, sample: Expected) -> None:
        question, answer = sample.row.turns[0].question, sample.row.turns[0].answer
        exact, image = sample.exact_image(), exported.encode(sample.row.path, memories=sample.memories)
        logits, ids = exported.answer_logits(image, question, answer)
        log_p, log_q = log_softmax(sample.logits()), log_softmax(logits)  # (A, V)
        alone = log_softmax(exported.answer_logits(exact, question, answer)[0])
        tally.kl += divergences(log_p, log_q).tolist()
        tally.decoder_kl += divergences(log_p, alone).tolist()
        tally.agree += (log_p.argmax(axis=1) == log_q.argmax(axis=1)).tolist()
        at = np.arange(len(ids))
        tally.nll += zip((-log_p[at, ids]).tolist(), (-log_q[at, ids]).tolist(), strict=True)
        tally.visual_cosine += row_cosines(sample.visual_tokens(), image.visual_tokens).tolist()
        tally.memory_cosine += row_cosines(exact.memory_tokens, image.memory_tokens).tolist()
        if sample.makes_latents:
            made = latents_of(exported.values.make(image.features, [Turn("", answer)]))
            tally.value_cosine += row_cosines(sample.latents().reshape(1, -1), made.reshape(1, -1)).tolist()


def _read_exactly(fp32: Model, sample: Expected) -> float:
    """Keep what the float32 graphs make of the sample's picture; returns the largest error of a logit."""
    image, turn = fp32.encode(sample.row.path, memories=sample.memories), sample.row.turns[0]
    sample.keep_exact(image)
    logits, _ = fp32.answer_logits(image, turn.question, turn.answer)
    return float(np.abs(logits - sample.logits()).max())


def _result(tally: _Tally, fp32_error: float) -> GateResult:
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
    failures = tuple(filter(None, (failure(name, value) for name, value in figures.items())))
    return GateResult(
        passed=not failures,
        failures=failures,
        answers=len(tally.equal),
        tokens=len(nll),
        fp32_max_logit_error=fp32_error,
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


def concerned(result: GateResult) -> frozenset[Component]:
    """The components whose formats are to blame for what failed."""
    of: dict[str, set[Component]] = {
        "visual token cosine": {"vision"},
        "memory token cosine": {"memory"},
        "value cosine": {"vision", "decoder"},  # the picture's features and the text's embeddings
    }
    most_in_decoder = result.decoder_mean_kl >= result.mean_kl / 2
    whole: set[Component] = {"decoder"} if most_in_decoder else {"vision", "memory"}
    names = (next(name for name in LIMITS if failed.startswith(name)) for failed in result.failures)
    return frozenset(chain.from_iterable(of.get(name, whole) for name in names))


def failure(name: str, value: float) -> str:
    """What is wrong with a figure, or nothing; not a number is wrong."""
    sign, limit = LIMITS[name]
    good = value <= limit if sign == "<=" else value >= limit
    return "" if good else f"{name} is {value:.5f}, must be {sign} {limit}"
