"""Recipes: a file that says which towers are trained with which settings, in two stages.

description = "..."
[towers]
vision = "org/encoder"
lm = "org/model"
[align]            # and [instruct]: fields of `TrainOptions`, and data (a list) and images
batch_size = 256
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tinyalign_edge.config import from_json, read_small
from tinyalign_edge.errors import BundleError, InputError
from tinyalign_edge.train.options import TrainOptions
from tinyalign_edge.train.settings import Stage

SHIPPED = Path(__file__).parent.parent / "recipes"
NOT_IN_RECIPES = ("stage", "cache_features", "device", "skip_bad", "loaders")


@dataclass(frozen=True)
class StageRecipe:
    """One stage: the options that the recipe gives, by their names."""

    options: dict[str, Any]
    data: tuple[str, ...] = ()
    images: str | None = None


@dataclass(frozen=True)
class Recipe:
    """Towers and stages."""

    description: str
    vision: str
    lm: str
    align: StageRecipe
    instruct: StageRecipe

    def stage(self, name: Stage) -> StageRecipe:
        """The stage of this name."""
        return self.align if name == "align" else self.instruct


@dataclass(frozen=True)
class _Towers:
    vision: str
    lm: str


@dataclass(frozen=True)
class _File:
    description: str
    towers: _Towers
    align: Any
    instruct: Any


@dataclass(frozen=True)
class _Data:
    data: tuple[str, ...] = ()
    images: str | None = None


def load_recipe(name: str) -> Recipe:
    """Read a recipe file, or one that ships with the package, by its name.

    Raises:
        InputError: no such recipe, not TOML, a key that is unknown or missing, or a value of the wrong type.
    """
    path = Path(name) if Path(name).suffix == ".toml" else SHIPPED / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.toml")))
        raise InputError(f"--recipe {name}: no such file, and none of those that ship: {known}")
    try:
        data = tomllib.loads(read_small(path).decode("utf-8"))
        file = from_json(_File, data, str(path))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid TOML ({error})") from None
    except BundleError as error:
        raise InputError(str(error)) from None
    stages = (_stage(table, f"{path}.{stage}") for stage, table in (("align", file.align), ("instruct", file.instruct)))
    return Recipe(file.description, file.towers.vision, file.towers.lm, *stages)


def _stage(table: Any, where: str) -> StageRecipe:
    if not isinstance(table, dict):
        raise InputError(f"{where}: expected a table, found {type(table).__name__}")
    known = [field.name for field in fields(TrainOptions) if field.name not in NOT_IN_RECIPES]
    options = {key: value for key, value in table.items() if key not in ("data", "images")}
    for key in options:
        if key not in known:
            raise InputError(f"{where}: unknown key {key!r}; known: data, images, {', '.join(known)}")
    try:
        given = from_json(_Data, {key: value for key, value in table.items() if key not in options}, where)
        checked = from_json(TrainOptions, options, where)
    except BundleError as error:
        raise InputError(str(error)) from None
    return StageRecipe({key: getattr(checked, key) for key in options}, given.data, given.images)
