"""Write the graphs and files of a bundle, and the manifest that describes them."""

from __future__ import annotations

import importlib.metadata
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

import tinyalign_edge
from tinyalign_edge.bundle import (
    MANIFEST,
    MEMORY_DIR,
    SCHEMA_VERSION,
    GateResult,
    GenerationConfig,
    Manifest,
    MemoryBlock,
    Precision,
    VisionBlock,
    file_entries,
)
from tinyalign_edge.config import write_json
from tinyalign_edge.export.language import export_language
from tinyalign_edge.export.memory_graph import export_memory_connector
from tinyalign_edge.export.quantize import quantize_encoder
from tinyalign_edge.export.source import Source
from tinyalign_edge.train.checkpoint import MEMORY, Checkpoint

ENCODER_FILE = "encoder.onnx"
TOKENIZER_FILE = "tokenizer.json"
TOOLS = ("onnx", "onnxruntime", "optimum-onnx", "torch", "transformers", "usearch")


@dataclass(frozen=True)
class Components:
    """Graphs that do not depend on the precision, made once for both."""

    source: Source
    encoder: onnx.ModelProto  # float32


def write_bundle(parts: Components, folder: Path, *, precision: Precision, name: str) -> Manifest:
    """Write a whole bundle but the probe and the gate's result into the empty `folder`; returns its manifest."""
    source = parts.source
    encoder = quantize_encoder(parts.encoder) if precision == "int8" else parts.encoder
    (folder / ENCODER_FILE).write_bytes(encoder.SerializeToString(deterministic=True))
    decoder = export_language(source.language, folder, precision=precision)
    (folder / TOKENIZER_FILE).write_text(source.tokenizer_json, "utf-8")
    longest = min(source.prompt.max_context_tokens, decoder.max_positions)
    return Manifest(
        schema_version=SCHEMA_VERSION,
        name=name,
        image=source.image,
        prompt=replace(source.prompt, max_context_tokens=longest),
        generation=GenerationConfig(),
        vision=VisionBlock(
            file=ENCODER_FILE,
            precision=precision,
            visual_tokens=source.visual_tokens,
            key_dim=source.key_dim,
            outputs=("visual_tokens", "key") if source.key_dim else ("visual_tokens",),
        ),
        decoder=decoder,
        memory=_memory(source.checkpoint, folder, precision),
        tokenizer_file=TOKENIZER_FILE,
        probe_file="",
        gate=None,
        licences={part: tower.licence for part, tower in source.towers.items()},
        tool_versions=tool_versions(),
    )


def seal(manifest: Manifest, folder: Path, *, probe_file: str, gate: GateResult | None) -> Manifest:
    """Hash every file and write `bundle.json`, which makes the folder a bundle."""
    manifest = replace(manifest, probe_file=probe_file, gate=gate, files=file_entries(folder))
    write_json(folder / MANIFEST, manifest)
    return manifest


def tool_versions() -> dict[str, str]:
    """Versions of this package and of those that shape what it writes."""
    return {"tinyalign-edge": tinyalign_edge.__version__, **{t: importlib.metadata.version(t) for t in TOOLS}}


def _memory(checkpoint: Checkpoint | None, folder: Path, precision: Precision) -> MemoryBlock:
    if checkpoint is None or checkpoint.model.memory_connector is None:
        return MemoryBlock(kind="none")
    settings, connector = checkpoint.config.memory, checkpoint.model.memory_connector
    shutil.copytree(checkpoint.folder / MEMORY, folder / MEMORY_DIR)
    return MemoryBlock(
        kind=settings.kind,
        k=settings.k,
        floor=settings.floor,
        key_dim=settings.key_dim,
        value_tokens=settings.value_tokens if settings.kind == "tokens" else 0,
        latents=settings.latents if settings.kind == "latents" else 0,
        latent_dim=settings.latent_dim if settings.kind == "latents" else 0,
        fingerprint=settings.fingerprint,
        file=export_memory_connector(connector, folder, precision=precision),
    )
