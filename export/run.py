"""`export`: from a checkpoint or a whole vision-language model to a proved bundle."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tinyalign_edge.bundle import MANIFEST, Manifest, Precision
from tinyalign_edge.data import read_rows
from tinyalign_edge.errors import InputError
from tinyalign_edge.export.components import Components, seal, write_bundle
from tinyalign_edge.export.gate import run_gate
from tinyalign_edge.export.language import check_language
from tinyalign_edge.export.source import Source, checkpoint_source, sample_questions
from tinyalign_edge.export.vlm import is_whole_model, vlm_source
from tinyalign_edge.folders import whole_folder
from tinyalign_edge.runtime.model import Model, load
from tinyalign_edge.runtime.probe import PROBE_FILE, make_probe, write_probe


def export(
    folder: Path,
    out: Path,
    *,
    precision: Precision = "int8",
    calibration: Path | None = None,
    images: Path | None = None,
    chat_template: Path | None = None,
) -> Manifest:
    """Write the bundle `out`, once it has been compared with torch on sample pictures and questions.

    An existing bundle at `out` is replaced, its memory too, and only when the new one is whole.

    Args:
        folder: a checkpoint, whose held-out samples are used, or a vision-language model in Hugging Face format.
        calibration: conversations to compare a vision-language model on, their pictures below `images`; without them
            drawn pictures are used.
        chat_template: a Jinja template to use in place of the vision-language model's own.

    Raises:
        InputError: neither a checkpoint nor a model, samples that cannot be read, or `out` cannot be written.
        UnsupportedError: a language model, encoder or whole model that cannot be exported.
        GateError: the exported files do not compute what torch computes; nothing was written.
    """
    source = _open_source(folder, calibration, images, chat_template)
    check_language(source.language)
    with whole_folder(out, marker=MANIFEST) as target, tempfile.TemporaryDirectory() as scratch:
        rows = source.rows(_subfolder(scratch, "samples"))
        parts = Components(source, source.encoder())
        fp32 = _open(parts, _subfolder(scratch, "fp32"), precision="fp32")
        manifest = write_bundle(parts, target, precision=precision, name=out.name)
        exported = _reopen(manifest, target)
        gate = run_gate(source.reference, fp32, exported, rows, precision=precision)
        write_probe(target, make_probe(exported))
        exported.close()
        fp32.close()
        return seal(manifest, target, probe_file=PROBE_FILE, gate=gate)


def _open_source(folder: Path, calibration: Path | None, images: Path | None, chat_template: Path | None) -> Source:
    if (calibration is None) != (images is None):
        raise InputError("--calibration and --images: give both, a conversation file and the folder of its pictures")
    if is_whole_model(folder):
        rows = sample_questions(read_rows(calibration, images)) if calibration and images else None
        return vlm_source(folder, rows=rows, chat_template=chat_template)
    if calibration or chat_template:
        raise InputError(f"{folder}: --calibration and --chat-template are for whole vision-language models")
    return checkpoint_source(folder)


def _subfolder(scratch: str, name: str) -> Path:
    folder = Path(scratch) / name
    folder.mkdir()
    return folder


def _open(parts: Components, folder: Path, *, precision: Precision) -> Model:
    """A bundle in a scratch folder, opened as an app would."""
    return _reopen(write_bundle(parts, folder, precision=precision, name="scratch"), folder)


def _reopen(manifest: Manifest, folder: Path) -> Model:
    seal(manifest, folder, probe_file=manifest.tokenizer_file, gate=None)
    return load(folder)
