"""What a checkpoint's `config.json` holds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tinyalign_edge.bundle import ImageConfig, PromptConfig
from tinyalign_edge.config import WITH_TOKENS, MemoryKind

TrainedMemory = Literal["none", "tokens", "latents", "hybrid", "paper"]
KeyKind = Literal["picture", "question", "fused"]
Stage = Literal["align", "instruct"]
ConnectorKind = Literal["pooled", "pixel_shuffle", "mlp"]

SCHEMA_VERSION = 2
CONFIG = "config.json"


@dataclass(frozen=True)
class TowerRef:
    """A frozen tower: where it was loaded from and which weights it had."""

    path: str
    sha256: str
    model_type: str
    licence: str


@dataclass(frozen=True)
class ConnectorSettings:
    """Sizes of the visual path: the encoder's grid (H, W, C) becomes `visual_tokens` vectors of LM width.

    Attributes:
        kind: "pooled" averages patches; "pixel_shuffle" puts square blocks of them side by side in one vector;
            "mlp" takes every patch.
    """

    grid_height: int
    grid_width: int
    feature_dim: int
    visual_tokens: int
    width: int
    kind: ConnectorKind = "pooled"

    @property
    def block(self) -> int:
        """Patches a side that one vector of "pixel_shuffle" holds."""
        patches = self.grid_height * self.grid_width
        return math.isqrt(patches // self.visual_tokens) if self.kind == "pixel_shuffle" else 1

    @property
    def input_dim(self) -> int:
        """Channels of what the connector reads."""
        return self.feature_dim * self.block**2


@dataclass(frozen=True)
class MemorySettings:
    """The bank and how it is read. `memory_dropout` is the share of training examples that see no neighbours, so
    that the model learns to see by itself, and `dropout` the share of the others that see any number from none to k;
    with `gate` each memory token can be closed, from what it says and how similar its entry is.

    A "question" key tells what is seen and what is asked, side by side: every question of a row is an entry of its own.
    Of kind "hybrid" an entry has latents that tell of its picture, and after them the token ids of its text.
    Of kind "paper" the values are latents of a random encoder, read side by side: see `tinyalign_edge.train.paper`,
    where the "fused" key is, too.
    """

    kind: TrainedMemory = "tokens"
    key: KeyKind = "picture"
    k: int = 4
    key_dim: int = 128
    question_dim: int = 0  # of these dimensions, those of the question: the last ones of a "question" key
    question_weight: float = 0.8  # of it: the same question comes first, and among those the picture that looks alike
    key_grid: int = 1  # the key sees key_grid x key_grid regions of the picture; 1 is the mean of all features
    floor: float = -1.0
    value_tokens: int = 24
    latents: int = 8
    latent_dim: int = 96
    gate: bool = False
    first: bool = False  # memory tokens stand before the visual tokens, so that these are always as far from a question
    copy_dim: int = 0  # of the keys by which a token of the memory is found and copied; 0: nothing is copied
    copy_end: int | None = None  # the token that ends an answer, which is copied after an entry's last one
    dropout: float = 0.25
    memory_dropout: float = 0.0
    duplicate_similarity: float = 0.999  # in training, neighbours this similar count as the example itself
    shuffled: bool = False  # the control: every training and held-out example sees another one's neighbours
    fingerprint: str = ""

    @property
    def bank_kind(self) -> MemoryKind:
        """What the entries of the bank are, whatever made them."""
        return "latents" if self.kind == "paper" else self.kind

    @property
    def exportable(self) -> bool:
        """Whether the runtime reads such a memory; the paper's is there for comparison."""
        return self.key != "fused" and self.kind != "paper"

    @property
    def max_memory_tokens(self) -> int:
        """The most positions that the memory takes of a row."""
        latents = 0 if self.kind == "tokens" else self.latents
        an_entry = latents + (self.value_tokens if self.kind in WITH_TOKENS else 0)
        return {"none": 0, "paper": latents}.get(self.kind, self.k * an_entry)


@dataclass(frozen=True)
class DataRef:
    """What a run was trained on: a file or hub data set, the hash of the file or of the rows, and how often an epoch
    goes through it."""

    path: str
    sha256: str
    weight: float = 1.0


@dataclass(frozen=True)
class TrainSettings:
    """The training run."""

    data: tuple[DataRef, ...]
    images: str  # empty where data sets hold all pictures
    steps: int
    batch_size: int = 32
    micro_batch: int = 32  # rows that one process computes at once
    learning_rate: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.01
    bf16: bool = False
    stage: Stage = "align"
    started_from: str = ""  # the checkpoint that an instruct run went on from
    lm_learning_rate: float = 0.0
    lora_rank: int = 0  # 0: the language model's own weights are trained
    lora_alpha: int = 0
    fraction: float = 1.0
    seed: int = 0
    device: Literal["cpu", "cuda"] = "cpu"
    eval_every: int = 50
    dropout: float = 0.0  # of what the connector reads
    memory_from: float = 0.0  # share of the steps before any row sees its neighbours
    copying_steps: int = 0  # after `steps`, of the copy term alone
    episodes: float = 0.0  # share of the rows then whose names are replaced
    reconstruct: float = 0.0  # weight of the own loss of latents
    freeze_values: bool = False  # the value encoder stays as it begins
    random_values: bool = False  # which is in random directions


@dataclass(frozen=True)
class CheckpointConfig:
    """`config.json` of a checkpoint.

    Attributes:
        whole: `vision` is a whole vision-language model, whose connector is kept; `language` is the same or, after
            stage "instruct", the checkpoint's own.
    """

    schema_version: int
    vision: TowerRef
    language: TowerRef
    image: ImageConfig
    prompt: PromptConfig
    connector: ConnectorSettings
    memory: MemorySettings
    training: TrainSettings
    whole: bool = False

    @property
    def towers(self) -> dict[str, TowerRef]:
        """What the checkpoint was made of, by what it is in it."""
        if self.whole and self.language == self.vision:
            return {"model": self.vision}
        return {"vision": self.vision, "language": self.language}
