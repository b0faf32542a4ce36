"""`export`: from a checkpoint or a whole vision-language model to a proved bundle."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from tinyalign_edge.bundle import MANIFEST, CachePrecision, Component, GateResult, Manifest, Target
from tinyalign_edge.data import Row, read_rows
from tinyalign_edge.errors import GateError, InputError, UnsupportedError
from tinyalign_edge.export.cache_scales import cache_scales
from tinyalign_edge.export.card import write_card
from tinyalign_edge.export.components import Components, seal, write_bundle
from tinyalign_edge.export.expected import ask_torch
from tinyalign_edge.export.families import read_architecture
from tinyalign_edge.export.gate import Gate, concerned
from tinyalign_edge.export.language import check_language, park
from tinyalign_edge.export.plan import MAX_LEVELS, Plan, Plans
from tinyalign_edge.export.processor import own_target
from tinyalign_edge.export.source import Source, checkpoint_source, sample_questions
from tinyalign_edge.export.tune import SAMPLES, Tuner, calibration_samples
from tinyalign_edge.export.vlm import vlm_source
from tinyalign_edge.folders import whole_folder
from tinyalign_edge.runtime.decoder import missing_for_cache
from tinyalign_edge.runtime.model import Model
from tinyalign_edge.runtime.probe import make_probe, write_probe
from tinyalign_edge.train.vlm import is_whole_model
from tinyalign_edge.train.vlm_prompt import read_template

FP32 = Plans(*[Plan("fp32")] * 3)
SHARES = (1.0, 0.5, 0.25, 0.125)  # of what the gate allows, given to each component until the whole passes


@dataclass(frozen=True)
class ExportOptions:
    """In which formats and for whom.

    Attributes:
        precision: of all components, before anything is given back; with "fp32", `lm_bits` and `target` have no effect.
        lm_bits: of the language model's weights; 4 keeps activations and the rest as with 8 weight-only bits.
        target: the processors whose int8 products must be exact; without, those like this one.
        kv: of the cache of keys and values.
        allow_degraded: write a bundle that fails the gate, and mark it.
        calibration, images: rows to find the formats on, instead of the checkpoint's own; a whole model, which has no
            samples of its own, is compared with torch on them too.
        chat_template: a Jinja file to use in place of a whole model's own.
    """

    precision: Literal["int8", "fp32"] = "int8"
    lm_bits: Literal[4, 8] = 8
    target: Target = field(default_factory=own_target)
    kv: CachePrecision = "fp32"
    allow_degraded: bool = False
    calibration: Path | None = None
    images: Path | None = None
    chat_template: Path | None = None

    @property
    def plans(self) -> Plans:
        """The plans before anything is given back."""
        plan = Plan(self.precision, max_level=MAX_LEVELS[self.target])
        small = self.precision == "int8" and self.lm_bits == 4
        return Plans(plan, plan, replace(plan, base="int4_weight") if small else plan)


def export(folder: Path, out: Path, options: ExportOptions | None = None) -> Manifest:
    """Write the bundle `out`, once it has been compared with torch on sample pictures and questions.

    An existing bundle at `out` is replaced, its memory too, and only when the new one is whole.

    Args:
        folder: a checkpoint, whose held-out samples are used, or a vision-language model in Hugging Face format.

    Raises:
        InputError: neither a checkpoint nor a model, samples that cannot be read, or `out` cannot be written.
        UnsupportedError: a language model, encoder or whole model that cannot be exported.
        GateError: the exported files do not compute what torch computes; nothing was written.
    """
    options = options or ExportOptions()
    if lacking := missing_for_cache(options.kv):
        raise UnsupportedError(f"an {lacking}, or use --kv fp32")
    source = _open_source(folder, options)
    check_language(source.language, kv=options.kv)
    with (  # beside the bundle, since the system's own folder is often small, or in memory
        whole_folder(out, marker=MANIFEST) as target,
        tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch,
    ):
        rows = source.rows(_subfolder(scratch, "samples"))
        if not rows:
            raise GateError(f"{folder}: no held-out samples, so nothing can be proved; train on at least 10 pictures")
        calibration, rows = (source.calibration, rows) if source.calibration else _divide(rows)
        expected = ask_torch(source.reference, rows, _subfolder(scratch, "expected"))
        weights = park(source.language, Path(scratch) / "weights")  # torch has said all that it is asked
        parts = Components(source, source.encoder(), weights)
        fp32_folder = _subfolder(scratch, "fp32")
        manifest = write_bundle(parts, fp32_folder, plans=FP32, target=options.target, name="scratch")
        with Model(fp32_folder, manifest) as fp32:
            gate = Gate(fp32, expected)
            samples = calibration_samples(fp32, calibration)
            if options.kv == "int8":
                arch = read_architecture(source.language.config)
                parts = replace(parts, scales=cache_scales(arch, fp32.decoder, (s.embeddings for s in samples)))
        manifest = write_bundle(parts, target, plans=options.plans, target=options.target, name=out.name)
        tuner = Tuner(parts, fp32_folder, target, manifest, options.plans, samples)
        result, plans = _tune(tuner, gate, target, manifest)
        given_back = tuner.given_back(plans)
        if not result.passed and not options.allow_degraded:
            raise GateError(
                f"the export does not compute what torch computes: {'; '.join(result.failures)}; "
                f"{'--kv fp32 loses less, ' if options.kv == 'int8' else ''}--allow-degraded writes it all the same"
            )
        with Model(target, manifest) as exported:
            probe_file = write_probe(target, make_probe(exported))
        decoder = replace(manifest.decoder, smoothed=plans.decoder.smooth)
        manifest = replace(manifest, decoder=decoder, probe_file=probe_file, gate=result, given_back=given_back)
        write_card(target, manifest, source.towers)
        return seal(manifest, target)


def _open_source(folder: Path, options: ExportOptions) -> Source:
    if (options.calibration is None) != (options.images is None):
        raise InputError("--calibration and --images: give both, a conversation file and the folder of its pictures")
    rows = read_rows(options.calibration, options.images) if options.calibration and options.images else None
    if is_whole_model(folder):
        template = read_template(options.chat_template) if options.chat_template else None
        return vlm_source(folder, rows=rows and sample_questions(rows), template=template)
    if options.chat_template:
        raise InputError(f"{folder}: --chat-template is for whole vision-language models; a checkpoint has its own")
    return checkpoint_source(folder, rows)


def _divide(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Rows to find the formats on and rows for the gate: apart where there are enough of them."""
    return (rows[:SAMPLES], rows[SAMPLES:]) if len(rows) >= 4 * SAMPLES else (rows, rows)


def _subfolder(scratch: str, name: str) -> Path:
    folder = Path(scratch) / name
    folder.mkdir()
    return folder


def _tune(tuner: Tuner, gate: Gate, folder: Path, manifest: Manifest) -> tuple[GateResult, Plans]:
    """Give back until the gate passes or nothing more can be given; `folder` holds what was measured last.

    What was to blame once stays so, or a later round would undo what mended it.
    """

    def measure() -> GateResult:
        with Model(folder, manifest) as exported:
            return gate.measure(exported)

    first = plans = tuner.find(SHARES[0])
    result = measure()
    blamed: frozenset[Component] = frozenset()
    for share in SHARES[1:]:
        if result.passed:
            break
        blamed |= concerned(result)
        found = tuner.find(share, below=first, of=blamed)
        if found != plans:
            plans, result = found, measure()
    return result, plans
