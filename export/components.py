"""Write the graphs and files of a bundle, and the manifest that describes them."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
from tinyalign_edge.config import WITH_LATENTS, write_json
from tinyalign_edge.export.copy_graph import FILE as COPY_FILE
from tinyalign_edge.export.copy_graph import export_copy_head
from tinyalign_edge.export.language import export_language
from tinyalign_edge.export.matrices import Floats
from tinyalign_edge.export.memory_graph import FILE as MEMORY_FILE
from tinyalign_edge.export.memory_graph import export_memory_connector
from tinyalign_edge.export.plan import PRECISIONS, Plan, Plans
from tinyalign_edge.export.quantize import quantize_graph
from tinyalign_edge.export.question_graph import FILE as QUESTION_FILE
from tinyalign_edge.export.question_graph import export_question_key
from tinyalign_edge.export.smooth import Factors
from tinyalign_edge.export.source import Source
from tinyalign_edge.export.value_graph import FILE as VALUE_FILE
from tinyalign_edge.export.value_graph import export_value_encoder
from tinyalign_edge.train.checkpoint import MEMORY

ENCODER_FILE = "encoder.onnx"
TOKENIZER_FILE = "tokenizer.json"
TOOLS = ("onnx", "onnxruntime", "optimum-onnx", "torch", "transformers", "usearch")


@dataclass(frozen=True)
class Components:
    """Graphs that do not depend on the formats, made once for all of them."""

    source: Source
    encoder: onnx.ModelProto  # float32
    weights: Mapping[str, Floats] | None  # of the language model; None where torch has to trace it
    smoothing: Factors = field(default_factory=dict)  # of the language model, for plans that are to be smooth
    scales: Floats | None = None  # of an int8 cache; None: it is float32


def write_bundle(parts: Components, folder: Path, *, plans: Plans, target: Target, name: str) -> Manifest:
    """Write a whole bundle but probe, card and manifest into the empty `folder`; returns its manifest so far."""
    source = parts.source
    (folder / TOKENIZER_FILE).write_text(source.tokenizer_json, "utf-8")
    if source.memory is not None:
        shutil.copytree(source.memory.folder / MEMORY, folder / MEMORY_DIR)
        write_component(parts, folder, "memory", plans.memory)
        if source.memory.question_key is not None:
            export_question_key(source.memory.question_key, folder)
        if source.memory.value_encoder is not None:
            export_value_encoder(source.memory.value_encoder, folder, visual_tokens=source.visual_tokens)
    write_component(parts, folder, "vision", plans.vision)
    decoder = _write_decoder(parts, folder, plans.decoder)
    if source.memory is not None and source.memory.copy_head is not None:
        export_copy_head(source.memory.copy_head, folder, vocab_size=decoder.vocab_size)
    longest = min(source.prompt.max_context_tokens, decoder.max_positions)
    return Manifest(
        schema_version=SCHEMA_VERSION,
        name=name,
        image=source.image,
        prompt=replace(source.prompt, max_context_tokens=longest),
        generation=GenerationConfig(),
        vision=VisionBlock(
            file=ENCODER_FILE,
            precision=PRECISIONS[plans.vision.base],
            visual_tokens=source.visual_tokens,
            key_dim=source.key_dim,
            outputs=tuple(output.name for output in parts.encoder.graph.output),
            feature_dim=source.memory.feature_dim if source.memory else 0,
        ),
        decoder=decoder,
        memory=_memory(source),
        tokenizer_file=TOKENIZER_FILE,
        probe_file="",
        target=target,
        given_back=(),
        gate=None,
        licences={part: tower.licence for part, tower in source.towers.items()},
        tool_versions=tool_versions(),
    )


def write_component(parts: Components, folder: Path, component: Component, plan: Plan) -> None:
    """Write one component's graphs and weights in the formats of `plan`; its files in `folder` are overwritten."""
    if component == "vision":
        encoder = quantize_graph(parts.encoder, plan)
        (folder / ENCODER_FILE).write_bytes(encoder.SerializeToString(deterministic=True))
    elif component == "decoder":
        _write_decoder(parts, folder, plan)
    elif parts.source.memory is not None:
        export_memory_connector(parts.source.memory.connector, folder, plan=plan)


def _write_decoder(parts: Components, folder: Path, plan: Plan) -> DecoderBlock:
    return export_language(
        parts.source.language,
        folder,
        plan=plan,
        weights=parts.weights,
        smoothing=parts.smoothing,
        scales=parts.scales,
        hidden=parts.source.memory is not None and parts.source.memory.copy_head is not None,
    )


def seal(manifest: Manifest, folder: Path) -> Manifest:
    """Hash every file and write `bundle.json`, which makes the folder a bundle."""
    manifest = replace(manifest, files=file_entries(folder))
    write_json(folder / MANIFEST, manifest)
    return manifest


def tool_versions() -> dict[str, str]:
    """Versions of this package and of those that shape what it writes."""
    return {"tinyalign-edge": tinyalign_edge.__version__, **{t: importlib.metadata.version(t) for t in TOOLS}}


def _memory(source: Source) -> MemoryBlock:
    if source.memory is None:
        return MemoryBlock(kind="none")
    settings = source.memory.settings
    return MemoryBlock(
        kind=settings.bank_kind,
        k=settings.k,
        floor=settings.floor,
        first=settings.first,
        key_dim=settings.key_dim,
        question_dim=settings.question_dim,
        question_weight=settings.question_weight if settings.question_dim else 0.0,
        value_tokens=settings.value_tokens,
        latents=settings.latents if settings.kind in WITH_LATENTS else 0,
        latent_dim=settings.latent_dim if settings.kind in WITH_LATENTS else 0,
        fingerprint=settings.fingerprint,
        file=MEMORY_FILE,
        question_file=None if source.memory.question_key is None else QUESTION_FILE,
        value_file=None if source.memory.value_encoder is None else VALUE_FILE,
        copy_file=None if source.memory.copy_head is None else COPY_FILE,
        copy_end=settings.copy_end,
        copy_similarity=source.memory.copy_head is not None,
    )
