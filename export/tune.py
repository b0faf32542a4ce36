"""Find in which format each component's matrices have to be, on calibration samples."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from transformers import PretrainedConfig

from tinyalign_edge.bundle import Component, GivenBack, Manifest
from tinyalign_edge.data import Row
from tinyalign_edge.errors import UnsupportedError
from tinyalign_edge.export.components import Components, write_component
from tinyalign_edge.export.distances import divergences, log_softmax, row_cosines
from tinyalign_edge.export.families import read_architecture
from tinyalign_edge.export.gate import MAX_KL, MIN_COSINE
from tinyalign_edge.export.matrices import Floats, Matrix, find_matrices
from tinyalign_edge.export.plan import Plan, Plans, matrix_bytes
from tinyalign_edge.export.search import search
from tinyalign_edge.export.sensitivity import Feed, decoder_feed, relative_errors
from tinyalign_edge.export.smooth import Factors, smoothing_factors
from tinyalign_edge.image import open_image, preprocess
from tinyalign_edge.progress import progress
from tinyalign_edge.runtime.model import Model
from tinyalign_edge.runtime.sight import EncodedImage

SAMPLES = 16
MAX_ANSWER_TOKENS = 16  # of a sample: their distributions over the vocabulary are kept
RANKING_SAMPLES = 4
LIMITS: dict[Component, float] = {"vision": 1 - MIN_COSINE, "memory": 1 - MIN_COSINE, "decoder": MAX_KL}


@dataclass(frozen=True)
class Sample:
    """A question as the float32 graphs read and answer it."""

    row: Row
    image: EncodedImage
    memory_inputs: Feed  # from the float32 embedding table
    embeddings: Floats  # (T, D): all that the language model reads
    log_p: Floats  # (A, V) of the reference's first tokens


class Tuner:
    """Writes components into a bundle's folder in one plan after another and measures them.

    Args:
        parts: what is written.
        exact: the folder of the same bundle in float32.
        folder, manifest: the bundle, written in the plans `base` already.
        samples: as `calibration_samples` gives them.
    """

    def __init__(
        self, parts: Components, exact: Path, folder: Path, manifest: Manifest, base: Plans, samples: Sequence[Sample]
    ) -> None:
        self._exact, self._folder, self._manifest, self._base = exact, folder, manifest, base
        self._samples = samples
        self._parts = replace(parts, smoothing=self._smoothing(parts.source.language.config))
        self._losses: dict[tuple[Component, str], float] = {}
        self._rankings: dict[Component, list[str]] = {}
        present: list[Component] = ["vision", "memory", "decoder"]
        self._components: list[Component] = present if manifest.memory.file is not None else ["vision", "decoder"]
        self._written = {component: _key(base.of(component)) for component in present}

    def find(self, share: float, *, below: Plans | None = None, of: Collection[Component] = ()) -> Plans:
        """Plans whose components lose at most `share` of what the gate allows, the components `of` also at most that
        share of what they lose in the plans `below`; the folder holds them afterwards."""
        found = self._base
        with progress("Finding formats", None) as advance:
            for component in self._components:
                limit = LIMITS[component]
                if below is not None and component in of:
                    limit = min(limit, self._loss(component, below.of(component)))
                plan = self._find(component, share * limit, advance)
                self._write(component, plan)
                found = replace(found, **{component: plan})
        return found

    def given_back(self, plans: Plans) -> tuple[GivenBack, ...]:
        """What `plans` give back in each component, by node name, with the bytes it takes beyond the base."""
        entries = []
        for component in self._components:
            plan = plans.of(component)
            matrices = self._matrices(component) if plan.given_back else {}
            for name, kind in sorted(plan.given_back.items()):
                rows, columns = matrices[name].rows, matrices[name].columns
                extra = matrix_bytes(rows, columns, kind) - matrix_bytes(rows, columns, plan.base)
                entries.append(GivenBack(component, name, kind, extra))
        return tuple(entries)

    def _find(self, component: Component, limit: float, advance: Callable[..., None]) -> Plan:
        def loss(plan: Plan) -> float:
            found = self._loss(component, plan)
            advance(note=f"{component}, loss {found:.4f}")
            return found

        base = min(self._bases(component), key=loss)
        if base.base == "fp32" or loss(base) <= limit:
            return base
        return search(base, self._ranking(component, base), self._matrices(component), loss, limit)

    def _bases(self, component: Component) -> list[Plan]:
        """What the search begins with: the plan that was asked for, and the same with outliers folded away."""
        base = self._base.of(component)
        smooth = component == "decoder" and base.base != "fp32" and self._parts.smoothing
        return [base, replace(base, smooth=True)] if smooth else [base]

    def _smoothing(self, config: PretrainedConfig) -> Factors:
        try:
            arch = read_architecture(config)
        except UnsupportedError:  # traced: which weight makes which channel is not known
            return {}
        exact = replace(self._manifest.decoder, kv="fp32")
        feeds = [decoder_feed(exact, sample.embeddings, 1) for sample in self._samples]
        return smoothing_factors(arch, self._exact / exact.file, feeds)

    def _reading(self, component: Component) -> list[Sample]:
        """The samples that the component reads: a memory may be silent on some."""
        return [sample for sample in self._samples if component != "memory" or sample.image.memories]

    def _matrices(self, component: Component) -> dict[str, Matrix]:
        """The matrices of a component by node name."""
        return find_matrices(onnx.load(self._exact / self._file(component), load_external_data=False))

    def _file(self, component: Component) -> str:
        files = {"vision": self._manifest.vision.file, "decoder": self._manifest.decoder.file}
        return files.get(component, str(self._manifest.memory.file))

    def _write(self, component: Component, plan: Plan) -> None:
        if self._written[component] != _key(plan):
            write_component(self._parts, self._folder, component, plan)
            self._written[component] = _key(plan)

    def _loss(self, component: Component, plan: Plan) -> float:
        key = component, _key(plan)
        if key not in self._losses:
            self._write(component, plan)
            with Model(self._folder, self._manifest) as model:
                losses = [MEASURES[component](model, sample) for sample in self._reading(component)]
            self._losses[key] = float(np.mean(losses)) if losses else 0.0
        return self._losses[key]

    def _ranking(self, component: Component, base: Plan) -> list[str]:
        """Node names, the one that adds the largest error first."""
        if component not in self._rankings:
            self._write(component, base)
            with Model(self._folder, self._manifest) as model:
                feeds = [FEEDS[component](model, sample) for sample in self._reading(component)[:RANKING_SAMPLES]]
            with tempfile.TemporaryDirectory(dir=self._exact.parent) as scratch:
                exact = self._exact
                if base.smooth:
                    exact = Path(scratch)
                    write_component(self._parts, exact, component, Plan("fp32", smooth=True))
                file = self._file(component)
                errors = relative_errors(exact / file, self._folder / file, feeds)
            self._rankings[component] = sorted(errors, key=lambda name: -errors[name])
        return self._rankings[component]


def _key(plan: Plan) -> str:
    return repr((plan.base, plan.max_level, plan.smooth, sorted(plan.given_back.items())))


def calibration_samples(fp32: Model, rows: Sequence[Row]) -> list[Sample]:
    """The first question of each of the first `SAMPLES` rows."""
    return [_sample(fp32, row) for row in rows[:SAMPLES]]


def _sample(fp32: Model, row: Row) -> Sample:
    turn = row.turns[0]
    image = replace(
        fp32.encode(row.path, question=turn.question), encoder="", searched=None
    )  # read by other models, as it is
    logits, _ = fp32.answer_logits(image, turn.question, turn.answer)
    embeddings, _ = fp32.answer_embeddings(image, turn.question, turn.answer)
    inputs = fp32.memory_inputs(image.memories) if image.memories else {}
    return Sample(row, image, inputs, embeddings, log_softmax(logits[:MAX_ANSWER_TOKENS]).astype(np.float32))


def _decoder_loss(model: Model, sample: Sample) -> float:
    turn = sample.row.turns[0]
    logits, _ = model.answer_logits(sample.image, turn.question, turn.answer)
    return float(divergences(sample.log_p, log_softmax(logits[:MAX_ANSWER_TOKENS])).mean())


def _vision_loss(model: Model, sample: Sample) -> float:
    found = model.encode(sample.row.path, memories=()).visual_tokens
    return 1 - float(row_cosines(found, sample.image.visual_tokens).mean())


def _memory_loss(model: Model, sample: Sample) -> float:
    found = model.connect(sample.memory_inputs)
    return 1 - float(row_cosines(found, sample.image.memory_tokens).mean())


def _decoder_inputs(model: Model, sample: Sample) -> Feed:
    turn = sample.row.turns[0]
    embeddings, ids = model.answer_embeddings(sample.image, turn.question, turn.answer)
    return decoder_feed(model.manifest.decoder, embeddings, len(ids))


def _vision_inputs(model: Model, sample: Sample) -> Feed:
    return {"pixel_values": preprocess(open_image(sample.row.path), model.manifest.image)}


def _memory_inputs(_: Model, sample: Sample) -> Feed:
    return sample.memory_inputs


MEASURES: dict[Component, Callable[[Model, Sample], float]] = {
    "vision": _vision_loss,
    "memory": _memory_loss,
    "decoder": _decoder_loss,
}
FEEDS: dict[Component, Callable[[Model, Sample], Feed]] = {
    "vision": _vision_inputs,
    "memory": _memory_inputs,
    "decoder": _decoder_inputs,
}
