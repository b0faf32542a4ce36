"""`export`: from a checkpoint to a proved bundle."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from tinyalign_edge.bundle import MANIFEST, Manifest, Precision
from tinyalign_edge.data import Row
from tinyalign_edge.export.components import Components, seal, write_bundle
from tinyalign_edge.export.encoder import encoder_graph
from tinyalign_edge.export.gate import MAX_SAMPLES, run_gate
from tinyalign_edge.export.language import check_language
from tinyalign_edge.folders import whole_folder
from tinyalign_edge.runtime.model import Model, load
from tinyalign_edge.runtime.probe import PROBE_FILE, make_probe, write_probe
from tinyalign_edge.train.answer import TorchAnswerer
from tinyalign_edge.train.checkpoint import SAMPLES, Checkpoint, load_checkpoint
from tinyalign_edge.train.samples import HELD_OUT, read_samples


def export(checkpoint_folder: Path, out: Path, *, precision: Precision = "int8") -> Manifest:
    """Write the bundle `out`, once it has been compared with torch on the checkpoint's held-out samples.

    An existing bundle at `out` is replaced, its memory too, and only when the new one is whole.

    Raises:
        InputError: not a checkpoint, or `out` cannot be written.
        UnsupportedError: a language model or encoder that cannot be exported.
        GateError: the exported files do not compute what torch computes; nothing was written.
    """
    checkpoint = load_checkpoint(checkpoint_folder)
    check_language(checkpoint.language.model)
    rows = sample_questions(checkpoint)
    with whole_folder(out, marker=MANIFEST) as folder, tempfile.TemporaryDirectory() as scratch:
        parts = Components(checkpoint, encoder_graph(checkpoint))
        fp32 = _open(parts, Path(scratch), precision="fp32")
        manifest = write_bundle(parts, folder, precision=precision, name=out.name)
        exported = _reopen(manifest, folder)
        gate = run_gate(TorchAnswerer(checkpoint), fp32, exported, rows, precision=precision)
        write_probe(folder, make_probe(exported))
        exported.close()
        fp32.close()
        return seal(manifest, folder, probe_file=PROBE_FILE, gate=gate)


def sample_questions(checkpoint: Checkpoint) -> list[Row]:
    """Held-out samples for the gate: one question a picture first, more of each until there are enough."""
    rows = read_samples(checkpoint.folder / SAMPLES, HELD_OUT)
    most = max((len(row.turns) for row in rows), default=0)
    single = [replace(row, turns=(row.turns[i],)) for i in range(most) for row in rows if i < len(row.turns)]
    if len(rows) >= MAX_SAMPLES:  # a mix of all turns, not the first ones only
        turn = np.random.default_rng(0).integers(0, most, len(rows))
        single = [replace(row, turns=(row.turns[i % len(row.turns)],)) for i, row in zip(turn, rows, strict=True)]
    return single[:MAX_SAMPLES]


def _open(parts: Components, folder: Path, *, precision: Precision) -> Model:
    """A bundle in a scratch folder, opened as an app would."""
    return _reopen(write_bundle(parts, folder, precision=precision, name="scratch"), folder)


def _reopen(manifest: Manifest, folder: Path) -> Model:
    seal(manifest, folder, probe_file=manifest.tokenizer_file, gate=None)
    return load(folder)
