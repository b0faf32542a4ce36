"""What a caller of `train` may choose, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from tinyalign_edge.config import WITH_LATENTS, WITH_TOKENS
from tinyalign_edge.errors import InputError
from tinyalign_edge.train.loaders import check_loaders
from tinyalign_edge.train.paper import HEADS, LATENT_DIM, LATENTS
from tinyalign_edge.train.question_key import QUESTION_DIM
from tinyalign_edge.train.settings import (
    ConnectorKind,
    ConnectorSettings,
    DataRef,
    KeyKind,
    MemorySettings,
    Stage,
    TrainedMemory,
    TrainSettings,
)

Device = Literal["cpu", "cuda"]

RECIPE_ALONE = ("warmup", "weight_decay", "lora_alpha", "random_values")  # no options of the command line
OTHER_NAMES = {"k": "--neighbours", "lora_rank": "--lora", "copy_words": "--copy"}  # there
DEFAULT_EPOCHS = 3
POOLED_TOKENS = 16
COPY_DIM = 64
HYBRID_LATENTS = 2  # of an entry that has its text as well
EPISODES = 0.1
MEMORY_FROM = 0.25  # of the steps, the first ones: no row sees its neighbours, so that the picture is learnt, too
COPYING = 0.25  # of the steps: as many more, by which the copy term alone learns from episodes
COPYING_RATE = 0.3  # of the learning rate, in these: at the full one the loss goes up when they begin


@dataclass(frozen=True)
class TrainOptions:
    """What a caller of `train` may choose; the rest follows from data and towers.

    Attributes:
        stage: "instruct": the language model trains too, beginning at an aligned checkpoint.
        memory: what the entries carry; "paper": as TinyAlign's released code has it, key included.
        key: None: "fused" with the memory "paper", else "picture".
        key_dim: of a picture's key, or part of it; None: 128. A fused key has the language model's width.
        value_tokens: the most token ids kept of an entry.
        gate: memory tokens can be closed, by what is learnt; None: beside a whole model, where they begin nearly so.
        copy_words: tokens of the retrieved texts may be copied into the answer; None: with the memories "tokens" and
            "hybrid", which alone have any.
        memory_first: the memory stands before the picture; None: but for the memory "paper".
        episodes: the share of the rows in which names are replaced by made-up ones, in the neighbours' texts too, when
            the copy term is trained alone, after all else; None: a tenth; 0: that is left out.
        memory_dropout: the share of the rows that see no neighbours.
        memory_from: the share of the steps, the first ones, in which no row sees its neighbours; None: a quarter where
            a connector is trained from its beginning, and none with the memory "paper".
        reconstruct: the weight of an own loss of latents, by which their memory tokens say their entry's text.
        freeze_values: the value encoder stays as it begins; in stage "align" for the memory "latents" alone.
        random_values: the control: latents begin in random directions instead of the embeddings' principal axes.
        latents, latent_dim: of an entry; None: 8 of 96 numbers, with the memory "hybrid" 2, with "paper" 32 of 96.
    """

    stage: Stage = "align"
    memory: TrainedMemory = "tokens"
    key: KeyKind | None = None
    key_dim: int | None = None
    value_tokens: int = 24
    gate: bool | None = None
    latents: int | None = None
    latent_dim: int | None = None
    copy_words: bool | None = None
    memory_first: bool | None = None
    episodes: float | None = None
    memory_dropout: float = 0.0
    memory_from: float | None = None
    reconstruct: float = 0.0
    freeze_values: bool = False
    random_values: bool = False
    fraction: float = 1.0
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 32  # rows a step, of all processes together
    micro_batch: int | None = None  # rows that a process computes at once; None: its share of a step
    learning_rate: float = 1e-3
    lm_learning_rate: float = 2e-5  # of the language model, in stage "instruct"
    lora_rank: int = 0  # 0: all of the language model's weights are trained
    lora_alpha: int | None = None  # None: twice the rank
    warmup: float = 0.05  # share of the steps
    weight_decay: float = 0.01
    dropout: float = 0.0  # of what a new connector reads
    bf16: bool = False
    connector: ConnectorKind = "pooled"
    visual_tokens: int | None = None  # None: as `connector_settings` says
    k: int = 4
    key_grid: int = 1
    image_size: int | None = None  # pixels a side; None: what the encoder's image processor says
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    eval_every: int = 50
    skip_bad: bool = False  # count and leave out bad rows instead of stopping at the first
    shuffle_memory: bool = False  # the control: train with the neighbours of other examples
    cache_features: Path | None = None  # where features are kept between runs; None: in memory
    loaders: int = 0  # processes that make batches ready, beside each that trains


def option_of(name: str) -> str:
    """What an option of this name is called where it is given."""
    return name if name in RECIPE_ALONE else OTHER_NAMES.get(name, f"--{name.replace('_', '-')}")


def check_options(options: TrainOptions) -> None:
    """Refuse values that no run can have.

    Raises:
        InputError: names the option and its value.
    """
    if not 0 < options.fraction <= 1:
        raise InputError(f"--fraction {options.fraction}: must be above 0 and at most 1")
    sizes = ("epochs", "steps", "batch_size", "micro_batch", "visual_tokens", "k", "key_grid", "key_dim",
             "value_tokens", "latents", "latent_dim", "image_size", "eval_every", "lora_alpha")  # fmt: skip
    for name in sizes:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"{option_of(name)} {value}: must be at least 1")
    if options.latent_dim and options.latent_dim % HEADS:
        raise InputError(f"--latent-dim {options.latent_dim}: must be a multiple of {HEADS}")
    if options.gate and options.memory in ("none", "paper"):
        raise InputError(f"--gate: there is none with --memory {options.memory}; leave it out")
    if options.memory_from and options.memory == "none":
        raise InputError(
            f"--memory-from {options.memory_from}: there is nothing to join with --memory none; leave it out"
        )
    if options.key in ("question", "fused") and options.memory == "none":
        raise InputError(f"--key {options.key}: there is no key with --memory none; leave it out")
    if options.key == "question" and options.memory == "paper":
        raise InputError("--key question: the paper's memory has a fused key, or the picture's; choose one of these")
    if options.stage == "align":
        check_values(options, options.memory)
    if not 0 <= options.reconstruct < 10:
        raise InputError(f"--reconstruct {options.reconstruct}: must be from 0 to below 10")
    for rate in ("learning_rate", "lm_learning_rate"):
        if not 0 < getattr(options, rate) < 10:
            raise InputError(f"--{rate.replace('_', '-')} {getattr(options, rate)}: must be above 0 and below 10")
    if options.copy_words and options.memory not in WITH_TOKENS:
        raise InputError(f"--copy: latents have no tokens to copy; use --memory tokens or hybrid, not {options.memory}")
    if options.episodes and (options.copy_words is False or options.memory not in WITH_TOKENS):
        raise InputError(
            f"--episodes {options.episodes}: nothing is copied here; use --memory tokens or hybrid with --copy"
        )
    for share in ("warmup", "weight_decay", "dropout", "episodes", "memory_dropout", "memory_from"):
        if not 0 <= (getattr(options, share) or 0) < 1:
            raise InputError(f"{option_of(share)} {getattr(options, share)}: must be from 0 to below 1")
    if options.lora_rank < 0 or (options.lora_rank and options.stage == "align"):
        raise InputError(f"--lora {options.lora_rank}: the rank of the adapters of --stage instruct, at least 1")
    if not 0 <= options.seed < 1 << 32:
        raise InputError(f"--seed {options.seed}: must be from 0 to {(1 << 32) - 1}")
    check_loaders(options.loaders)
    if options.epochs and options.steps:
        raise InputError("--epochs and --steps: give one of them")


def check_values(options: TrainOptions, kind: TrainedMemory) -> None:
    """Refuse what a memory of this `kind`, in stage "instruct" the checkpoint's, has no value encoder for.

    Raises:
        InputError: names the option.
    """
    if options.reconstruct and kind != "latents":
        raise InputError(f"--reconstruct {options.reconstruct}: is for --memory latents, this is {kind}; leave it out")
    if options.random_values and (kind != "latents" or options.stage != "align"):
        raise InputError(f"random_values: is for new latents, this is {kind} in stage {options.stage}; leave it out")
    if options.freeze_values and kind not in WITH_LATENTS:
        raise InputError(f"--freeze-values: no value encoder trains with --memory {kind}; use latents")
    if options.freeze_values and kind == "hybrid" and options.stage == "align":
        raise InputError(
            "--freeze-values: the latents of --memory hybrid begin at zero and would say nothing; use latents, or "
            "leave it out before --stage instruct"
        )


def memory_settings(options: TrainOptions, connector: ConnectorSettings, *, whole: bool) -> MemorySettings:
    """How the memory is made and read, before its floor is known; `whole`: the connector is a whole model's own.

    Raises:
        InputError: a size that the key cannot have.
    """
    paper = options.memory == "paper"
    latents = {"paper": LATENTS, "hybrid": HYBRID_LATENTS}
    copies = options.memory in WITH_TOKENS if options.copy_words is None else options.copy_words
    settings = MemorySettings(
        kind=options.memory,
        key=options.key or ("fused" if paper else "picture"),
        k=options.k,
        key_grid=options.key_grid,
        value_tokens=options.value_tokens,
        gate=whole and not paper if options.gate is None else options.gate,
        shuffled=options.shuffle_memory,
        first=not paper if options.memory_first is None else options.memory_first,
        memory_dropout=options.memory_dropout,
        copy_dim=min(COPY_DIM, connector.width) if copies else 0,
    )
    if settings.key == "fused" and options.key_dim:
        raise InputError(
            f"--key-dim {options.key_dim}: a fused key has the width {connector.width}, as the LM; leave it out"
        )
    sees = connector.grid_height, connector.grid_width
    if settings.key_grid > min(sees):
        raise InputError(f"--key-grid {settings.key_grid}: the encoder sees {sees[0]} x {sees[1]} patches; at most "
                         f"{min(sees)}")  # fmt: skip
    picture_dim = min(options.key_dim or settings.key_dim, connector.feature_dim * options.key_grid**2)
    question_dim = min(QUESTION_DIM, connector.width) if settings.key == "question" else 0
    return replace(
        settings,
        key_dim=connector.width if settings.key == "fused" else picture_dim + question_dim,
        question_dim=question_dim,
        latents=options.latents or latents.get(options.memory, settings.latents),
        latent_dim=options.latent_dim or (LATENT_DIM if paper else settings.latent_dim),
    )


def episodes_share(options: TrainOptions, memory: MemorySettings) -> float:
    """The share of the rows that are episodes, of those that can be.

    Raises:
        InputError: the memory, in stage "instruct" the checkpoint's, has no copy term.
    """
    if options.episodes and not memory.copy_dim:
        raise InputError(
            f"--episodes {options.episodes}: nothing is copied here; "
            "begin at a checkpoint of --memory tokens or hybrid with --copy"
        )
    return (EPISODES if options.episodes is None else options.episodes) if memory.copy_dim else 0.0


def memory_from(options: TrainOptions, *, whole: bool) -> float:
    """The share of the steps before any row sees its neighbours; `whole`: the connector is a whole model's own."""
    if options.memory_from is not None:
        return options.memory_from
    begins = options.stage == "align" and not whole and options.memory in WITH_TOKENS + WITH_LATENTS
    return MEMORY_FROM if begins else 0.0


