"""What a caller of `train` may choose, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from tinyalign_edge.errors import InputError
from tinyalign_edge.train.paper import HEADS, LATENT_DIM, LATENTS
from tinyalign_edge.train.settings import (
    ConnectorSettings,
    DataRef,
    KeyKind,
    MemorySettings,
    TrainedMemory,
    TrainSettings,
)

DEFAULT_EPOCHS = 3


@dataclass(frozen=True)
class TrainOptions:
    """What a caller of `train` may choose; the rest follows from data and towers.

    Attributes:
        memory: what the entries carry; "paper": as TinyAlign's released code has it, key included.
        key: None: "fused" with the memory "paper", else "picture".
        key_dim: of a picture's key; None: 128. A fused key has the language model's width.
        value_tokens: the most token ids kept of an entry.
        latents, latent_dim: of an entry; None: 8 of 96 numbers, with the memory "paper" 32 of 96.
    """

    memory: TrainedMemory = "tokens"
    key: KeyKind | None = None
    key_dim: int | None = None
    value_tokens: int = 24
    latents: int | None = None
    latent_dim: int | None = None
    fraction: float = 1.0
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 32
    learning_rate: float = 1e-3
    visual_tokens: int = 16
    k: int = 4
    key_grid: int = 1
    image_size: int | None = None  # pixels a side; None: what the encoder's image processor says
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    eval_every: int = 50
    skip_bad: bool = False  # count and leave out bad rows instead of stopping at the first
    cache_features: Path | None = None  # where features are kept between runs; None: in memory


def check_options(options: TrainOptions) -> None:
    """Refuse values that no run can have.

    Raises:
        InputError: names the option and its value.
    """
    if not 0 < options.fraction <= 1:
        raise InputError(f"--fraction {options.fraction}: must be above 0 and at most 1")
    sizes = ("epochs", "steps", "batch_size", "visual_tokens", "k", "key_grid", "key_dim", "value_tokens", "latents",
             "latent_dim", "image_size")  # fmt: skip
    for name in sizes:
        value = getattr(options, name)
        if value is not None and value < 1:
            option = "neighbours" if name == "k" else name.replace("_", "-")
            raise InputError(f"--{option} {value}: must be at least 1")
    if options.latent_dim and options.latent_dim % HEADS:
        raise InputError(f"--latent-dim {options.latent_dim}: must be a multiple of {HEADS}")
    if options.key == "fused" and options.memory == "none":
        raise InputError("--key fused: there is no key with --memory none; leave it out")
    if not 0 < options.learning_rate < 10:
        raise InputError(f"--learning-rate {options.learning_rate}: must be above 0 and below 10")
    if not 0 <= options.seed < 1 << 32:
        raise InputError(f"--seed {options.seed}: must be from 0 to {(1 << 32) - 1}")
    if options.epochs and options.steps:
        raise InputError("--epochs and --steps: give one of them")


def memory_settings(options: TrainOptions, connector: ConnectorSettings) -> MemorySettings:
    """How the memory is made and read, before its floor is known.

    Raises:
        InputError: a size that the key cannot have.
    """
    paper = options.memory == "paper"
    settings = MemorySettings(
        kind=options.memory,
        key=options.key or ("fused" if paper else "picture"),
        k=options.k,
        key_grid=options.key_grid,
        value_tokens=options.value_tokens,
    )
    if settings.key == "fused" and options.key_dim:
        raise InputError(
            f"--key-dim {options.key_dim}: a fused key has the width {connector.width}, as the LM; leave it out"
        )
    widest = connector.feature_dim * options.key_grid**2
    return replace(
        settings,
        key_dim=connector.width if settings.key == "fused" else min(options.key_dim or settings.key_dim, widest),
        latents=options.latents or (LATENTS if paper else settings.latents),
        latent_dim=options.latent_dim or (LATENT_DIM if paper else settings.latent_dim),
    )


def find_device(wanted: str) -> Literal["cpu", "cuda"]:
    """The device that "auto" stands for, or the one wanted if it is there."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device; use --device cpu")
    return "cuda" if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()) else "cpu"


def train_settings(
    options: TrainOptions, data: tuple[DataRef, ...], images: Path, rows: int, device: Literal["cpu", "cuda"]
) -> TrainSettings:
    """The settings that the checkpoint keeps, for `rows` training rows an epoch."""
    an_epoch = -(-rows // options.batch_size)
    return TrainSettings(
        data=data,
        images=str(images),
        steps=options.steps or an_epoch * (options.epochs or DEFAULT_EPOCHS),
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        fraction=options.fraction,
        seed=options.seed,
        device=device,
        eval_every=options.eval_every,
    )
