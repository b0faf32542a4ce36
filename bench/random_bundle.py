"""Models in public shapes with random weights: they say nothing, and cost what the real ones cost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tinyalign_edge.bench.peers.shapes import write_encoder, write_language
from tinyalign_edge.bench.synthetic_keys import stored_spectrum, synthetic_keys
from tinyalign_edge.bundle import Manifest
from tinyalign_edge.demo.dataset import write_dataset
from tinyalign_edge.demo.world import make_scenes
from tinyalign_edge.export.components import Components, seal, write_bundle
from tinyalign_edge.export.language import park
from tinyalign_edge.export.run import ExportOptions
from tinyalign_edge.export.source import checkpoint_source
from tinyalign_edge.memory import Bank, Record, write_bank
from tinyalign_edge.progress import progress
from tinyalign_edge.runtime.model import Model
from tinyalign_edge.runtime.probe import make_probe, write_probe
from tinyalign_edge.train.options import TrainOptions
from tinyalign_edge.train.run import train

PICTURES, HELD_OUT = 24, 8


@dataclass(frozen=True)
class Bundle:
    """What the exporter wrote, and its manifest."""

    folder: Path
    manifest: Manifest

    @property
    def picture(self) -> Path:
        """One of the drawn pictures that it was made with."""
        return next((self.folder.parent / "world" / "images").glob("*.png"))


def random_checkpoint(encoder: str, language: str, folder: Path, *, visual_tokens: int) -> Path:
    """A barely trained checkpoint with a memory of texts, in `folder/checkpoint`; its towers beside it."""
    write_encoder(encoder, folder / "encoder")
    write_language(language, folder / "lm")
    write_dataset(folder / "world", make_scenes(PICTURES, seed=1), make_scenes(HELD_OUT, seed=2), seed=0)
    train(
        data=folder / "world" / "train.json",
        images=folder / "world",
        vision=str(folder / "encoder"),
        lm=str(folder / "lm"),
        out=folder / "checkpoint",
        options=TrainOptions(steps=1, batch_size=2, eval_every=1, visual_tokens=visual_tokens, device="cpu"),
    )
    return folder / "checkpoint"


def random_bundle(encoder: str, language: str, out: Path, *, visual_tokens: int) -> Bundle:
    """A bundle with a memory in these shapes, in `out/bundle`. It was not compared with torch."""
    source = checkpoint_source(random_checkpoint(encoder, language, out, visual_tokens=visual_tokens), None)
    folder = out / "bundle"
    folder.mkdir()
    parts, options = Components(source, source.encoder(), park(source.language, out / "weights")), ExportOptions()
    manifest = write_bundle(parts, folder, plans=options.plans, target=options.target, name=out.name)
    with Model(folder, manifest) as model:
        probe_file = write_probe(folder, make_probe(model))
    return Bundle(folder, seal(replace(manifest, probe_file=probe_file), folder))


def synthetic_bank(folder: Path, manifest: Manifest, entries: int, tokens: int) -> Path:
    """A bank that fits the bundle in the new folder `folder`: keys like those of real pictures, values of so many
    random tokens, and its graph where there are enough entries for one."""
    settings, vocab_size = manifest.memory, manifest.decoder.vocab_size
    write_bank(
        folder,
        synthetic_keys(entries, settings.key_dim, stored_spectrum(), seed=0),
        [Record(f"a picture of thing {i}") for i in range(entries)],
        fingerprint=settings.fingerprint,
        vocab_size=vocab_size,
        token_ids=np.random.default_rng(0).integers(0, vocab_size, (entries, tokens)).tolist(),
    )
    bank = Bank(folder)
    if bank.graph_due:
        with progress("Building the graph", entries) as advance:
            bank.rebuild(advance)
    return folder
