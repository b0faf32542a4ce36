"""What the command line asks of `train`, put together with a recipe: what is given there goes before the recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyalign_edge.errors import InputError
from tinyalign_edge.train.options import TrainOptions
from tinyalign_edge.train.processes import is_first
from tinyalign_edge.train.recipe import StageRecipe, load_recipe
from tinyalign_edge.train.run import train
from tinyalign_edge.train.settings import Stage

MADE_IN_ALIGN = (
    "memory", "connector", "visual_tokens", "k", "image_size", "key", "key_grid", "key_dim", "value_tokens", "gate",
    "latents", "latent_dim", "copy_words", "memory_first", "memory_dropout", "dropout",
)  # fmt: skip

OF_THE_VLM = ("connector", "visual_tokens", "image_size", "dropout")


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


def run_command(command: TrainCommand) -> bool:
    """Train; returns whether this is the process that wrote the checkpoint.

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
                raise InputError(f"{name} {given[name]}: with --vlm it is the model's own; leave it out")
    data = command.data or stage.data
    images = command.images or (Path(stage.images) if stage.images else None)
    if not data:
        raise InputError("--data: give it on the command line or in the recipe")
    towers = recipe if recipe and command.stage == "align" and command.vlm is None else None
    train(
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
    return is_first()
