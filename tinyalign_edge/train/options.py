"""What a caller of `train` may choose, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from tinyalign_edge.config import MemoryKind
from tinyalign_edge.errors import InputError
from tinyalign_edge.train.settings import DataRef, TrainSettings

DEFAULT_EPOCHS = 3


@dataclass(frozen=True)
class TrainOptions:
    """What a caller of `train` may choose; the rest follows from data and towers."""

    memory: MemoryKind = "tokens"
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
    for name in ("epochs", "steps", "batch_size", "visual_tokens", "k", "key_grid", "image_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            option = "neighbours" if name == "k" else name.replace("_", "-")
            raise InputError(f"--{option} {value}: must be at least 1")
    if not 0 < options.learning_rate < 10:
        raise InputError(f"--learning-rate {options.learning_rate}: must be above 0 and below 10")
    if not 0 <= options.seed < 1 << 32:
        raise InputError(f"--seed {options.seed}: must be from 0 to {(1 << 32) - 1}")
    if options.epochs and options.steps:
        raise InputError("--epochs and --steps: give one of them")


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