def copying_steps(steps: int) -> int:
    """The steps that the copy term trains alone after `steps`."""
    return max(1, round(COPYING * steps))


def copying_settings(settings: TrainSettings) -> TrainSettings:
    """The run's settings for these steps."""
    rate = COPYING_RATE * settings.learning_rate
    return replace(settings, steps=settings.copying_steps, learning_rate=rate, memory_from=0.0)


def find_device(wanted: str) -> Device:
    """The device that "auto" stands for, or the one wanted if it is there."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device; use --device cpu")
    return "cuda" if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()) else "cpu"


def connector_settings(options: TrainOptions, grid: tuple[int, int, int], width: int) -> ConnectorSettings:
    """How an encoder's grid (H, W, C) becomes visual tokens.

    Without `visual_tokens` "pooled" gives `POOLED_TOKENS`, or all patches where there are fewer, "mlp" one a patch and
    "pixel_shuffle" the smallest blocks that divide the grid.

    Raises:
        InputError: a number of tokens that the connector cannot give; the message lists those it can.
    """
    height, wide, channels = grid
    wanted, patches = options.visual_tokens, height * wide
    if options.connector == "pooled":
        if wanted and wanted > patches:
            raise InputError(
                f"--visual-tokens {wanted}: from {height} x {wide} patches --connector pooled gives 1 to {patches}"
            )
        tokens = wanted or min(POOLED_TOKENS, patches)
        return ConnectorSettings(height, wide, channels, tokens, width)
    sides = [1] if options.connector == "mlp" else [s for s in range(2, height + 1) if not height % s and not wide % s]
    possible = [patches // side**2 for side in sides]
    if not possible or (wanted and wanted not in possible):
        given = f"--visual-tokens {wanted}" if wanted else f"--connector {options.connector}"
        can = ", ".join(map(str, possible)) or "no number of tokens; use another --connector"
        raise InputError(f"{given}: from {height} x {wide} patches --connector {options.connector} gives {can}")
    return ConnectorSettings(height, wide, channels, wanted or possible[0], width, options.connector)


def rows_at_once(options: TrainOptions, processes: int) -> int:
    """The rows that each process computes at once.

    Raises:
        InputError: the rows of a step cannot be divided among processes and passes.
    """
    share = options.batch_size // processes
    at_once = options.micro_batch or share
    if options.batch_size % processes or not share or share % at_once:
        raise InputError(
            f"--batch-size {options.batch_size}: must be a multiple of {processes} process(es) times --micro-batch "
            f"{at_once}; give a --batch-size or a --micro-batch that fits"
        )
    return at_once


def steps_of(options: TrainOptions, rows: int) -> int:
    """The steps of a run with `rows` training rows an epoch."""
    an_epoch = -(-rows // options.batch_size)
    return options.steps or an_epoch * (options.epochs or DEFAULT_EPOCHS)


def train_settings(
    options: TrainOptions, data: tuple[DataRef, ...], images: Path | None, rows: int, device: Device, *, processes: int,
    start: Path | None, episodes: float, whole: bool,
) -> TrainSettings:  # fmt: skip
    """The settings that the checkpoint keeps, for `rows` training rows an epoch."""
    tuned = options.stage == "instruct"
    return TrainSettings(
        data=data,
        images=str(images or ""),
        steps=steps_of(options, rows),
        batch_size=options.batch_size,
        micro_batch=rows_at_once(options, processes),
        learning_rate=options.learning_rate,
        warmup=options.warmup,
        weight_decay=options.weight_decay,
        dropout=0.0 if tuned or whole else options.dropout,
        bf16=options.bf16,
        stage=options.stage,
        started_from=str(start.resolve()) if start else "",
        lm_learning_rate=options.lm_learning_rate if tuned else 0.0,
        lora_rank=options.lora_rank,
        lora_alpha=(options.lora_alpha or 2 * options.lora_rank) if options.lora_rank else 0,
        fraction=options.fraction,
        seed=options.seed,
        device=device,
        eval_every=options.eval_every,
        episodes=episodes,
        memory_from=memory_from(options, whole=whole),
        reconstruct=options.reconstruct,
        freeze_values=options.freeze_values,
        random_values=options.random_values,
    )
