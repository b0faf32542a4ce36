"""What the command line asks of `train`, put together with a recipe: what is given there goes before the recipe."""

from __future__ import annotations

from collections.abc import Iterable
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
    if command.options.get("memory") == "none":
        other |= {*OF_A_MEMORY, "memory_first", "random_values"}
    if command.options.get("lora_rank") == 0:
        other.add("lora_alpha")
    given = {name: value for name, value in stage.options.items() if name not in other} | command.options
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
    def refuse(names: Iterable[str], why: str) -> None:
        for name in names:
            if name in given:
                value = "" if given[name] is True else f" {given[name]}"
                own = name in command.options
                told = f"{option_of(name)}{value}" if own else f"{name}{value} (of --recipe {command.recipe})"
                raise InputError(f"{told}: {why}")

    memory = given.get("memory", TrainOptions.memory)
    if command.stage == "instruct":
        refuse(MADE_IN_ALIGN, "belongs to stage align; --stage instruct takes it from --from")
    else:
        refuse(["lm_learning_rate"], "is for --stage instruct; leave it out")
    if command.vlm is not None:
        refuse(OF_THE_VLM, "with --vlm it is the model's own; leave it out")
    if not given.get("lora_rank"):
        refuse(["lora_alpha"], "there are no adapters without a rank (--lora)")
    if command.resume:  # an interrupted run is compared with what it was begun with
        return
    wanted = [name for name in OF_A_MEMORY if command.options.get(name)]
    if memory == "none" and command.stage == "align":
        refuse(wanted, "there is no memory with --memory none; leave it out")
    if memory == "tokens":
        refuse([name for name in wanted if name in OF_LATENTS], "--memory tokens has none; leave it out")
