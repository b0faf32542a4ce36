"""Retrieval keys of entries and of questions, of whichever kind the settings name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tinyalign_edge.data import Row, Turn
from tinyalign_edge.evaluate import single_questions
from tinyalign_edge.prompt import Prompt
from tinyalign_edge.train.batches import pad_texts
from tinyalign_edge.train.encode import Encoded
from tinyalign_edge.train.model import AlignModel
from tinyalign_edge.train.settings import KeyKind

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


def examples_of(rows: Sequence[Row], key: KeyKind) -> tuple[list[Row], npt.NDArray[np.int64]]:
    """The training examples that rows become, and the row that each is of: with a fused key, which is searched for with
    a question, every question is an example of its own."""
    if key == "picture":
        return list(rows), np.arange(len(rows))
    return single_questions(rows), np.repeat(np.arange(len(rows)), [len(row.turns) for row in rows])


def training_keys(
    model: AlignModel,
    prompt: Prompt,
    seen: Encoded,
    entries: tuple[Sequence[Row], Sequence[tuple[int, ...]]],
    held_out: Sequence[Row],
) -> Keys:
    """The keys of a training run.

    Args:
        seen: of the rows that become entries, then of the held-out rows.
        entries: the rows, and the token ids of what each is remembered with.
    """
    (rows, texts), settings = entries, model.memory_settings
    if settings.key == "picture":
        keys = make_keys(model, seen, ())
        return Keys(keys[: len(rows)], keys[: len(rows)], np.arange(len(rows)), keys[len(rows) :])
    asked, own = examples_of(rows, settings.key)
    held, held_own = examples_of(held_out, settings.key)
    made = [
        make_keys(model, seen[of], words)
        for of, words in (
            (np.arange(len(rows)), texts),
            (own, query_texts(asked, prompt, settings.value_tokens)),
            (len(rows) + held_own, query_texts(held, prompt, settings.value_tokens)),
        )
    ]
    return Keys(made[0], made[1], own, made[2], picture_keys(model, seen[: len(rows)]))


def query_texts(rows: Sequence[Row], prompt: Prompt, limit: int) -> list[tuple[int, ...]]:
    """Token ids of the first question of each row: what a fused key is searched with."""
    return [prompt.memory_ids([Turn("", row.turns[0].question)], limit) for row in rows]


def make_keys(model: AlignModel, seen: Encoded, texts: Sequence[tuple[int, ...]]) -> Float:
    """Keys (E, key_dim) of pictures and, for the fused kind, the token ids that go with each."""
    with torch.inference_mode():
        if model.fused_key is None:
            return picture_keys(model, seen)
        embeddings, made = model.language.get_input_embeddings(), []
        for start in range(0, len(texts), BATCH):
            ids, mask = pad_texts(texts[start : start + BATCH])
            features = torch.from_numpy(np.asarray(seen.pooled[start : start + BATCH], np.float32))
            made.append(model.fused_key(features, embeddings(ids), mask).numpy())
        return np.concatenate(made)


def picture_keys(model: AlignModel, seen: Encoded) -> Float:
    """Keys (E, P) of the pictures alone."""
    with torch.inference_mode():
        keys: Float = model.key(torch.from_numpy(seen.regions)).numpy()
    return keys
