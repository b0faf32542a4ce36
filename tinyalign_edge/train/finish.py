"""What a finished run leaves: the bank with its final values, samples for the exporter, the checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import AutoTokenizer

from tinyalign_edge.config import WITH_LATENTS, WITH_TOKENS
from tinyalign_edge.data import Row
from tinyalign_edge.memory import Bank, Record, write_bank
from tinyalign_edge.memory.shown import build_due_graph
from tinyalign_edge.train.batches import Values
from tinyalign_edge.train.checkpoint import CURVES, LANGUAGE_FOLDER, MEMORY, METRICS, SAMPLES, save_checkpoint
from tinyalign_edge.train.curves import draw_curves
from tinyalign_edge.train.model import AlignModel
from tinyalign_edge.train.pretrained import load_pretrained, tower_ref
from tinyalign_edge.train.samples import write_samples
from tinyalign_edge.train.settings import CheckpointConfig, MemorySettings, TowerRef
from tinyalign_edge.train.towers import LANGUAGE, LanguageTower
from tinyalign_edge.train.values import encode_values, value_fingerprint

CALIBRATION = 256


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
    fingerprint = value_fingerprint(config.memory.fingerprint, model)
    config = replace(config, memory=replace(config.memory, fingerprint=fingerprint))
    shutil.rmtree(out / MEMORY, ignore_errors=True)
    if values is not None:
        kind = config.memory.bank_kind
        write_bank(
            out / MEMORY,
            keys,
            [_record(row, config.memory) for row in rows],
            fingerprint=config.memory.fingerprint,
            vocab_size=language.model.config.vocab_size,
            token_ids=values.token_ids if kind in WITH_TOKENS else None,
            latents=encode_values(model, values) if kind in WITH_LATENTS else None,
        )
        build_due_graph(Bank(out / MEMORY))
    write_samples(out / SAMPLES, held_out, rows[:CALIBRATION])
    save_checkpoint(out, config, model, language.tokenizer_json)
    return config


def _record(row: Row, memory: MemorySettings) -> Record:
    first = row.memory_turns[0]
    return Record(first.answer, row.turns[0].question if memory.key == "question" else first.question, row.id)


def save_language(folder: Path, language: LanguageTower) -> TowerRef:
    """Write a trained language model with its tokenizer; returns what it is now, under its old licence."""
    shutil.rmtree(folder, ignore_errors=True)
    language.model.save_pretrained(folder, safe_serialization=True)
    load_pretrained(AutoTokenizer, language.ref.path, LANGUAGE, use_fast=True).save_pretrained(folder)
    return replace(tower_ref(str(folder), language.model.config), path=LANGUAGE_FOLDER, licence=language.ref.licence)
