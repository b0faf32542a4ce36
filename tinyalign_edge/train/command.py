"""What the command line asks of `train`, put together with a recipe: what is given there goes before the recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyalign_edge.errors import InputError
from tinyalign_edge.train.options import TrainOptions, option_of
from tinyalign_edge.train.processes import is_first
from tinyalign_edge.train.recipe import StageRecipe, load_recipe
from tinyalign_edge.train.run import train
from tinyalign_edge.train.settings import CheckpointConfig, Stage

MADE_IN_ALIGN = (
    "memory", "connector", "visual_tokens", "k", "image_size", "key", "key_grid", "key_dim", "value_tokens", "gate",
    "latents", "latent_dim", "copy_words", "memory_first", "memory_dropout", "dropout",
)  # fmt: skip

OF_THE_VLM = ("connector", "visual_tokens", "image_size", "dropout")
OF_A_MEMORY = (
    "k", "key", "key_grid", "key_dim", "value_tokens", "gate", "latents", "latent_dim", "copy_words", "episodes",
    "memory_dropout", "memory_from", "reconstruct", "freeze_values",
)  # fmt: skip
OF_LATENTS = ("latents", "latent_dim")


@dataclass(frozen=True)
class TrainCommand:
    """The command line's arguments; `options` are those of `TrainOptions` that were given."""

    stage: Stage
    options: dict[str, Any]
    data: tuple[str, ...]
    images: Path | None
    vision: str | None
    lm: str | None
    vlm: Path | None
    chat_template: Path | None
    start: Path | None
    out: Path
    resume: bool
    recipe: str | None


def run_command(command: TrainCommand) -> CheckpointConfig | None:
    """Train; returns what the checkpoint's `config.json` holds, or None if another process wrote it.

    Raises:
        InputError: something is missing, or given where it has no effect; and as `train`.
    """
    recipe = load_recipe(command.recipe) if command.recipe else None
    stage = recipe.stage(command.stage) if recipe else StageRecipe({})
    rivals = {"steps": "epochs", "epochs": "steps"}  # what is given takes the recipe's other way to say it away
    other = {rivals[name] for name in command.options if name in rivals}
    given = {name: value for name, value in stage.options.items() if name not in other} | command.options
    if command.stage == "instruct":
        for name in MADE_IN_ALIGN:
            if name in given:
                raise InputError(f"{name} {given[name]}: belongs to stage align; --stage instruct takes it from --from")
    if command.vlm is not None:
        for name in OF_THE_VLM:
            if name in given:
                whose = "" if name in command.options else f" (of --recipe {command.recipe})"
                raise InputError(f"{name} {given[name]}{whose}: with --vlm it is the model's own; leave it out")
    _refuse_without_effect(command, given)
    data = command.data or stage.data
    images = command.images or (Path(stage.images) if stage.images else None)
    if not data:
        raise InputError("--data: give it on the command line or in the recipe")
    towers = recipe if recipe and command.stage == "align" and command.vlm is None else None
    config = train(
        data=data,
        images=images,
        vision=command.vision or (towers.vision if towers else None),
        lm=command.lm or (towers.lm if towers else None),
        vlm=command.vlm,
        chat_template=command.chat_template,
        start=command.start,
        out=command.out,
        options=TrainOptions(stage=command.stage, **given),
        resume=command.resume,
    )
    return config if is_first() else None


def _refuse_without_effect(command: TrainCommand, given: dict[str, Any]) -> None:
    """What a recipe says of a memory is left aside where the command line wants none."""
    memory = given.get("memory", TrainOptions.memory)
    if command.stage == "align":
        for name in OF_A_MEMORY:
            if memory == "none" and command.options.get(name):
                raise InputError(
                    f"{option_of(name)} {given[name]}: there is no memory with --memory none; leave it out"
                )
            if name in OF_LATENTS and name in command.options and memory == "tokens":
                raise InputError(f"{option_of(name)} {given[name]}: --memory tokens has none; leave it out")
        if "lm_learning_rate" in given:
            raise InputError(f"--lm-learning-rate {given['lm_learning_rate']}: is for --stage instruct; leave it out")
    if "lora_alpha" in given and "lora_rank" not in given:
        raise InputError(f"lora_alpha {given['lora_alpha']}: there are no adapters without a rank (--lora)")
