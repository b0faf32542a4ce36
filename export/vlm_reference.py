"""A whole model's answers in torch, by its own class and prompt: what the exported bundle is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import GenerationConfig

from tinyalign_edge.bundle import ImageConfig
from tinyalign_edge.data import Row
from tinyalign_edge.image import open_image, preprocess
from tinyalign_edge.memory import Entry
from tinyalign_edge.progress import progress
from tinyalign_edge.prompt import Prompt
from tinyalign_edge.train.vlm_prompt import processor_ids

MAX_NEW_TOKENS = 32

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Question:
    """One question as the model's processor would give it, and the ids of its reference answer."""

    picture: Path
    ids: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Questions:
    """The questions of some rows, in their order."""

    examples: tuple[Question, ...]


class VlmReference:
    """The model in torch, one question at a time."""

    def __init__(self, model: Any, tokenizer: Any, prompt: Prompt, image: ImageConfig, *, visual_tokens: int) -> None:
        self.model, self.tokenizer, self.prompt, self.image = model, tokenizer, prompt, image
        self.count = visual_tokens
        self._answers: dict[tuple[Path, tuple[int, ...]], str] = {}

    def prepare(self, rows: Sequence[Row]) -> Questions:
        """The first question of every row."""
        return Questions(tuple(self._question(row) for row in rows))

    def _question(self, row: Row) -> Question:
        turn = row.turns[0]
        ids = processor_ids(self.prompt.config, self.tokenizer, turn.question, self.count)
        return Question(row.path, tuple(ids), self.prompt.answer(turn.question, turn.answer))

    def logits(self, example: Question) -> Floats:
        """Logits (A, V) that predict the A tokens of the reference answer."""
        wanted = len(example.answer)
        with torch.inference_mode():
            out = self.model(**self._inputs(example, example.answer[:-1]), logits_to_keep=wanted)
        logits: Floats = out.logits[0].numpy()
        return logits

    def visual_tokens(self, example: Question) -> Floats:
        """The picture as the language model reads it: (N, D)."""
        with torch.inference_mode():
            visual: Floats = self.model.get_image_features(self._pixels(example))[0].numpy()
        return visual

    def memories(self, example: Question) -> tuple[Entry, ...]:
        """None: such a model has no memory."""
        return ()

    def latents(self, example: Question, text: str) -> None:
        """None: such a model has no memory."""

    def answers(self, examples: Sequence[Question]) -> list[str]:
        """Greedy answers; each question is asked once, however often it is wanted."""
        with progress("Asking (torch)", len(examples)) as advance:
            for example in examples:
                key = example.picture, example.ids
                if key not in self._answers:
                    self._answers[key] = self._answer(example)
                advance()
        return [self._answers[example.picture, example.ids] for example in examples]

    def _answer(self, example: Question) -> str:
        eos = list(self.prompt.config.eos_token_ids)
        settings = GenerationConfig(
            max_new_tokens=MAX_NEW_TOKENS, eos_token_id=eos, pad_token_id=eos[0], do_sample=False
        )
        with torch.inference_mode():
            out = self.model.generate(**self._inputs(example), generation_config=settings, use_model_defaults=False)
        ids = out[0, len(example.ids) :].tolist()
        return self.prompt.text([i for i in ids if i not in eos])

    def _inputs(self, example: Question, more: Sequence[int] = ()) -> dict[str, torch.Tensor]:
        ids = torch.tensor([[*example.ids, *more]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": self._pixels(example)}

    def _pixels(self, example: Question) -> torch.Tensor:
        """(1, 3, height, width), for Idefics3 (1, tiles, 3, height, width)."""
        pixels = torch.from_numpy(preprocess(open_image(example.picture), self.image))
        return pixels if self.model.config.model_type == "llava" else pixels[None]
