"""Rows and their neighbours to the tensors that `AlignModel` reads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tinyalign_edge.config import WITH_LATENTS, WITH_TOKENS
from tinyalign_edge.data import Row, Turn
from tinyalign_edge.memory import reading_order
from tinyalign_edge.prompt import Prompt
from tinyalign_edge.train.episodes import Episodes
from tinyalign_edge.train.model import IGNORED, PADDING, SHARED, MemoryInputs
from tinyalign_edge.train.settings import MemorySettings

_MOST_TOKENS_A_BYTE = 2  # of any tokenizer: a row is tokenized to be measured only beyond it


@dataclass(frozen=True)
class TokenTurn:
    """Token ids of a question (after the picture) and its answer."""

    question: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Example:
    """A row: pictures with their turns and retrieved neighbours, as ids and arrays."""

    before: tuple[int, ...]
    turns: tuple[TokenTurn, ...]
    features: npt.NDArray[np.floating[Any]]  # (V, C): N of each of its pictures, mostly one
    neighbours: tuple[int, ...]  # rows of the bank, most similar first
    similarity: tuple[float, ...]
    texts: tuple[tuple[int, ...], ...] | None = None  # token ids that the neighbours have here; None: the bank's


@dataclass(frozen=True)
class Values:
    """What the bank's entries carry: token ids of every text, and for latents either the picture's features, from
    which the value encoder makes them while it is trained, or the finished latents."""

    token_ids: Sequence[tuple[int, ...]]
    features: Callable[[Sequence[int]], npt.NDArray[np.floating[Any]]] | None = None  # of entries: (E, N, C)
    latents: npt.NDArray[np.float32] | None = None  # (E, L, latent_dim)


def tokenize(turns: Sequence[Turn], prompt: Prompt) -> tuple[tuple[int, ...], tuple[TokenTurn, ...]]:
    """Token ids before the picture, and of each turn after it."""
    asked = [prompt.question(turn.question) for turn in turns]
    answers = [prompt.answer(turn.question, turn.answer) for turn in turns]
    return asked[0].before, tuple(TokenTurn(q.after, a) for q, a in zip(asked, answers, strict=True))


class Rows(Dataset[Example]):
    """Training rows with their neighbours, made when they are asked for.

    Args:
        rows: by number.
        features: of the pictures of rows, (V, C) each, given their numbers.
        neighbours, similarity: of every row, (R, K); -1 where there is none.
        epochs: which rows an epoch has, by its number; None: all of them once.
        dropout, memory_dropout: the shares of rows that see fewer neighbours, and none; which depends on seed, epoch
            and row only.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        prompt: Prompt,
        features: Callable[[Sequence[int]], Sequence[npt.NDArray[np.floating[Any]]]],
        neighbours: npt.NDArray[np.int64],
        similarity: npt.NDArray[np.float32],
        *,
        dropout: float = 0.0,
        memory_dropout: float = 0.0,
        seed: int = 0,
        epochs: Callable[[int], npt.NDArray[np.int64]] | None = None,
    ) -> None:
        self.rows, self.prompt, self.features = rows, prompt, features
        self.neighbours, self.similarity = neighbours, similarity
        self.dropout, self.memory_dropout, self.seed = dropout, memory_dropout, seed
        self.epochs = epochs
        self.episodes: Episodes | None = None
        self.set_epoch(0)

    def playing(self, episodes: Episodes) -> Rows:
        """The same rows, of which some are episodes; which depends on seed, epoch and row only, too."""
        rows = copy.copy(self)
        rows.episodes = episodes
        rows.set_epoch(0)
        return rows

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer at the start of each epoch."""
        self.epoch = epoch
        self.picked = np.arange(len(self.rows)) if self.epochs is None else self.epochs(epoch)

    def __len__(self) -> int:
        return len(self.picked)

    def __getitem__(self, position: int) -> Example:
        return self.batch([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Example]:  # so torch's loaders ask
        return self.batch(positions)

    def batch(self, positions: Sequence[int]) -> list[Example]:
        """The examples at some positions, whose features are asked for at once."""
        features = self.features([int(self.picked[position]) for position in positions])
        return [self._example(*each) for each in zip(positions, features, strict=True)]

    def _example(self, position: int, features: npt.NDArray[np.floating[Any]]) -> Example:
        index = int(self.picked[position])
        near = [int(row) for row in self.neighbours[index] if row >= 0]
        if self.dropout or self.memory_dropout:
            random = np.random.default_rng((self.seed, self.epoch, position))
            drawn = random.random()
            if drawn >= 1 - self.memory_dropout:
                near = []
            elif drawn < self.dropout * (1 - self.memory_dropout):
                near = near[: random.integers(0, len(near) + 1)]
        row, texts = self.rows[index], None
        if self.episodes:
            row, texts = self.episodes.play(row, near, np.random.default_rng((self.seed, self.epoch, position, 1)))
        before, turns = tokenize(row.turns, self.prompt)
        similarity = tuple(float(s) for s in self.similarity[index, : len(near)])
        return Example(before, turns, features, tuple(near), similarity, texts)


def longest_tokens(row: Row, prompt: Prompt, limit: int) -> int:
    """The tokens of a row's longest turn with all that stands before it; 0 if its few bytes cannot make `limit`."""
    most = _MOST_TOKENS_A_BYTE * max(len(f"{t.question}{t.answer}".encode()) for t in row.turns)
    if most + prompt.least_tokens < limit:
        return 0
    before, turns = tokenize(row.turns, prompt)
    return len(before) + max(len(turn.question) + len(turn.answer) for turn in turns)


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
        features = torch.from_numpy(np.concatenate([np.asarray(e.features, np.float32) for e in examples]))  # (V, C)
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
        picture, retrieved = [1] * visual, [2] * memory
        slot = [0] * len(example.before) + (retrieved + picture if self.memory.first else picture + retrieved)
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
        return sum(map(self._entry_length, self._texts(example)))

    def _entry_length(self, text: tuple[int, ...]) -> int:
        """The memory tokens of an entry with this text."""
        latents = self.memory.latents if self.memory.kind in WITH_LATENTS else 0
        return latents + (len(text) if self.memory.kind in WITH_TOKENS else 0)

    def _texts(self, example: Example) -> Sequence[tuple[int, ...]]:
        """Token ids of the neighbours' texts."""
        assert self.values is not None or not example.neighbours
        if example.texts is not None or self.values is None:
            return example.texts or ()
        return [self.values.token_ids[row] for row in example.neighbours]

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
        texts = [text for example in examples for text in self._texts(example)]
        counts = torch.tensor([self._entry_length(text) for text in texts])
        rank = torch.tensor([rank for _, rank, _ in pairs]).repeat_interleave(counts)
        similarity = torch.tensor([s for _, _, s in pairs], dtype=torch.float32).repeat_interleave(counts)
        memory: MemoryInputs = {"rank": rank, "similarity": similarity}
        if self.memory.kind in WITH_TOKENS:
            memory["token_ids"] = torch.tensor([i for text in texts for i in text], dtype=torch.int64)
        if self.memory.kind in WITH_LATENTS:
            self._add_latents(memory, [row for row, _, _ in pairs], texts)
        if self.memory.kind == "hybrid":
            lengths = np.array([len(text) for text in texts])
            memory["order"] = torch.from_numpy(reading_order(self.memory.latents, lengths))
        return memory

    def _add_latents(self, memory: MemoryInputs, entries: Sequence[int], texts: Sequence[tuple[int, ...]]) -> None:
        """Add the latents of these entries, or the features that they are made of."""
        assert self.values is not None
        if self.values.latents is not None:
            memory["latents"] = torch.from_numpy(self.values.latents[list(entries)]).flatten(0, 1)
        else:
            assert self.values.features is not None
            if self.memory.kind == "latents":
                memory["token_ids"], memory["token_mask"] = pad_texts(texts)
            memory["features"] = torch.from_numpy(np.asarray(self.values.features(entries), np.float32))

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


def without_memory(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch of `Collate` as if nobody had neighbours; the places of the memory tokens are padding."""
    here: Tensor = batch["memory_mask"]
    return {
        **batch,
        "block": batch["block"].masked_fill(here, PADDING),
        "position_ids": (batch["position_ids"] - here.cumsum(dim=1)).clamp_min(0),
        "memory_mask": torch.zeros_like(here),
        "memory": None,
    }


def pad_texts(texts: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """Token ids of E texts as (E, T) int64, and where they are, (E, T) bool."""
    size = max(1, *(len(text) for text in texts))
    ids = torch.tensor([[*text, *[0] * (size - len(text))] for text in texts])
    mask = torch.tensor([[True] * len(text) + [False] * (size - len(text)) for text in texts])
    return ids, mask
