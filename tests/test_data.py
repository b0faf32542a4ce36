"""Conversation files: what is wrong is named with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tinyalign_edge.data import read_rows
from tinyalign_edge.errors import InputError

ASKED = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a cat"}]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    return tmp_path


def write(folder: Path, *rows: Any, name: str = "data.json") -> Path:
    path = folder / name
    lines = "\n".join(json.dumps(row) for row in rows)
    path.write_text(lines if name.endswith(".jsonl") else json.dumps(list(rows)), "utf-8")
    return path


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_rows_are_read_from_json_and_json_lines(images: Path, name: str) -> None:
    rows = read_rows(write(images, {"id": 7, "image": "a.png", "conversations": ASKED * 2}, name=name), images)
    assert [(row.id, row.path, len(row.turns)) for row in rows] == [("7", images / "a.png", 2)]
    assert rows[0].turns[0].question == "What?"
    assert rows[0].memory_turns == rows[0].turns


def test_the_memory_keeps_the_caption_where_a_row_has_one(images: Path) -> None:
    (row,) = read_rows(write(images, {"image": "a.png", "caption": "my cat", "conversations": ASKED}), images)
    assert [(turn.question, turn.answer) for turn in row.memory_turns] == [("", "my cat")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "x", "image": "gone.png", "conversations": ASKED}, r"row 2 \(id x\): image .*gone\.png does not exist"),
        ({"id": "x", "image": "../a.png", "conversations": ASKED}, "leaves the images folder"),
        ({"id": "x", "image": "/a.png", "conversations": ASKED}, "leaves the images folder"),
        ({"id": "x", "conversations": ASKED}, "key 'image' must name a file"),
        ({"id": "x", "image": "a.png", "conversations": ASKED[:1]}, "in pairs"),
        ({"id": "x", "image": "a.png", "conversations": ASKED[::-1]}, "expected a message"),
        ({"id": "x", "image": "a.png", "caption": 3, "conversations": ASKED}, "key 'caption' must be a text"),
        ("text", "row 2: need an object"),
    ],
)
def test_a_bad_row_is_named(images: Path, row: Any, message: str) -> None:
    good = {"image": "a.png", "conversations": ASKED}
    with pytest.raises(InputError, match=message):
        read_rows(write(images, good, row), images)


def test_malformed_json_is_named_with_line_and_column(images: Path) -> None:
    path = images / "data.json"
    path.write_text('[\n {"id": 1,}\n]', "utf-8")
    with pytest.raises(InputError, match=r"data\.json:2:\d+: not valid JSON"):
        read_rows(path, images)
    lines = images / "data.jsonl"
    lines.write_text('{"image": "a.png", "conversations": ' + json.dumps(ASKED) + "}\n{oops}\n", "utf-8")
    with pytest.raises(InputError, match=r"data\.jsonl:2:2: not valid JSON"):
        read_rows(lines, images)


def test_missing_files_and_empty_files_are_named(images: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_rows(images / "none.json", images)
    with pytest.raises(InputError, match="no such folder of images"):
        read_rows(images / "none.json", images / "none")
    with pytest.raises(InputError, match="holds no rows"):
        read_rows(write(images), images)
