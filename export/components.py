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
    Component,
    DecoderBlock,
    GenerationConfig,
    Manifest,
    MemoryBlock,
    Target,
    VisionBlock,
    file_entries,
)
from tinyalign_edge.config import write_json
from tinyalign_edge.export.decoder import export_decoder
from tinyalign_edge.export.memory_graph import FILE as MEMORY_FILE
from tinyalign_edge.export.memory_graph import export_memory_connector
from tinyalign_edge.export.plan import PRECISIONS, Plan, Plans
from tinyalign_edge.export.quantize import quantize_encoder
from tinyalign_edge.train.checkpoint import MEMORY, TOKENIZER, Checkpoint

ENCODER_FILE = "encoder.onnx"
TOKENIZER_FILE = "tokenizer.json"
TOOLS = ("onnx", "onnxruntime", "optimum-onnx", "torch", "transformers", "usearch")


@dataclass(frozen=True)
class Components:
    """Graphs that do not depend on the formats, made once for all of them."""

    checkpoint: Checkpoint
    encoder: onnx.ModelProto  # float32


def write_bundle(parts: Components, folder: Path, *, plans: Plans, target: Target, name: str) -> Manifest:
    """Write a whole bundle but probe, card and manifest into the empty `folder`; returns its manifest so far."""
    checkpoint = parts.checkpoint
    config = checkpoint.config
    shutil.copyfile(checkpoint.folder / TOKENIZER, folder / TOKENIZER_FILE)
    if checkpoint.model.memory_connector is not None:
        shutil.copytree(checkpoint.folder / MEMORY, folder / MEMORY_DIR)
        write_component(parts, folder, "memory", plans.memory)
    write_component(parts, folder, "vision", plans.vision)
    return Manifest(
        schema_version=SCHEMA_VERSION,
        name=name,
        image=config.image,
        prompt=config.prompt,
        generation=GenerationConfig(),
        vision=VisionBlock(
            file=ENCODER_FILE,
            precision=PRECISIONS[plans.vision.base],
            visual_tokens=config.connector.visual_tokens,
            key_dim=config.memory.key_dim,
        ),
        decoder=_write_decoder(parts, folder, plans.decoder),
        memory=_memory(checkpoint),
        tokenizer_file=TOKENIZER_FILE,
        probe_file="",
        target=target,
        given_back=(),
        gate=None,
        licences={"vision": config.vision.licence, "language": config.language.licence},
        tool_versions=tool_versions(),
    )


def write_component(parts: Components, folder: Path, component: Component, plan: Plan) -> None:
    """Write one component's graphs and weights in the formats of `plan`; its files in `folder` are overwritten."""
    if component == "vision":
        encoder = quantize_encoder(parts.encoder, plan)
        (folder / ENCODER_FILE).write_bytes(encoder.SerializeToString(deterministic=True))
    elif component == "decoder":
        _write_decoder(parts, folder, plan)
    elif parts.checkpoint.model.memory_connector is not None:
        export_memory_connector(parts.checkpoint.model.memory_connector, folder, plan=plan)


def _write_decoder(parts: Components, folder: Path, plan: Plan) -> DecoderBlock:
    language = parts.checkpoint.language.model
    weights = {name: tensor.numpy() for name, tensor in language.state_dict().items()}
    return export_decoder(language.config, weights, folder, plan=plan)


def seal(manifest: Manifest, folder: Path) -> Manifest:
    """Hash every file and write `bundle.json`, which makes the folder a bundle."""
    manifest = replace(manifest, files=file_entries(folder))
    write_json(folder / MANIFEST, manifest)
    return manifest


def tool_versions() -> dict[str, str]:
    """Versions of this package and of those that shape what it writes."""
    return {"tinyalign-edge": tinyalign_edge.__version__, **{t: importlib.metadata.version(t) for t in TOOLS}}


def _memory(checkpoint: Checkpoint) -> MemoryBlock:
    settings = checkpoint.config.memory
    if checkpoint.model.memory_connector is None:
        return MemoryBlock(kind="none")
    return MemoryBlock(
        kind=settings.kind,
        k=settings.k,
        floor=settings.floor,
        key_dim=settings.key_dim,
        value_tokens=settings.value_tokens if settings.kind == "tokens" else 0,
        latents=settings.latents if settings.kind == "latents" else 0,
        latent_dim=settings.latent_dim if settings.kind == "latents" else 0,
        fingerprint=settings.fingerprint,
        file=MEMORY_FILE,
    )
