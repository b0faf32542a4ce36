"""The documented options of `train` are those that there are."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

pytest.importorskip("torch")

import typer.main

from tinyalign_edge.cli import app
from tinyalign_edge.train.options import TrainOptions
from tinyalign_edge.train.recipe import NOT_IN_RECIPES

PAGE = Path(__file__).parent.parent / "docs" / "training.md"
TABLE = [
    [cell.strip() for cell in line.split("|")[1:3]] for line in PAGE.read_text("utf-8").splitlines() if line[:1] == "|"
]


def test_every_option_of_the_command_stands_in_the_table_and_no_other() -> None:
    command = typer.main.get_command(app).commands["train"]  # type: ignore[attr-defined]
    there = {name for option in command.params for name in (*option.opts, *option.secondary_opts)} - {"--help"}
    assert {name for option, _ in TABLE for name in re.findall(r"(?<![\w-])--?[a-z][\w-]*", option)} == there


def test_every_key_of_a_recipe_stands_in_the_table_and_no_other() -> None:
    named = set()
    for option, key in TABLE[2:]:
        if key == "yes":
            named |= {name.removeprefix("--").replace("-", "_") for name in re.findall(r"--(?!no-)[a-z0-9-]+", option)}
        else:
            named |= set(re.findall(r"`(\w+)`", key))
    known = {field.name for field in fields(TrainOptions)} - set(NOT_IN_RECIPES)
    assert named == known | {"data", "images"}
