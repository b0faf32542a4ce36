"""Options of an answer: drawing, stopping, choosing, constraining."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import tinyalign_edge as ta
from tests.conftest import STORED_BUNDLE
from tests.test_prefix import PICTURE, QUESTIONS, drawn
from tinyalign_edge.runtime.picker import Picker
from tinyalign_edge.runtime.text import Text

Floats = npt.NDArray[np.float32]
DRAWS = 5_000


@pytest.fixture(scope="module")
def model() -> ta.Model:
    return ta.load(STORED_BUNDLE, threads=1)


def test_a_text_shown_piece_by_piece_is_the_whole_one_without_white_space_at_its_ends(model: ta.Model) -> None:
    ids = model.prompt.tokenizer.encode("  one  two. ", add_special_tokens=False).ids
    text = Text(model.prompt)
    pieces = [text.push(token) for token in ids]
    assert not any(piece.endswith(" ") for piece in pieces)
    assert "".join(pieces) + text.end() == text.shown == model.prompt.text(ids) == "one  two."


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"heat": 1}, "option 'heat': unknown; known: max_new_tokens, temperature"),
        ({"temperature": -1}, "temperature -1: must be 0 to 100"),
        ({"temperature": "hot"}, "wrong type"),
        ({"top_k": 0}, "top_k 0: must be a whole number of at least 1"),
        ({"top_k": 2.5}, "top_k 2.5: must be a whole number"),
        ({"processors": 3}, "wrong type"),
        ({"stop": [1]}, "stop .*: must be at most 256 texts"),
        ({"top_p": 0}, "top_p 0: must be above 0"),
        ({"min_p": 2}, "min_p 2: must be 0 to 1"),
        ({"seed": -1}, "seed -1: must be a whole number of at least 0"),
        ({"repetition_penalty": 0}, "repetition_penalty 0: must be above 0"),
        ({"max_new_tokens": 0}, "max_new_tokens 0: must be a whole number of at least 1"),
        ({"timeout_s": 0}, "timeout_s 0: must be above 0"),
        ({"stop": ["a", ""]}, "stop .*: must be at most"),
        ({"choices": [""]}, "choices .*: must be at most"),
        ({"choices": ["a"], "regex": "a"}, "give one of them"),
    ],
)
def test_a_wrong_option_is_named_with_what_it_must_be(model: ta.Model, options: dict[str, Any], part: str) -> None:
    with pytest.raises(ta.InputError, match=part):
        model.ask(PICTURE, QUESTIONS[0], **options)


def test_options_are_given_as_a_whole_or_one_by_one(model: ta.Model) -> None:
    short = ta.Generation(max_new_tokens=2)
    assert model.ask(PICTURE, QUESTIONS[0], short).tokens == 2
    assert model.ask(PICTURE, QUESTIONS[0], short, max_new_tokens=1).tokens == 1


def test_the_same_seed_gives_the_same_text_and_others_give_others(model: ta.Model) -> None:
    def say(seed: int) -> str:
        return model.ask(PICTURE, QUESTIONS[0], temperature=1.5, seed=seed, max_new_tokens=8).text

    texts = [say(seed) for seed in range(8)]
    assert texts == [say(seed) for seed in range(8)]
    assert len(set(texts)) > 1


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.7}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.71}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"min_p": 0.45}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"top_k": 3, "top_p": 0.5}, [4 / 7, 3 / 7, 0, 0]),
    ],
)
def test_tokens_are_drawn_with_their_probabilities(options: dict[str, Any], shares: Sequence[float]) -> None:
    scores = np.log([0.1, 0.4, 0.3, 0.2]).astype(np.float32)  # token 0 is the least likely
    picker = Picker(ta.Generation(temperature=1, seed=0, **options))
    found = np.bincount([picker.pick(scores) for _ in range(DRAWS)], minlength=4)[[1, 2, 3, 0]] / DRAWS
    expected = np.array(shares)
    np.testing.assert_array_equal(found == 0, expected == 0)
    assert np.all(np.abs(found - expected) <= 4 * np.sqrt(expected * (1 - expected) / DRAWS))


def test_temperature_sharpens_and_zero_takes_the_best() -> None:
    scores = np.log([0.2, 0.8]).astype(np.float32)
    cold = Picker(ta.Generation(temperature=0.5, seed=0))
    share = np.mean([cold.pick(scores) for _ in range(DRAWS)])
    assert abs(share - 0.64 / 0.68) <= 4 * np.sqrt(0.94 * 0.06 / DRAWS)
    assert Picker(ta.Generation()).pick(scores) == 1


def test_a_repetition_penalty_divides_what_is_positive_and_multiplies_what_is_negative() -> None:
    picker = Picker(ta.Generation(repetition_penalty=2))
    logits = np.array([4, -4, 4, -4], np.float32)
    np.testing.assert_array_equal(picker.scores([0, 1, 0], logits), [2, -8, 4, -4])
    np.testing.assert_array_equal(logits, [4, -4, 4, -4])
    np.testing.assert_array_equal(picker.scores([], logits), logits)


def test_a_stop_text_ends_the_answer_wherever_tokens_meet(model: ta.Model) -> None:
    text = model.ask(PICTURE, QUESTIONS[0], max_new_tokens=10).text
    parts = {text[i : i + size] for size in (1, 2, 5) for i in range(len(text) - size)}
    assert len(parts) > 10
    for stop in parts:
        stream = model.stream(PICTURE, QUESTIONS[0], max_new_tokens=10, stop=[stop, "never said"])
        before = text[: text.index(stop)].rstrip()
        assert "".join(stream) == before
        assert (stream.result().text, stream.result().finish_reason) == (before, "stop")
    assert model.ask(PICTURE, QUESTIONS[0], max_new_tokens=10, stop=text + "!").text == text  # what was held back


def test_processors_are_plain_callables(model: ta.Model) -> None:
    word = model.prompt.tokenizer.encode(" red").ids[0]

    def insist(ids: Sequence[int], logits: Floats) -> Floats:
        forced = np.full_like(logits, -np.inf)
        forced[model.manifest.prompt.eos_token_ids[0] if len(ids) == 3 else word] = 0
        return forced

    answer = model.ask(PICTURE, QUESTIONS[0], processors=insist)
    assert (answer.text, answer.tokens) == (model.prompt.text([word] * 3), 3)


def test_a_processor_that_raises_or_returns_nonsense_leaves_the_model_usable(model: ta.Model) -> None:
    expected = model.ask(PICTURE, QUESTIONS[0]).text

    def raises(ids: Sequence[int], logits: Floats) -> Floats:
        if len(ids) == 2:
            raise KeyError("mine")
        return logits

    with pytest.raises(KeyError, match="mine"):
        model.ask(PICTURE, QUESTIONS[0], processors=[raises])
    for nonsense in (lambda _, logits: logits[1:], lambda _, logits: logits * np.nan):
        with pytest.raises(ta.InputError, match="logits processor"):
            model.ask(PICTURE, QUESTIONS[0], processors=[nonsense])
    assert model.ask(PICTURE, QUESTIONS[0]).text == expected


def test_the_likeliest_choice_is_the_answer(fp32_bundle: Path) -> None:
    choices = ("red", "a large blue circle on the left", "two", "no")
    with ta.load(fp32_bundle, threads=1) as model:
        for picture in (drawn(1), drawn(2)):
            image = model.encode(picture)
            for question in QUESTIONS:
                answer = model.ask(image, question, choices=choices)
                expected = [-float(model.answer_nll(image, question, choice).mean()) for choice in choices]
                np.testing.assert_allclose(answer.likelihoods, expected, rtol=1e-3)
                assert answer.text == choices[int(np.argmax(expected))]
        assert model.ask(image, question, choices="  just this ").text == "just this"


def test_an_answer_matches_its_regular_expression(model: ta.Model) -> None:
    pytest.importorskip("llguidance")
    for question in QUESTIONS:
        answer = model.ask(PICTURE, question, regex="(red|green|blue) [a-z]{3,6}\\.")
        assert re.fullmatch("(red|green|blue) [a-z]{3,6}\\.", answer.text)
        assert answer.finish_reason == "stop"
    drawn_text = model.ask(PICTURE, QUESTIONS[0], regex="[0-9]{4}", temperature=2, seed=1).text
    assert re.fullmatch("[0-9]{4}", drawn_text)


def test_an_answer_is_json_of_its_schema(model: ta.Model) -> None:
    pytest.importorskip("llguidance")
    properties = {"colour": {"enum": ["red", "blue"]}, "seen": {"type": "boolean"}}
    schema = {"type": "object", "properties": properties, "required": ["colour", "seen"], "additionalProperties": False}
    for given in (schema, json.dumps(schema)):
        answer = model.ask(PICTURE, QUESTIONS[0], json_schema=given, max_new_tokens=60)
        found = json.loads(answer.text)
        assert set(found) == {"colour", "seen"}
        assert found["colour"] in ("red", "blue")
        assert isinstance(found["seen"], bool)


def test_a_constraint_that_is_not_understood_is_one_line(model: ta.Model) -> None:
    pytest.importorskip("llguidance")
    with pytest.raises(ta.InputError, match="regex: not understood"):
        model.ask(PICTURE, QUESTIONS[0], regex="(((")
    with pytest.raises(ta.InputError, match="json_schema: not understood"):
        model.ask(PICTURE, QUESTIONS[0], json_schema="{")


def test_without_llguidance_a_constraint_names_the_extra(model: ta.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ta.MissingExtraError, match=r"pip install 'tinyalign-edge\[constrain\]'"):
        model.ask(PICTURE, QUESTIONS[0], regex="a")
    assert model.ask(PICTURE, QUESTIONS[0]).text


def test_the_callers_time_counts_in_the_total_alone(model: ta.Model) -> None:
    stream = model.stream(PICTURE, QUESTIONS[0], choices=["red", "blue"])
    for _ in stream:
        time.sleep(0.05)
    timings = stream.result().timings_ms
    assert timings["total"] - timings["first_token"] > 49
