"""The demo's world: its pictures, what is said and asked about them, and the data set on disk."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from tinyalign_edge.demo.dataset import write_dataset
from tinyalign_edge.demo.texts import FARTHER, KINDS_OF_QUESTION, NAMES, RELATIONS, Question, caption, questions
from tinyalign_edge.demo.world import LATTICE, SIDE, Object, Scene, draw, kind_map, make_scenes

ROW = Scene(
    (
        Object("small", "red", "circle", 18, 48),
        Object("large", "blue", "square", 48, 48),
        Object("small", "red", "triangle", 78, 48),
    ),
    "row",
)
COLUMN = Scene((Object("large", "green", "triangle", 48, 24), Object("small", "blue", "triangle", 48, 72)), "column")
ALONE = Scene((Object("small", "yellow", "triangle", 30, 60),), "row")


def answers(scene: Scene) -> dict[str, str]:
    """Every question that 300 draws bring up, with its answer; a contradiction fails."""
    found: dict[str, str] = {}
    rng = random.Random(0)
    for _ in range(300):
        for question in questions(scene, rng):
            assert found.setdefault(question.text, question.answer) == question.answer
    return found


def expected(scene: Scene, question: Question) -> str:
    """The answer worked out from coordinates, without the scene's order."""
    words = question.text.rstrip("?").replace(",", "").split()
    named = {item.name: item for item in scene.objects}
    if question.kind == "count":
        return ["one", "two", "three"][len(scene.objects) - 1]
    if question.kind == "exists":
        return "yes" if " ".join(words[-2:]) in named else "no"
    if question.kind == "colour":
        (item,) = [item for item in scene.objects if item.shape == words[-1]]
        return item.colour
    if question.kind == "shape":
        (item,) = [item for item in scene.objects if item.colour == words[-2]]
        return item.shape
    axis = "x" if {"left", "right"} & set(words) else "y"
    forward = bool({"left", "higher", "above"} & set(words))
    spot = {name: getattr(item, axis) * (1 if forward else -1) for name, item in named.items()}
    if question.kind == "relation":
        asked = [name for name in named if name in question.text]
        return min(asked, key=spot.__getitem__)
    (beyond,) = [name for name in named if spot[name] < spot[" ".join(words[-2:])]]
    return beyond


def test_objects_never_overlap_and_stay_inside() -> None:
    for scene in make_scenes(2000, seed=0):
        for i, item in enumerate(scene.objects):
            assert item.x % LATTICE == item.y % LATTICE == 0
            assert item.radius <= min(item.x, item.y) and max(item.x, item.y) <= SIDE - item.radius
            for other in scene.objects[:i]:
                apart = max(abs(item.x - other.x), abs(item.y - other.y))
                assert apart >= item.radius + other.radius


def test_objects_stand_in_the_order_they_are_listed_in() -> None:
    for scene in make_scenes(500, seed=1):
        places = [item.x if scene.axis == "row" else item.y for item in scene.objects]
        assert places == sorted(places)
        assert len({item.name for item in scene.objects}) == len(scene.objects)


def test_the_same_seed_gives_the_same_scenes_and_another_seed_others() -> None:
    assert make_scenes(50, seed=3) == make_scenes(50, seed=3)
    assert make_scenes(50, seed=3) != make_scenes(50, seed=4)


def test_a_picture_shows_each_object_where_it_stands_on_the_tint() -> None:
    image = draw(ROW)
    assert (image.mode, image.size) == ("RGB", (SIDE, SIDE))
    assert [image.getpixel((item.x, item.y)) for item in ROW.objects] == [(214, 48, 49), (41, 98, 216), (214, 48, 49)]
    assert image.getpixel((0, 0)) == ROW.tint


def test_a_kind_map_marks_the_patches_of_every_object() -> None:
    marks = kind_map(ROW, 8)
    assert marks.shape == (8, 8) and marks.dtype == np.int64
    assert set(np.unique(marks)) == {0, *(1 + item.kind for item in ROW.objects)}


