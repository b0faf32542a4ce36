"""A tiny language model in int8: as it is, and with the formats that `export`'s search finds for it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from transformers import PreTrainedModel

from tinyalign_edge.bench.models.compare import onnx_logits, torch_logits
from tinyalign_edge.errors import UnsupportedError
from tinyalign_edge.export.distances import divergences, log_softmax
from tinyalign_edge.export.families import read_architecture
from tinyalign_edge.export.gate import MAX_KL, failure
from tinyalign_edge.export.language import export_language
from tinyalign_edge.export.matrices import find_matrices
from tinyalign_edge.export.plan import Plan, matrix_bytes
from tinyalign_edge.export.processor import own_plan
from tinyalign_edge.export.run import SHARES
from tinyalign_edge.export.search import search
from tinyalign_edge.export.sensitivity import decoder_feed, relative_errors
from tinyalign_edge.export.smooth import Factors, smoothing_factors
from tinyalign_edge.runtime.decoder import Decoder

Text = Callable[[int], list[int]]  # a seed to the token ids of a text

CALIBRATION, HELD_OUT = (2, 3), (1, 4, 5, 6)  # seeds


@dataclass(frozen=True)
class Figures:
    """The gate's figures of a language model, over all positions of the held-out texts (all of one length)."""

    kl: float
    agreement: float
    nll_change: float

    @property
    def failures(self) -> tuple[str, ...]:
        """What the gate says against them."""
        named = {
            "mean KL": self.kl,
            "next-token agreement": self.agreement,
            "NLL change": abs(self.nll_change),
        }
        return tuple(filter(None, (failure(name, value) for name, value in named.items())))


@dataclass(frozen=True)
class Tuned:
    """A model in int8. `growth` is what the matrices grew by, as a share of their bytes in int8."""

    plain: Figures  # nothing given back, nothing folded
    found: Figures
    smoothed: bool
    matrices: int
    given_back: int
    growth: float


def tune(model: PreTrainedModel, text: Text) -> Tuned:
    """Find formats on calibration texts as `export` does, and measure on held-out ones."""
    with tempfile.TemporaryDirectory() as scratch:
        return _tune(model, text, Path(scratch))


def _tune(model: PreTrainedModel, text: Text, scratch: Path) -> Tuned:
    exact = _write(model, scratch / "exact", Plan("fp32"))
    calibration, held_out = ([text(seed) for seed in seeds] for seeds in (CALIBRATION, HELD_OUT))
    feeds = [decoder_feed(exact.block, exact.embed(ids), len(ids)) for ids in calibration]
    log_p = [log_softmax(onnx_logits(exact, ids, [len(ids)])) for ids in calibration]
    matrices = find_matrices(onnx.load(scratch / "exact" / exact.block.file, load_external_data=False))
    factors = _factors(model, scratch / "exact" / exact.block.file, feeds)

    def written(plan: Plan) -> Decoder:
        return _write(model, scratch / "written", plan, factors)

    def loss(plan: Plan) -> float:
        decoder = written(plan)
        logits = [onnx_logits(decoder, ids, [len(ids)]) for ids in calibration]
        return float(np.mean([divergences(p, log_softmax(q)) for p, q in zip(log_p, logits, strict=True)]))

    def ranking(base: Plan) -> list[str]:
        file = written(base).block.file
        _write(model, scratch / "same", Plan("fp32", smooth=base.smooth), factors)
        errors = relative_errors(scratch / "same" / file, scratch / "written" / file, feeds)
        return sorted(errors, key=lambda name: -errors[name])

    remembered = _remember(loss)
    plain = own_plan("int8")
    bases = [plain, replace(plain, smooth=True)] if factors else [plain]
    for share in SHARES:
        limit, base = share * MAX_KL, min(bases, key=remembered)
        plan = base if remembered(base) <= limit else search(base, ranking(base), matrices, remembered, limit)
        found = _figures(model, written(plan), held_out)
        if not found.failures:
            break
    sizes = [
        sum(matrix_bytes(m.rows, m.columns, kind.format(name)) for name, m in matrices.items())
        for kind in (plain, plan)
    ]
    return Tuned(
        plain=_figures(model, written(plain), held_out),
        found=found,
        smoothed=plan.smooth,
        matrices=len(matrices),
        given_back=len(plan.given_back),
        growth=sizes[1] / sizes[0] - 1,
    )


def _write(model: PreTrainedModel, folder: Path, plan: Plan, factors: Factors | None = None) -> Decoder:
    folder.mkdir(exist_ok=True)
    return Decoder(folder, export_language(model, folder, plan=plan, smoothing=factors), threads=1)


def _factors(model: PreTrainedModel, decoder: Path, feeds: list[dict[str, NDArray[Any]]]) -> Factors:
    try:
        return smoothing_factors(read_architecture(model.config), decoder, feeds)
    except UnsupportedError:  # traced: which weight makes which channel is not known
        return {}


def _figures(model: PreTrainedModel, decoder: Decoder, texts: list[list[int]]) -> Figures:
    p = np.concatenate([log_softmax(torch_logits(model, ids)) for ids in texts])
    q = np.concatenate([log_softmax(onnx_logits(decoder, ids, [len(ids)])) for ids in texts])
    ids = np.concatenate([np.roll(text, -1) for text in texts])  # the next token; of the last position the first
    at = np.arange(len(ids))
    return Figures(
        kl=float(divergences(p, q).mean()),
        agreement=float((p.argmax(axis=1) == q.argmax(axis=1)).mean()),
        nll_change=float(q[at, ids].mean() / p[at, ids].mean() - 1),
    )


def _remember(loss: Callable[[Plan], float]) -> Callable[[Plan], float]:
    """A plan is measured once: the search asks again."""
    known: dict[str, float] = {}

    def measured(plan: Plan) -> float:
        if repr(plan) not in known:
            known[repr(plan)] = loss(plan)
        return known[repr(plan)]

    return measured
