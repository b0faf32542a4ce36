"""`export`: from a checkpoint to a proved bundle."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from tinyalign_edge.bundle import MANIFEST, GateResult, GivenBack, Manifest, Target
from tinyalign_edge.data import Row, read_rows
from tinyalign_edge.errors import GateError, InputError
from tinyalign_edge.export.architecture import read_architecture
from tinyalign_edge.export.card import write_card
from tinyalign_edge.export.components import Components, seal, write_bundle
from tinyalign_edge.export.encoder import encoder_graph
from tinyalign_edge.export.gate import MAX_SAMPLES, Gate
from tinyalign_edge.export.plan import MAX_LEVELS, Plan, Plans
from tinyalign_edge.export.tune import Tuner
from tinyalign_edge.folders import whole_folder
from tinyalign_edge.runtime.model import Model
from tinyalign_edge.runtime.probe import make_probe, write_probe
from tinyalign_edge.train.answer import TorchAnswerer
from tinyalign_edge.train.checkpoint import SAMPLES, Checkpoint, load_checkpoint
from tinyalign_edge.train.samples import CALIBRATION, HELD_OUT, read_samples

FP32 = Plans(*[Plan("fp32")] * 3)
SHARES = (1.0, 0.5, 0.25, 0.125)  # of what the gate allows, given to each component until the whole passes


@dataclass(frozen=True)
class ExportOptions:
    """In which formats and for whom.

    Attributes:
        precision: of all components, before anything is given back; "fp32" leaves all others without effect.
        lm_bits: of the language model's weights; 4 keeps activations and the rest as with 8 weight-only bits.
        target: the processors whose int8 products must be exact.
        allow_degraded: write a bundle that fails the gate, and mark it.
        calibration, images: rows to find the formats on, instead of the checkpoint's own.
    """

    precision: Literal["int8", "fp32"] = "int8"
    lm_bits: Literal[4, 8] = 8
    target: Target = "vnni"
    allow_degraded: bool = False
    calibration: Path | None = None
    images: Path | None = None

    @property
    def plans(self) -> Plans:
        """The plans before anything is given back."""
        plan = Plan(self.precision, max_level=MAX_LEVELS[self.target])
        small = self.precision == "int8" and self.lm_bits == 4
        return Plans(plan, plan, replace(plan, base="int4_weight") if small else plan)


def export(checkpoint_folder: Path, out: Path, options: ExportOptions | None = None) -> Manifest:
    """Write the bundle `out`, once it has been compared with torch on the checkpoint's held-out samples.

    An existing bundle at `out` is replaced, its memory too, and only when the new one is whole.

    Raises:
        InputError: not a checkpoint, or `out` cannot be written.
        UnsupportedError: a language model or encoder that cannot be exported.
        GateError: the exported files do not compute what torch computes; nothing was written.
    """
    options = options or ExportOptions()
    checkpoint = load_checkpoint(checkpoint_folder)
    read_architecture(checkpoint.language.model.config)  # refuse an unknown family before any long work
    calibration = _calibration(checkpoint, options)
    with whole_folder(out, marker=MANIFEST) as folder, tempfile.TemporaryDirectory() as scratch:
        parts = Components(checkpoint, encoder_graph(checkpoint))
        manifest = write_bundle(parts, Path(scratch), plans=FP32, target=options.target, name="scratch")
        with Model(Path(scratch), manifest) as fp32:
            gate = Gate(TorchAnswerer(checkpoint), fp32, sample_questions(checkpoint))
            manifest = write_bundle(parts, folder, plans=options.plans, target=options.target, name=out.name)
            tuner = Tuner(parts, fp32, folder, manifest, options.plans, calibration)
            result, given_back = _tune(tuner, gate, folder, manifest)
        if not result.passed and not options.allow_degraded:
            raise GateError(
                f"the export does not compute what torch computes: {'; '.join(result.failures)}; "
                "--allow-degraded writes it all the same"
            )
        with Model(folder, manifest) as exported:
            probe_file = write_probe(folder, make_probe(exported))
        manifest = replace(manifest, probe_file=probe_file, gate=result, given_back=given_back)
        write_card(folder, manifest, checkpoint.config)
        return seal(manifest, folder)


def _tune(tuner: Tuner, gate: Gate, folder: Path, manifest: Manifest) -> tuple[GateResult, tuple[GivenBack, ...]]:
    """Give back until the gate passes or nothing more can be given; `folder` holds what was measured last."""

    def measure() -> GateResult:
        with Model(folder, manifest) as exported:
            return gate.measure(exported)

    plans = tuner.find(SHARES[0])
    result = measure()
    for share in SHARES[1:]:
        if result.passed:
            break
        found = tuner.find(share)
        if found != plans:
            plans, result = found, measure()
    return result, tuner.given_back(plans)


def sample_questions(checkpoint: Checkpoint) -> list[Row]:
    """Held-out samples for the gate: one question a picture first, more of each until there are enough."""
    rows = read_samples(checkpoint.folder / SAMPLES, HELD_OUT)
    most = max((len(row.turns) for row in rows), default=0)
    single = [replace(row, turns=(row.turns[i],)) for i in range(most) for row in rows if i < len(row.turns)]
    if len(rows) >= MAX_SAMPLES:  # a mix of all turns, not the first ones only
        turn = np.random.default_rng(0).integers(0, most, len(rows))
        single = [replace(row, turns=(row.turns[i % len(row.turns)],)) for i, row in zip(turn, rows, strict=True)]
    return single[:MAX_SAMPLES]


def _calibration(checkpoint: Checkpoint, options: ExportOptions) -> Sequence[Row]:
    if (options.calibration is None) != (options.images is None):
        raise InputError("--calibration and --images: give both or none")
    if options.calibration is None or options.images is None:
        rows = read_samples(checkpoint.folder / SAMPLES, CALIBRATION)
    else:
        rows = read_rows(options.calibration, options.images)
    if not rows:
        raise InputError("no calibration samples in the checkpoint; give --calibration FILE --images DIR")
    return rows
