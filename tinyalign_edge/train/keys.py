"""Retrieval keys of entries and of questions, of whichever kind the settings name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tinyalign_edge.data import Row, Turn
from tinyalign_edge.memory.side_by_side import joined
from tinyalign_edge.prompt import Prompt
from tinyalign_edge.train.batches import pad_texts
from tinyalign_edge.train.encode import Encoded
from tinyalign_edge.train.model import AlignModel
from tinyalign_edge.train.settings import MemorySettings

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


def query_text(row: Row, prompt: Prompt, memory: MemorySettings) -> tuple[int, ...]:
    """Token ids of the first question of a row, with which a key that tells what is asked is searched for."""
    question, fused = row.turns[0].question, memory.key == "fused"
    return prompt.memory_ids([Turn("", question)], memory.value_tokens) if fused else prompt.asked_ids(question)


def entry_text(row: Row, prompt: Prompt, memory: MemorySettings) -> tuple[int, ...]:
    """Token ids that the key of a row's entry is made of: all its text in a fused key, else its first question."""
    fused = memory.key == "fused"
    return prompt.memory_ids(row.memory_turns, memory.value_tokens) if fused else query_text(row, prompt, memory)


def make_keys(model: AlignModel, seen: Encoded, texts: Sequence[tuple[int, ...]]) -> Float:
    """Keys (E, key_dim) of pictures and, unless the key is the picture's alone, the token ids that go with each."""
    if model.fused_key is not None:
        return fused_keys(model, seen.pooled, texts)
    pictures = picture_keys(model, seen.regions)
    return (
        pictures
        if model.question_key is None
        else joined(pictures, question_keys(model, texts), model.memory_settings.question_weight)
    )


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


def question_keys(model: AlignModel, texts: Sequence[tuple[int, ...]]) -> Float:
    """The part of the keys, (E, Q), that the token ids of questions make."""
    assert model.question_key is not None
    with torch.inference_mode():
        made: Float = model.question_key(question_words(model, texts)).numpy()
    return made


def question_words(model: AlignModel, texts: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """What `QuestionKey` makes keys of, (E, D)."""
    assert model.question_key is not None
    embeddings, different = model.language.get_input_embeddings(), list(dict.fromkeys(texts))
    made = []
    with torch.inference_mode():
        for start in range(0, len(different), BATCH):
            ids, mask = pad_texts(different[start : start + BATCH])
            made.append(model.question_key.words(embeddings(ids).float(), mask))
    number = {text: i for i, text in enumerate(different)}
    return torch.cat(made)[[number[text] for text in texts]]
