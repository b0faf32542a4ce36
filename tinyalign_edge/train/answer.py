"""A checkpoint's answers and losses, in torch: the reference that the exported bundle is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tinyalign_edge.config import WITH_LATENTS
from tinyalign_edge.data import Row, Turn
from tinyalign_edge.errors import InputError
from tinyalign_edge.evaluate import Asked, MemoryMode, partners
from tinyalign_edge.memory import Entry, latents_of, token_ids_of
from tinyalign_edge.progress import progress
from tinyalign_edge.train.batches import Collate, Example, Values, tokenize
from tinyalign_edge.train.checkpoint import Checkpoint
from tinyalign_edge.train.encode import Encode, encode_rows
from tinyalign_edge.train.greedy import greedy_answers
from tinyalign_edge.train.keys import make_keys, query_text
from tinyalign_edge.train.references import read_references
from tinyalign_edge.train.values import encode_values

BATCH = 32


@dataclass(frozen=True)
class Prepared:
    """Questions with everything that the model reads, in the order of their rows (one turn a row)."""

    rows: tuple[Row, ...]
    examples: tuple[Example, ...]
    keys: npt.NDArray[np.float32]  # (Q, key_dim)


class TorchAnswerer:
    """Answers questions from a checkpoint; greedy, batched."""

    def __init__(self, checkpoint: Checkpoint, *, encode: Encode = encode_rows) -> None:
        self.checkpoint, self.encode = checkpoint, encode
        self.collate = Collate(checkpoint.config.memory, _bank_values(checkpoint))

    def prepare(self, rows: Sequence[Row], *, memory: MemoryMode = "own") -> Prepared:
        """Encode the pictures and look up their neighbours, or those of another picture ("shuffled"), or none."""
        if memory == "shuffled" and self.checkpoint.bank is None:
            raise InputError("--shuffle-memory: this model has no memory")
        ck = self.checkpoint
        seen = self.encode(ck.vision.model, ck.config.image, ck.model, rows, device="cpu")
        keys = make_keys(ck.model, seen, [query_text(row, ck.prompt, ck.config.memory) for row in rows])
        near = self._neighbours(rows, keys, memory)
        examples = []
        for i, row in enumerate(rows):
            before, turns = tokenize(row.turns[:1], ck.prompt)
            examples.append(Example(before, turns, seen.pooled[i], *near[i]))
        return Prepared(tuple(rows), tuple(examples), keys)

    def ask_all(self, rows: Sequence[Row], *, memory: MemoryMode = "own") -> Iterator[Asked]:
        """The answer to the first question of every row, and the loss of its reference."""
        prepared = self.prepare(rows, memory=memory)
        with progress("Asking (torch)", len(rows)) as advance:
            for start in range(0, len(rows), BATCH):
                examples = prepared.examples[start : start + BATCH]
                texts, losses = self.answers(examples), self.losses(examples)
                for row, text, loss in zip(rows[start : start + BATCH], texts, losses, strict=True):
                    yield Asked(row.turns[0].question, row.turns[0].answer, text, float(loss.sum()), len(loss))
                advance(len(examples))

    @property
    def has_memory(self) -> bool:
        """Whether the checkpoint has a bank."""
        return self.checkpoint.bank is not None

    def reference_losses(self, rows: Sequence[Row], *, memory: MemoryMode = "own") -> Iterator[tuple[float, int]]:
        """The loss of the first reference of every row, in nats, and over how many tokens."""
        examples = self.prepare(rows, memory=memory).examples
        for reference in read_references(self.checkpoint.model, self.collate, examples):
            yield reference.nll, reference.tokens

    def losses(self, examples: Sequence[Example]) -> list[npt.NDArray[np.float32]]:
        """Negative log-likelihood of every token of each reference answer, in nats."""
        with torch.inference_mode():
            flat = self.checkpoint.model.answer_losses(**self.collate(examples)).numpy()
        lengths = [sum(len(turn.answer) for turn in example.turns) for example in examples]
        return np.split(flat, np.cumsum(lengths)[:-1])

    def logits(self, example: Example) -> npt.NDArray[np.float32]:
        """Logits (A, V) that predict the A tokens of the reference answer."""
        batch = self.collate([example])
        names = ("position_ids", "block", "input_ids", "memory_mask", "memory")
        with torch.inference_mode():
            embeds, given = self._embeds(batch), {name: batch[name] for name in names}
            return self.checkpoint.model.logits(embeds, wanted=batch["labels"] != -100, **given).numpy()

    def visual_tokens(self, example: Example) -> npt.NDArray[np.float32]:
        """What the connector gives for the example's picture: (N, D)."""
        with torch.inference_mode():
            features = torch.from_numpy(np.asarray(example.features, np.float32))
            out: npt.NDArray[np.float32] = self.checkpoint.model.connector(features).numpy()
        return out

    def memories(self, example: Example) -> tuple[Entry, ...]:
        """The entries of the bank that the example's neighbours are, most similar first."""
        bank = self.checkpoint.bank
        pairs = zip(example.neighbours, example.similarity, strict=True)
        return tuple(bank.entry(row, similarity) for row, similarity in pairs) if bank else ()

    def latents(self, example: Example, text: str) -> npt.NDArray[np.float32] | None:
        """What the value encoder makes of the example's picture and a text, (L, latent_dim); None without one."""
        ck = self.checkpoint
        if ck.model.value_encoder is None:
            return None
        ids = ck.prompt.memory_ids([Turn("", text)], ck.config.memory.value_tokens)
        values = Values([ids], lambda _: np.asarray(example.features, np.float32)[None])
        return encode_values(ck.model, values).squeeze(0)

    def answers(self, examples: Sequence[Example], *, max_new_tokens: int = 32) -> list[str]:
        """Greedy answers to the examples' first questions, `BATCH` at a time."""
        starts = range(0, len(examples), BATCH)
        batches = [self._batch_answers(examples[start : start + BATCH], max_new_tokens) for start in starts]
        return [text for texts in batches for text in texts]

    def _batch_answers(self, examples: Sequence[Example], max_new_tokens: int) -> list[str]:
        questions = [self._without_answer(example) for example in examples]
        batch = self.collate(questions)
        with torch.inference_mode():
            ids = greedy_answers(
                self.checkpoint.model,
                self._embeds(batch),
                batch,
                ends=self.checkpoint.config.prompt.eos_token_ids,
                max_new_tokens=max_new_tokens,
            )
        return [self.checkpoint.prompt.text(row) for row in ids]

    def _embeds(self, batch: dict[str, Any]) -> torch.Tensor:
        model = self.checkpoint.model
        visual = model.connector(batch["features"])
        return model.inputs_embeds(
            batch["input_ids"], batch["visual_mask"], visual, batch["memory_mask"], batch["memory"]
        )

    def _without_answer(self, example: Example) -> Example:
        """The same example with an answer of one token, which the packing drops."""
        return replace(example, turns=(replace(example.turns[0], answer=(0,)),))

    def _neighbours(
        self, rows: Sequence[Row], keys: npt.NDArray[np.float32], memory: MemoryMode
    ) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
        settings, bank = self.checkpoint.config.memory, self.checkpoint.bank
        if bank is None or memory == "none":
            return [((), ())] * len(rows)
        found = bank.nearest(keys, settings.k, floor=settings.floor)
        source = partners([row.image for row in rows]) if memory == "shuffled" else range(len(rows))
        near = []
        for i in source:
            kept = found.rows[i] >= 0
            near.append((tuple(found.rows[i][kept].tolist()), tuple(found.similarity[i][kept].tolist())))
        return near


def _bank_values(checkpoint: Checkpoint) -> Values | None:
    bank = checkpoint.bank
    if bank is None:
        return None
    values = [bank.entry(row).value for row in range(len(bank))]
    with_latents = bank.manifest.spec.kind in WITH_LATENTS
    return Values(
        [tuple(token_ids_of(value).tolist()) for value in values],
        latents=np.stack([latents_of(value) for value in values]) if with_latents else None,
    )
