"""Retrieval keys of entries and of questions, of whichever kind the settings name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tinyalign_edge.data import Row, Turn
from tinyalign_edge.prompt import Prompt
from tinyalign_edge.train.batches import pad_texts
from tinyalign_edge.train.encode import Encoded
from tinyalign_edge.train.model import AlignModel

BATCH = 256

Float = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Keys:
    """Unit keys (float32) of a training run; of the picture alone, queries and entries are the same thing.

    Attributes:
        entries: (E, key_dim), as the bank keeps them.
        queries: (Q, key_dim) of the training examples.
        own: (Q,) int64, the entry that each of them became.
        held_out: (Q', key_dim) of the held-out examples.
        pictures: (E, P) of the entries' pictures alone, by which near-duplicates are known; None: `entries` are.
    """

    entries: Float
    queries: Float
    own: npt.NDArray[np.int64]
    held_out: Float
    pictures: Float | None = None


def query_texts(rows: Sequence[Row], prompt: Prompt, limit: int) -> list[tuple[int, ...]]:
    """Token ids of the first question of each row: what a fused key is searched with."""
    return [query_text(row, prompt, limit) for row in rows]


def query_text(row: Row, prompt: Prompt, limit: int) -> tuple[int, ...]:
    """Token ids of the first question of a row."""
    return prompt.memory_ids([Turn("", row.turns[0].question)], limit)


def make_keys(model: AlignModel, seen: Encoded, texts: Sequence[tuple[int, ...]]) -> Float:
    """Keys (E, key_dim) of pictures and, for the fused kind, the token ids that go with each."""
    return picture_keys(model, seen.regions) if model.fused_key is None else fused_keys(model, seen.pooled, texts)


def picture_keys(model: AlignModel, regions: Float) -> Float:
    """Keys (E, P) of the pictures alone, from their region features."""
    with torch.inference_mode():
        keys: Float = model.key(torch.from_numpy(regions)).numpy()
    return keys


def fused_keys(model: AlignModel, pooled: npt.NDArray[np.floating[Any]], texts: Sequence[tuple[int, ...]]) -> Float:
    """Keys (E, D) of pooled features (E, N, C) and the token ids that go with each."""
    assert model.fused_key is not None
    embeddings, made = model.language.get_input_embeddings(), []
    with torch.inference_mode():
        for start in range(0, len(texts), BATCH):
            ids, mask = pad_texts(texts[start : start + BATCH])
            features = torch.from_numpy(np.asarray(pooled[start : start + BATCH], np.float32))
            made.append(model.fused_key(features, embeddings(ids).float(), mask).numpy())
    return np.concatenate(made)
