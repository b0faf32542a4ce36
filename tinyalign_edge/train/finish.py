"""What a finished run leaves: the bank with its final values, samples for the exporter, the checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoTokenizer

from tinyalign_edge.data import Row
from tinyalign_edge.memory import Record, write_bank
from tinyalign_edge.train.batches import Collate, Example, Values
from tinyalign_edge.train.checkpoint import CURVES, LANGUAGE_FOLDER, MEMORY, METRICS, SAMPLES, save_checkpoint
from tinyalign_edge.train.curves import draw_curves
from tinyalign_edge.train.model import AlignModel
from tinyalign_edge.train.pretrained import load_pretrained, tower_ref
from tinyalign_edge.train.samples import write_samples
from tinyalign_edge.train.settings import CheckpointConfig, TowerRef
from tinyalign_edge.train.towers import LANGUAGE, LanguageTower

CALIBRATION = 64


def write_checkpoint(
    out: Path,
    config: CheckpointConfig,
    model: AlignModel,
    language: LanguageTower,
    *,
    rows: Sequence[Row],
    held_out: Sequence[Row],
    keys: npt.NDArray[np.float32],
    values: Values | None,
) -> CheckpointConfig:
    """Write the checkpoint, whose bank holds `rows` with their `keys` (E, key_dim) and `values`; returns what its
    `config.json` says."""
    model.eval().cpu()
    if config.training.stage == "instruct":
        config = replace(config, language=save_language(out / LANGUAGE_FOLDER, language))
    draw_curves(out / METRICS, out / CURVES)
    shutil.rmtree(out / MEMORY, ignore_errors=True)
    if values is not None:
        latents = encode_values(model, values) if config.memory.kind == "latents" else None
        write_bank(
            out / MEMORY,
            keys,
            [Record(first.answer, first.question, row.id) for row in rows for first in row.memory_turns[:1]],
            fingerprint=config.memory.fingerprint,
            vocab_size=language.model.config.vocab_size,
            token_ids=None if latents is not None else values.token_ids,
            latents=latents,
        )
    write_samples(out / SAMPLES, held_out, rows[:CALIBRATION])
    save_checkpoint(out, config, model, language.tokenizer_json)
    return config


def save_language(folder: Path, language: LanguageTower) -> TowerRef:
    """Write a trained language model with its tokenizer; returns what it is now, under its old licence."""
    shutil.rmtree(folder, ignore_errors=True)
    language.model.save_pretrained(folder, safe_serialization=True)
    load_pretrained(AutoTokenizer, language.ref.path, LANGUAGE, use_fast=True).save_pretrained(folder)
    return replace(tower_ref(str(folder), language.model.config), path=LANGUAGE_FOLDER, licence=language.ref.licence)


def encode_values(model: AlignModel, values: Values, batch: int = 64) -> npt.NDArray[np.float32]:
    """Latents (E, L, latent_dim) of every entry."""
    collate = Collate(model.memory_settings, values)
    out = []
    with torch.inference_mode():
        for start in range(0, len(values.token_ids), batch):
            rows = tuple(range(start, min(start + batch, len(values.token_ids))))
            example = Example((), (), np.zeros((0, 0)), rows, (1.0,) * len(rows))
            memory = collate.memory_inputs([example])
            assert memory is not None
            out.append(model.values(memory).unflatten(0, (len(rows), -1)).numpy())
    return np.concatenate(out)
