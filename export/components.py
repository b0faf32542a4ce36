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
from tinyalign_edge.train.checkpoint import MEMORY, TOKENIZER, Checkpoint

ENCODER_FILE = "encoder.onnx"
TOKENIZER_FILE = "tokenizer.json"
TOOLS = ("onnx", "onnxruntime", "optimum-onnx", "torch", "transformers", "usearch")


@dataclass(frozen=True)
class Components:
    """Graphs that do not depend on the precision, made once for both."""

    checkpoint: Checkpoint
    encoder: onnx.ModelProto  # float32


def write_bundle(parts: Components, folder: Path, *, precision: Precision, name: str) -> Manifest:
    """Write a whole bundle but the probe and the gate's result into the empty `folder`; returns its manifest."""
    checkpoint = parts.checkpoint
    config = checkpoint.config
    encoder = quantize_encoder(parts.encoder) if precision == "int8" else parts.encoder
    (folder / ENCODER_FILE).write_bytes(encoder.SerializeToString(deterministic=True))
    decoder = export_language(checkpoint.language.model, folder, precision=precision)
    shutil.copyfile(checkpoint.folder / TOKENIZER, folder / TOKENIZER_FILE)
    return Manifest(
        schema_version=SCHEMA_VERSION,
        name=name,
        image=config.image,
        prompt=replace(config.prompt, max_context_tokens=min(config.prompt.max_context_tokens, decoder.max_positions)),
        generation=GenerationConfig(),
        vision=VisionBlock(
            file=ENCODER_FILE,
            precision=precision,
            visual_tokens=config.connector.visual_tokens,
            key_dim=config.memory.key_dim,
        ),
        decoder=decoder,
        memory=_memory(checkpoint, folder, precision),
        tokenizer_file=TOKENIZER_FILE,
        probe_file="",
        gate=None,
        licences={"vision": config.vision.licence, "language": config.language.licence},
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


def _memory(checkpoint: Checkpoint, folder: Path, precision: Precision) -> MemoryBlock:
    settings, connector = checkpoint.config.memory, checkpoint.model.memory_connector
    if connector is None:
        return MemoryBlock(kind="none")
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
