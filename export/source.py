"""What `export` needs of a model, wherever it comes from: a checkpoint that `train` wrote, or a whole VLM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx

from tinyalign_edge.bundle import ImageConfig, PromptConfig
from tinyalign_edge.data import Row
from tinyalign_edge.errors import InputError, UnsupportedError
from tinyalign_edge.export.encoder import encoder_graph
from tinyalign_edge.export.vlm_graph import remembering_graph
from tinyalign_edge.memory import Entry
from tinyalign_edge.train.answer import TorchAnswerer
from tinyalign_edge.train.checkpoint import SAMPLES, TOKENIZER, Checkpoint, load_checkpoint
from tinyalign_edge.train.connector import MemoryConnector, PictureEncoder, ValueEncoder
from tinyalign_edge.train.copying import CopyHead
from tinyalign_edge.train.question_key import QuestionKey
from tinyalign_edge.train.samples import CALIBRATION, HELD_OUT, read_samples
from tinyalign_edge.train.settings import MemorySettings, TowerRef

MAX_SAMPLES = 256

Floats = npt.NDArray[np.float32]


class Prepared(Protocol):
    """Questions made ready by a `Reference`, in the order of their rows."""

    @property
    def examples(self) -> Sequence[Any]:
        """One for each row, of the reference's own kind."""


class Reference(Protocol):
    """The model in torch, which the exported files are compared with."""

    def prepare(self, rows: Sequence[Row]) -> Prepared:
        """Make the first question of every row ready."""

    def answers(self, examples: Sequence[Any]) -> list[str]:
        """Greedy answers."""

    def logits(self, example: Any) -> Floats:
        """Logits (A, V) that predict the A tokens of the row's own answer."""

    def visual_tokens(self, example: Any) -> Floats:
        """The picture as the language model reads it: (N, D)."""

    def memories(self, example: Any) -> tuple[Entry, ...]:
        """The memories that the language model reads."""

    def latents(self, example: Any, text: str) -> Floats | None:
        """What the value encoder makes of the row's picture and a text, (L, latent_dim); None without one."""


@dataclass(frozen=True)
class SourceMemory:
    """The memory of a checkpoint in `folder`: how it is read, and by what."""

    folder: Path
    settings: MemorySettings
    connector: MemoryConnector
    value_encoder: ValueEncoder | PictureEncoder | None  # where there are latents
    question_key: QuestionKey | None  # where a key tells what is asked
    copy_head: CopyHead | None

    @property
    def feature_dim(self) -> int:
        """Of the features that the value encoder reads; 0 without one."""
        return 0 if self.value_encoder is None else self.value_encoder.feature_dim


@dataclass(frozen=True)
class Source:
    """A model to export. `rows` are samples for the gate: single questions with their answers."""

    image: ImageConfig
    prompt: PromptConfig
    language: Any  # a causal language model in torch
    tokenizer_json: str
    visual_tokens: int
    key_dim: int  # of the picture's part of a retrieval key; 0: there is none
    towers: dict[str, TowerRef]  # by what they are in the bundle: where they come from, and their licences
    reference: Reference
    rows: Callable[[Path], list[Row]]  # given an empty folder that lasts as long as they do
    encoder: Callable[[], onnx.ModelProto]  # the float32 graph, as `VisionBlock` says
    calibration: Sequence[Row] = ()  # to find the formats on; where there are none, `rows` serve
    memory: SourceMemory | None = None


def checkpoint_source(folder: Path, calibration: Sequence[Row] | None) -> Source:
    """The model of a training run, with its held-out samples.

    Args:
        calibration: to find the formats on; None for the checkpoint's own.

    Raises:
        InputError: not a checkpoint, a tower cannot be loaded, or there are no calibration samples.
        BundleError: as `load_checkpoint`.
        UnsupportedError: a memory of the paper's kind.
    """
    checkpoint = load_checkpoint(folder)
    config = checkpoint.config
    if not config.memory.exportable:
        raise UnsupportedError(
            f"{folder}: its memory is the paper's (fused key or random values), for comparison only, and cannot be "
            "exported; train with --memory tokens, latents or hybrid and --key picture or question"
        )
    calibration = read_samples(folder / SAMPLES, CALIBRATION) if calibration is None else calibration
    if not calibration:
        raise InputError("no calibration samples in the checkpoint; give --calibration FILE --images DIR")
    return Source(
        image=config.image,
        prompt=config.prompt,
        language=checkpoint.language.model,
        tokenizer_json=(folder / TOKENIZER).read_text("utf-8"),
        visual_tokens=config.connector.visual_tokens,
        key_dim=config.memory.key_dim - config.memory.question_dim,
        towers=config.towers,
        reference=TorchAnswerer(checkpoint),
        rows=lambda _: sample_questions(read_samples(folder / SAMPLES, HELD_OUT)),
        encoder=lambda: remembering_graph(checkpoint) if config.whole else encoder_graph(checkpoint),
        calibration=calibration,
        memory=_memory(checkpoint),
    )


def _memory(checkpoint: Checkpoint) -> SourceMemory | None:
    connector, value_encoder = checkpoint.model.memory_connector, checkpoint.model.value_encoder
    if not isinstance(connector, MemoryConnector):
        return None
    encoder = value_encoder if isinstance(value_encoder, ValueEncoder | PictureEncoder) else None
    model = checkpoint.model
    return SourceMemory(
        checkpoint.folder, checkpoint.config.memory, connector, encoder, model.question_key, model.copy_head
    )


def sample_questions(rows: Sequence[Row]) -> list[Row]:
    """Samples for the gate: one question a picture first, more of each until there are enough."""
    most = max((len(row.turns) for row in rows), default=0)
    single = [replace(row, turns=(row.turns[i],)) for i in range(most) for row in rows if i < len(row.turns)]
    if len(rows) >= MAX_SAMPLES:  # a mix of all turns, not the first ones only
        turn = np.random.default_rng(0).integers(0, most, len(rows))
        single = [replace(row, turns=(row.turns[i % len(row.turns)],)) for i, row in zip(turn, rows, strict=True)]
    return single[:MAX_SAMPLES]