@pytest.mark.parametrize("scene", [ROW, COLUMN, ALONE])
def test_a_caption_names_every_object_with_its_size_in_order(scene: Scene) -> None:
    said = {caption(scene, random.Random(seed)) for seed in range(50)}
    assert len(said) == 3
    for text in said:
        places = [text.index(f"{item.size} {item.name}") for item in scene.objects]
        assert places == sorted(places) and text.endswith(".")


def test_answers_follow_from_a_row_of_three() -> None:
    found = answers(ROW)
    assert found["How many objects are there?"] == "three"
    assert found["Is there a red circle?"] == "yes" and found["Is there a blue circle?"] == "no"
    assert found["What colour is the square?"] == "blue" and found["What shape is the blue object?"] == "square"
    assert found["What is left of the blue square?"] == "red circle"
    assert found["Which is farther right, the red circle or the red triangle?"] == "red triangle"
    assert "What shape is the red object?" not in found  # two are red


def test_answers_follow_from_a_column_of_two() -> None:
    found = answers(COLUMN)
    assert found["What is above the blue triangle?"] == "green triangle"
    assert found["What is below the green triangle?"] == "blue triangle"
    assert found["Which is higher, the blue triangle or the green triangle?"] == "green triangle"
    assert not [text for text in found if text.startswith("What colour") or "left" in text or "right" in text]


def test_an_object_alone_is_not_compared() -> None:
    assert {q.kind for seed in range(50) for q in questions(ALONE, random.Random(seed))} == {
        "count", "exists", "colour", "shape",
    }  # fmt: skip


def test_every_answer_agrees_with_the_coordinates() -> None:
    rng = random.Random(5)
    for scene in make_scenes(1000, seed=5):
        asked = questions(scene, rng)
        assert len({q.kind for q in asked}) == len(asked)
        assert [q.answer for q in asked] == [expected(scene, q) for q in asked]


def test_no_kind_of_question_is_won_by_its_commonest_answer() -> None:
    rng = random.Random(6)
    told: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for scene in make_scenes(4000, seed=6):
        for question in questions(scene, rng):
            told[question.kind][question.answer] += 1
    share = {kind: max(counts.values()) / counts.total() for kind, counts in told.items()}
    limits = {
        "count": 0.53,
        "exists": 0.53,
        "colour": 0.3,
        "shape": 0.38,
        "relation": 0.12,
        "beside": 0.12,
    }
    assert tuple(limits) == KINDS_OF_QUESTION
    assert not {kind: value for kind, value in share.items() if value > limits[kind]}


def test_the_order_of_two_names_does_not_give_the_relation_away() -> None:
    rng = random.Random(7)
    asked = [q for s in make_scenes(4000, seed=7) for q in questions(s, rng) if q.kind == "relation"]
    first = sum(q.text.split(", the ")[1].startswith(q.answer) for q in asked) / len(asked)
    assert 0.47 < first < 0.53
    assert {axis: len(words) for axis, words in FARTHER.items()} == dict.fromkeys(RELATIONS, 2)


def test_the_same_arguments_write_the_same_bytes(tmp_path: Path) -> None:
    digests = []
    for name in ("one", "two"):
        folder = tmp_path / name
        write_dataset(folder, make_scenes(4, seed=1), make_scenes(3, seed=2), seed=0)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        digests.append([(f.relative_to(folder), hashlib.sha256(f.read_bytes()).hexdigest()) for f in files])
    assert digests[0] == digests[1] and len(digests[0]) == 4 + 3 + 2


def test_rows_are_llava_conversations_about_pictures_that_exist(tmp_path: Path) -> None:
    write_dataset(tmp_path, make_scenes(6, seed=1), make_scenes(5, seed=2), seed=0)
    train = json.loads((tmp_path / "train.json").read_text("utf-8"))
    test = json.loads((tmp_path / "test.json").read_text("utf-8"))
    assert (len(train), len(test)) == (6, 5)
    for row in train + test:
        assert (tmp_path / row["image"]).is_file()
        turns = row["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert ["<image>\n" in turn["value"] for turn in turns] == [True] + [False] * (len(turns) - 1)
    assert all(any(name in row["caption"] for name in NAMES) and len(row["conversations"]) >= 8 for row in train)
    assert all("caption" not in row and len(row["conversations"]) == 2 and row["kind"] for row in test)
