"""`train`: from conversation file, pictures and two towers to a checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from tinyalign_edge.config import to_json
from tinyalign_edge.data import Row, read_rows
from tinyalign_edge.memory import Neighbours
from tinyalign_edge.prompt import Prompt
from tinyalign_edge.train.batches import Collate, Example, Rows, Values
from tinyalign_edge.train.checkpoint import METRICS
from tinyalign_edge.train.encode import Encoded, encode_rows
from tinyalign_edge.train.finish import write_checkpoint
from tinyalign_edge.train.loop import fit
from tinyalign_edge.train.model import AlignModel
from tinyalign_edge.train.neighbours import Retrieved, retrieve
from tinyalign_edge.train.options import TrainOptions, check_options, find_device, train_settings
from tinyalign_edge.train.settings import (
    SCHEMA_VERSION,
    CheckpointConfig,
    ConnectorSettings,
    MemorySettings,
    TrainSettings,
)
from tinyalign_edge.train.state import RunState
from tinyalign_edge.train.towers import LanguageTower, VisionTower, image_settings, load_language, load_vision

MAX_HELD_OUT = 256


def train(
    *,
    data: Path,
    images: Path,
    vision: str,
    lm: str,
    out: Path,
    options: TrainOptions | None = None,
    resume: bool = False,
    label: str = "Training",
) -> CheckpointConfig:
    """Train connector, memory connector and value encoder; write a checkpoint to `out`.

    Args:
        data: LLaVA conversations, JSON or JSON lines.
        images: the folder that the rows' `image` is relative to.
        vision: folder or hub id of the vision encoder.
        lm: folder or hub id of the language model.
        out: the checkpoint folder; new, or an interrupted run's with `resume`.

    Raises:
        InputError: wrong input; nothing was written.
        TinyAlignError: training failed; what was reached can be resumed.
    """
    options = options or TrainOptions()
    check_options(options)
    state = RunState(out, resume=resume)
    device = find_device(options.device)
    rows = read_rows(data, images)
    training_rows, held_out_rows = _split(rows, options)
    torch.manual_seed(options.seed)
    eye = load_vision(vision, image=image_settings(vision, options.image_size))
    tongue = load_language(lm)
    run = _Run(out, options, training_rows, held_out_rows, eye, tongue, device)
    settings = train_settings(options, data, images, len(training_rows), device)
    return run.execute(settings, state, label=label)


class _Run:
    """The steps of one training run, each fed by the one before."""

    def __init__(
        self,
        out: Path,
        options: TrainOptions,
        rows: Sequence[Row],
        held_out_rows: Sequence[Row],
        vision: VisionTower,
        language: LanguageTower,
        device: str,
    ) -> None:
        self.out, self.options, self.device = out, options, device
        self.rows, self.held_out_rows = rows, held_out_rows
        self.vision, self.language = vision, language
        self.prompt = Prompt(language.prompt, Tokenizer.from_str(language.tokenizer_json))

    def execute(self, settings: TrainSettings, state: RunState, *, label: str) -> CheckpointConfig:
        connector = self._connector_settings()
        memory = self._memory_settings(connector)
        model = AlignModel(self.language.model, connector, memory)
        seen = encode_rows(
            self.vision.model,
            self.vision.image,
            model,
            [*self.rows, *self.held_out_rows],
            device=self.device,
            dtype=np.float16,  # half the memory; the connector's LayerNorm makes the rounding harmless
        )
        count = len(self.rows)
        state.fit_key(model, seen.regions[:count])
        with torch.inference_mode():
            keys = model.key(torch.from_numpy(seen.regions)).numpy()
        found = retrieve(self.rows, keys[:count], keys[count:], memory)
        memory = replace(memory, floor=found.floor, fingerprint=_fingerprint(self.vision, model))
        values = self._values(seen, memory)
        rows, held_out = self._examples(seen, found, memory, settings, connector)
        config = CheckpointConfig(
            SCHEMA_VERSION, self.vision.ref, self.language.ref, self.vision.image, self.prompt.config,
            connector, memory, settings,
        )  # fmt: skip
        state.begin(config, model)
        collate = Collate(memory, values)
        fit(model, rows, collate, held_out, settings, state=state.folder, metrics=self.out / METRICS,
            resume=state.resume, label=label)  # fmt: skip
        write_checkpoint(self.out, config, model, self.language, rows=self.rows, held_out=self.held_out_rows,
                         keys=keys[:count], values=values)  # fmt: skip
        state.clear()
        return config

    def _connector_settings(self) -> ConnectorSettings:
        height, width, channels = self.vision.grid
        tokens = min(self.options.visual_tokens, height * width)
        return ConnectorSettings(height, width, channels, tokens, self.language.model.config.hidden_size)

    def _memory_settings(self, connector: ConnectorSettings) -> MemorySettings:
        options = self.options
        settings = MemorySettings(kind=options.memory, k=options.k, key_grid=options.key_grid)
        return replace(settings, key_dim=min(settings.key_dim, connector.feature_dim * options.key_grid**2))

    def _values(self, seen: Encoded, memory: MemorySettings) -> Values | None:
        if memory.kind == "none":
            return None
        limit = memory.value_tokens
        ids = [self.prompt.memory_ids(row.memory_turns, limit) for row in self.rows]
        return Values(ids, seen.pooled[: len(self.rows)])

    def _examples(
        self,
        seen: Encoded,
        found: Retrieved,
        memory: MemorySettings,
        settings: TrainSettings,
        connector: ConnectorSettings,
    ) -> tuple[Rows, list[Example]]:
        count = len(self.rows)
        per_entry = memory.latents if memory.kind == "latents" else memory.value_tokens
        reserved = connector.visual_tokens + (0 if memory.kind == "none" else memory.k * per_entry)
        left = self.prompt.config.max_context_tokens - reserved

        def build(rows: Sequence[Row], features: npt.NDArray[Any], near: Neighbours, dropout: float) -> Rows:
            return Rows(rows, self.prompt, features, near.rows, near.similarity, dropout=dropout,
                        seed=settings.seed, max_tokens=left)  # fmt: skip

        training = build(self.rows, seen.pooled[:count], found.training, memory.dropout)
        held_out = build(self.held_out_rows, seen.pooled[count:], found.held_out, 0.0)
        return training, [held_out[i] for i in range(len(held_out))]


def _split(rows: list[Row], options: TrainOptions) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows without a picture in common; the held-out ones do not depend on the fraction."""
    pictures = sorted({row.image for row in rows})
    order = np.random.default_rng(options.seed).permutation(len(pictures))
    held_out_count = min(MAX_HELD_OUT, len(pictures) // 10)
    held = {pictures[i] for i in order[:held_out_count]}
    keep_count = max(1, round((len(pictures) - held_out_count) * options.fraction))
    kept = {pictures[i] for i in order[held_out_count : held_out_count + keep_count]}
    return [row for row in rows if row.image in kept], [row for row in rows if row.image in held]


def _fingerprint(vision: VisionTower, model: AlignModel) -> str:
    """What the keys depend on: the encoder's weights, the preprocessing, the projection."""
    digest = hashlib.sha256(bytes.fromhex(vision.ref.sha256))
    digest.update(json.dumps(to_json(vision.image), sort_keys=True).encode())
    digest.update(model.key.mean.numpy().tobytes() + model.key.axes.numpy().tobytes())
    return digest.hexdigest()
