"""What a finished run leaves: the bank with its final values, samples for the exporter, the checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from tinyalign_edge.data import Row
from tinyalign_edge.memory import Record, write_bank
from tinyalign_edge.train.batches import Collate, Example, Values
from tinyalign_edge.train.checkpoint import MEMORY, SAMPLES, save_checkpoint
from tinyalign_edge.train.model import AlignModel
from tinyalign_edge.train.samples import write_samples
from tinyalign_edge.train.settings import CheckpointConfig
from tinyalign_edge.train.towers import LanguageTower

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
) -> None:
    """Write the checkpoint; its bank holds `rows` with their `keys` (E, key_dim) and `values`."""
    model.eval().cpu()
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
