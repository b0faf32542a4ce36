"""Rows and their neighbours to the tensors that `AlignModel` reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tinyalign_edge.data import Row, Turn
from tinyalign_edge.errors import InputError
from tinyalign_edge.prompt import Prompt
from tinyalign_edge.train.model import IGNORED, PADDING, SHARED, MemoryInputs
from tinyalign_edge.train.settings import MemorySettings


@dataclass(frozen=True)
class TokenTurn:
    """Token ids of a question (after the picture) and its answer."""

    question: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Example:
    """One picture with its turns and retrieved neighbours, as ids and arrays."""

    before: tuple[int, ...]
    turns: tuple[TokenTurn, ...]
    features: npt.NDArray[np.floating[Any]]  # (N, C)
    neighbours: tuple[int, ...]  # rows of the bank, most similar first
    similarity: tuple[float, ...]


@dataclass(frozen=True)
class Values:
    """What the bank's entries carry: token ids of every text, and for latents either the picture's features, from
    which the value encoder makes them while it is trained, or the finished latents."""

    token_ids: Sequence[tuple[int, ...]]
    features: npt.NDArray[np.floating[Any]] | None = None  # (E, N, C)
    latents: npt.NDArray[np.float32] | None = None  # (E, L, latent_dim)


def tokenize(turns: Sequence[Turn], prompt: Prompt) -> tuple[tuple[int, ...], tuple[TokenTurn, ...]]:
    """Token ids before the picture, and of each turn after it."""
    asked = [prompt.question(turn.question) for turn in turns]
    answers = [prompt.answer(turn.question, turn.answer) for turn in turns]
    return asked[0].before, tuple(TokenTurn(q.after, a) for q, a in zip(asked, answers, strict=True))


class Rows(Dataset[Example]):
    """Training rows with their neighbours; neighbour dropout depends on seed, epoch and row only."""

    def __init__(
        self,
        rows: Sequence[Row],
        prompt: Prompt,
        features: npt.NDArray[np.floating[Any]],
        neighbours: npt.NDArray[np.int64],
        similarity: npt.NDArray[np.float32],
        *,
        dropout: float,
        seed: int,
        max_tokens: int,
    ) -> None:
        self.features, self.neighbours, self.similarity = features, neighbours, similarity
        self.dropout, self.seed, self.epoch = dropout, seed, 0
        self.tokens = [tokenize(row.turns, prompt) for row in rows]
        for row, (before, turns) in zip(rows, self.tokens, strict=True):
            longest = len(before) + max(len(t.question) + len(t.answer) for t in turns)
            if longest > max_tokens:
                raise InputError(
                    f"{row.where}: {longest} text tokens, the context leaves {max_tokens}; shorten the row"
                )

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Example:
        before, turns = self.tokens[index]
        rows = [int(row) for row in self.neighbours[index] if row >= 0]
        if self.dropout:
            random = np.random.default_rng((self.seed, self.epoch, index))
            if random.random() < self.dropout:
                rows = rows[: random.integers(0, len(rows) + 1)]
        similarity = tuple(float(s) for s in self.similarity[index, : len(rows)])
        return Example(before, turns, self.features[index], tuple(rows), similarity)


class Collate:
    """Examples to one batch."""

    def __init__(self, memory: MemorySettings, values: Values | None) -> None:
        self.memory, self.values = memory, values

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        packed = [self._pack(example) for example in examples]
        size = max(len(p["input_ids"]) for p in packed)
        fill = {"input_ids": 0, "position_ids": 0, "block": PADDING, "labels": IGNORED, "slot": 0}
        columns = {
            name: torch.tensor([p[name] + [value] * (size - len(p[name])) for p in packed])
            for name, value in fill.items()
        }
        slot = columns.pop("slot")
        features = torch.from_numpy(np.stack([np.asarray(e.features, np.float32) for e in examples]))
        return {
            **columns,
            "visual_mask": slot == 1,
            "memory_mask": slot == 2,
            "features": features,
            "memory": self.memory_inputs(examples),
        }

    def _pack(self, example: Example) -> dict[str, list[int]]:
        """Lists over the S positions of one row; `slot` is 1 for visual, 2 for memory, 0 for text."""
        visual = len(example.features)
        memory = self._memory_length(example)
        shared = len(example.before) + visual + memory
        ids = [*example.before, *[0] * (visual + memory)]
        slot = [0] * len(example.before) + [1] * visual + [2] * memory
        positions, block, labels = list(range(shared)), [SHARED] * shared, [IGNORED] * shared
        for number, turn in enumerate(example.turns, start=1):
            text = [*turn.question, *turn.answer[:-1]]
            ids += text
            slot += [0] * len(text)
            positions += range(shared, shared + len(text))
            block += [number] * len(text)
            labels += [IGNORED] * (len(turn.question) - 1) + list(turn.answer)
        return {"input_ids": ids, "position_ids": positions, "block": block, "labels": labels, "slot": slot}

    def _memory_length(self, example: Example) -> int:
        if self.memory.kind == "paper":
            return self.memory.latents if example.neighbours else 0
        return sum(self._value_length(row) for row in example.neighbours)

    def _value_length(self, row: int) -> int:
        assert self.values is not None
        return self.memory.latents if self.memory.kind == "latents" else len(self.values.token_ids[row])

    def memory_inputs(self, examples: Sequence[Example]) -> MemoryInputs | None:
        """What the memory connector reads for a batch; None where nothing was retrieved."""
        if self.memory.kind == "paper":
            return self._side_by_side([example.neighbours for example in examples if example.neighbours])
        pairs = [
            (row, rank, similarity)
            for example in examples
            for rank, (row, similarity) in enumerate(zip(example.neighbours, example.similarity, strict=True))
        ]
        if self.values is None or not pairs:
            return None
        counts = torch.tensor([self._value_length(row) for row, _, _ in pairs])
        rank = torch.tensor([rank for _, rank, _ in pairs]).repeat_interleave(counts)
        similarity = torch.tensor([s for _, _, s in pairs], dtype=torch.float32).repeat_interleave(counts)
        memory: MemoryInputs = {"rank": rank, "similarity": similarity}
        entries = [row for row, _, _ in pairs]
        if self.memory.kind == "tokens":
            memory["token_ids"] = torch.tensor([i for row in entries for i in self.values.token_ids[row]])
        elif self.values.latents is not None:
            memory["latents"] = torch.from_numpy(self.values.latents[entries].reshape(len(rank), -1))
        else:
            assert self.values.features is not None
            memory["token_ids"], memory["token_mask"] = pad_texts([self.values.token_ids[row] for row in entries])
            memory["features"] = torch.from_numpy(np.asarray(self.values.features[entries], np.float32))
        return memory

    def _side_by_side(self, neighbours: Sequence[tuple[int, ...]]) -> MemoryInputs | None:
        """The latents of up to k entries, along their width; zeros where there are fewer."""
        if self.values is None or self.values.latents is None or not neighbours:
            return None
        length, dim = self.values.latents.shape[1:]
        beside = np.zeros((len(neighbours), length, self.memory.k, dim), np.float32)
        for place, entries in enumerate(neighbours):
            beside[place, :, : len(entries)] = self.values.latents[list(entries)].swapaxes(0, 1)
        latents = torch.from_numpy(beside.reshape(len(neighbours) * length, -1))
        return {"rank": torch.zeros(len(latents), dtype=torch.int64), "similarity": torch.ones(len(latents)),
                "latents": latents}  # fmt: skip


def pad_texts(texts: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """Token ids of E texts as (E, T) int64, and where they are, (E, T) bool."""
    size = max(1, *(len(text) for text in texts))
    ids = torch.tensor([[*text, *[0] * (size - len(text))] for text in texts])
    mask = torch.tensor([[True] * len(text) + [False] * (size - len(text)) for text in texts])
    return ids, mask
