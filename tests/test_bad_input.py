"""What an app may be given: a clear error or a defined answer, and the model goes on."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tinyalign_edge as ta
from tests.conftest import STORED_BUNDLE
from tests.test_prefix import PICTURE, QUESTIONS

LONE_SURROGATE = "\ud800"


@pytest.fixture(scope="module")
def model() -> ta.Model:
    return ta.load(STORED_BUNDLE, threads=1)


def refused(model: ta.Model, act: Callable[[], object], part: str) -> None:
    """`act` is an InputError of one line that holds `part`, and the model answers as before."""
    expected = model.ask(PICTURE, QUESTIONS[0], max_new_tokens=4).text
    with pytest.raises(ta.InputError) as error:
        act()
    assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert model.ask(PICTURE, QUESTIONS[0], max_new_tokens=4).text == expected


def huge() -> bytes:
    """A PNG of 100 megapixels, small as a file. Pillow warns of it, and warnings are errors here."""
    buffer = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("picture", "part"),
    [
        pytest.param(b"", "not a picture", id="empty"),
        pytest.param(b"%PDF-1.7", "not a picture", id="another kind of file"),
        pytest.param(PICTURE.read_bytes()[:200], "truncated or damaged", id="cut short"),
        pytest.param(huge, "more than the 50000000", id="100 megapixels"),
        pytest.param(bytes(64 * 2**20 + 1), "more than the 67108864 allowed", id="65 MiB"),
        pytest.param("nowhere.png", "nowhere.png: no such image file", id="missing"),
        pytest.param(STORED_BUNDLE, "Is a directory", id="a folder"),
        pytest.param("a\0b", r"'a\x00b': cannot be read", id="no name of a file"),
        pytest.param(LONE_SURROGATE, r"'\ud800': cannot be read", id="no text"),
        pytest.param(None, "NoneType is no picture; give a path", id="nothing"),
        pytest.param(bytearray(b"x"), "bytearray is no picture", id="another type"),
        pytest.param(np.zeros((4, 4, 4), np.uint8), "need (height, width, 3) uint8", id="with alpha"),
        pytest.param(np.zeros((0, 4, 3), np.uint8), "need (height, width, 3) uint8", id="no pixels"),
        pytest.param(np.zeros((4, 4, 3)), "got (4, 4, 3) float64", id="floats"),
    ],
)
def test_what_is_not_a_picture(model: ta.Model, picture: Any, part: str) -> None:
    given = picture() if callable(picture) else picture
    for act in (
        lambda: model.encode(given),
        lambda: model.ask(given, QUESTIONS[0]),
        lambda: model.chat().ask(QUESTIONS[0], given),
        lambda: model.memory and model.memory.add(given, "a cat"),
    ):
        refused(model, act, part)


def test_an_empty_file(model: ta.Model, tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    refused(model, lambda: model.ask(tmp_path / "empty.jpg", QUESTIONS[0]), "empty.jpg: not a picture")


@pytest.mark.parametrize(
    ("question", "part"),
    [
        ("", "question: it is empty"),
        (" \n<image>", "question: it is empty"),
        ("why " * 400, "the context has 256; ask less"),
        (None, "question: None is not a text"),
        (b"What?", "question: b'What?' is not a text"),
        (LONE_SURROGATE, "is not valid Unicode"),
    ],
)
def test_what_is_not_a_question(model: ta.Model, question: Any, part: str) -> None:
    refused(model, lambda: model.ask(PICTURE, question), part)
    refused(model, lambda: model.chat().ask(question, PICTURE), part)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"colour": "red"}, "option 'colour': unknown; known: max_new_tokens"),
        ({"processors": [3]}, "processors (3,): must be callables"),
        ({"processors": [lambda ids, logits: "x"]}, "numbers, some of them finite"),
        ({"choices": ["yes", "no " * 300]}, "tokens do not fit into the context"),
        ({"choices": [LONE_SURROGATE]}, "is not valid Unicode"),
    ],
)
def test_options_that_cannot_be(model: ta.Model, options: dict[str, Any], part: str) -> None:
    """`test_generation` has the bounds of each option."""
    refused(model, lambda: model.ask(PICTURE, QUESTIONS[0], **options), part)
    refused(model, lambda: model.chat().ask(QUESTIONS[0], PICTURE, **options), part)


def test_a_picture_of_another_model(model: ta.Model) -> None:
    other = replace(model.encode(PICTURE, memories=()), encoder="0" * 64)
    for act in (
        lambda: model.ask(other, QUESTIONS[0]),
        lambda: model.chat().ask(QUESTIONS[0], other),
        lambda: model.answer_nll(other, QUESTIONS[0], "red"),
        lambda: model.memory and model.memory.add(other, "a cat"),
        lambda: model.memory and model.memory.search(other),
    ):
        refused(model, act, "encoded by another model")
    narrow = {name: getattr(other, name)[:, :16] for name in ("visual_tokens", "memory_tokens")}
    by_hand = replace(other, encoder="", **narrow)
    refused(model, lambda: model.ask(by_hand, QUESTIONS[0]), "tokens of width 16, this model reads 32")


def test_an_encoded_picture_cannot_be_changed(model: ta.Model) -> None:
    """The model keeps it for the next one who shows it."""
    image = model.encode(PICTURE)
    for array in (image.visual_tokens, image.key, image.memory_tokens, image.tokens):
        assert array is not None
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    assert model.ask(image, QUESTIONS[0]).text == model.ask(PICTURE, QUESTIONS[0]).text


def test_threads_that_are_no_whole_number() -> None:
    with pytest.raises(ta.InputError, match="whole number"):
        ta.load(STORED_BUNDLE, threads=1.5)  # type: ignore[arg-type]
