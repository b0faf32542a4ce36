"""A data set of the demo's world on disk: PNG pictures and rows in LLaVA's conversation format."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tinyalign_edge.config import write_json
from tinyalign_edge.demo.texts import Question, caption, questions
from tinyalign_edge.demo.world import Scene, draw

Row = dict[str, Any]


def write_dataset(
    folder: Path,
    train: Sequence[Scene],
    test: Sequence[Scene],
    *,
    seed: int,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Write `folder`/images, `folder`/train.json and `folder`/test.json; the same arguments give the same bytes.

    A training row has the scene's caption and one turn for each kind of question it allows; a test row has one
    question, its kind under "kind", and no caption. `advance` is called after each picture.
    """
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for part, scenes, row in (("train", train, _train_row), ("test", test, _test_row)):
        rows = []
        for number, scene in enumerate(scenes):
            rows.append(row(folder, f"{part}-{number:05d}", scene, rng))
            advance()
        write_json(folder / f"{part}.json", rows)


def _train_row(folder: Path, name: str, scene: Scene, rng: random.Random) -> Row:
    row = _save(folder, name, scene) | {"caption": caption(scene, rng)}
    return row | {"conversations": _turns(questions(scene, rng))}


def _test_row(folder: Path, name: str, scene: Scene, rng: random.Random) -> Row:
    question = questions(scene, rng)[0]
    return _save(folder, name, scene) | {"kind": question.kind, "conversations": _turns([question])}


def _save(folder: Path, name: str, scene: Scene) -> Row:
    image = f"images/{name}.png"
    draw(scene).save(folder / image, compress_level=1)
    return {"id": name, "image": image}


def _turns(asked: Sequence[Question]) -> list[dict[str, str]]:
    turns = []
    for number, question in enumerate(asked):
        turns.append({"from": "human", "value": ("" if number else "<image>\n") + question.text})
        turns.append({"from": "gpt", "value": question.answer})
    return turns
