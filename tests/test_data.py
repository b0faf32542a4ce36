"""Conversation files: what is wrong is named with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tinyalign_edge.data import read_rows
from tinyalign_edge.errors import InputError
from tinyalign_edge.jsonrows import MAX_ROW_BYTES, RowFile

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


def test_brackets_quotes_and_escapes_in_texts_do_not_divide_rows(tmp_path: Path) -> None:
    rows = ["[{", 'a "quoted" \\ ]', {"k": ["}", {"deep": "\u00e9\n"}]}, [], 7, None, "é" * 3000]
    for indent in (None, 2):
        for ascii_only in (True, False):
            path = tmp_path / "rows.json"
            path.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_only), "utf-8")
            file = RowFile(path)
            assert [file[i] for i in range(len(file))] == rows
    lines = tmp_path / "rows.jsonl"
    lines.write_bytes(b"\r\n".join(json.dumps(row).encode() for row in rows) + b"\r\n\r\n")
    file = RowFile(lines)
    assert [file[i] for i in range(len(file))] == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}', r"rows\.json:1:10: not valid JSON \(The list is not closed"),
        ('[{"a": 1}]\n\n x', r"rows\.json:3:2: not valid JSON \(Extra data"),
        ('[\n"abc]', r"rows\.json:2:1: not valid JSON \(Unterminated string"),
        ("[1,]", r"rows\.json:1:4: not valid JSON"),
        ('[1, {"a" 2}]', r"rows\.json:1:10: not valid JSON"),
        ('{"a": 1}', "found an object; JSON lines must end in .jsonl"),
        ("rows", r"rows\.json:1:1: not valid JSON"),
        ("[" * 100_000 + "]" * 100_000, r"rows\.json row 1: cannot be read as JSON"),
        ('["' + "a" * MAX_ROW_BYTES + '"]', r"rows\.json row 1: 1048578 bytes, a row may have 1048576"),
    ],
)
def test_a_list_that_is_not_one_is_named_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text, "utf-8")
    with pytest.raises(InputError, match=message):
        file = RowFile(path)
        [file[i] for i in range(len(file))]
