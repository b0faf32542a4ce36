"""Episodes: names are replaced in a row and its neighbours alike, and always by the same ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from tokenizers import Tokenizer

from tinyalign_edge.bundle import PromptConfig
from tinyalign_edge.data import Row, Turn
from tinyalign_edge.prompt import DEFAULT_CHAT_TEMPLATE, Prompt
from tinyalign_edge.train.batches import Rows
from tinyalign_edge.train.episodes import Episodes, name_in

WHAT = "What is in the picture?"


def row(*turns: tuple[str, str]) -> Row:
    return Row("0", (), tuple(Turn(*turn) for turn in turns), None, "row 0")


BANK = [
    row((WHAT, "a crab"), ("Is there a crab?", "yes")),
    row((WHAT, "A crab."), ("Is there an anchor?", "no")),
    row((WHAT, "a wild cat")),
    row((WHAT, "a person rides a very old bicycle along the beach")),
    row(("", "rectangle, blue")),
    row(("", "a large lighthouse stands beside the rectangle of a sports field")),
]
ANSWERS = [*["yes"] * 40, *["no"] * 40, *["a crab", "a wild cat"] * 3]
MINE = row(("Is there a crab?", "yes"), (WHAT, "a crab"))


@pytest.fixture
def prompt(towers: Path) -> Prompt:
    tokenizer = Tokenizer.from_file(str(towers / "lm" / "tokenizer.json"))
    return Prompt(PromptConfig(DEFAULT_CHAT_TEMPLATE, True, "<s>", "</s>", (2,), 256), tokenizer)


def episodes(prompt: Prompt, share: float = 1.0, fits: Any = lambda row: True) -> Episodes:
    return Episodes(share, BANK, prompt, ANSWERS, value_tokens=200, fits=fits)


def played(made: Episodes, prompt: Prompt, seed: int, mine: Row = MINE, near: Any = (0, 1, 2, 3)) -> Any:
    found, texts = made.play(mine, near, np.random.default_rng(seed))
    return found, None if texts is None else [prompt.text(text) for text in texts]


def test_a_name_is_replaced_in_the_row_and_in_every_neighbour(prompt: Prompt) -> None:
    styles, others = set(), set()
    for seed in range(20):
        found, texts = played(episodes(prompt), prompt, seed)
        [turn] = found.turns  # what yes or no answers is left out
        name = name_in(turn.answer)
        assert name
        assert name != "crab"
        assert name_in(texts[0]) in (name, "") and name in texts[0]
        assert name in texts[1]
        assert not any("crab" in text for text in texts)
        assert texts[3] == f"{WHAT} {BANK[3].turns[0].answer}"
        styles.add(texts[0] == f"a {name}")
        others.add("wild cat" in texts[2])
    assert styles == others == {True, False}  # as taught alone and as trained; other names replaced and not


def test_the_names_of_a_caption_are_replaced_one_by_one(prompt: Prompt) -> None:
    mine = row(("Is it a blue shape?", "yes"), ("Which shape is it?", "rectangle"), ("Which colour is it?", "blue"))
    colours = set()
    for seed in range(20):
        found, texts = played(episodes(prompt), prompt, seed, mine, (4,))
        shape, colour = (turn.answer for turn in found.turns)
        assert shape != "rectangle"
        assert texts == [f"{shape}, {colour}"]
        colours.add(colour == "blue")
    assert colours == {True, False}


def test_a_question_is_asked_with_the_new_names(prompt: Prompt) -> None:
    found, _ = played(episodes(prompt), prompt, 0, row(("Is it a crab or a cat?", "a crab")))
    name = name_in(found.turns[0].answer)
    assert name in found.turns[0].question
    assert "crab" not in found.turns[0].question


def test_a_name_within_a_longer_text_is_replaced_as_a_whole_word(prompt: Prompt) -> None:
    found, texts = played(episodes(prompt), prompt, 0, row((WHAT, "a rectangle")), (5,))
    name = name_in(found.turns[0].answer)
    assert name != "rectangle"
    assert texts == [BANK[5].turns[0].answer.replace("rectangle", name)]
    light = row((WHAT, "a light"))
    assert played(episodes(prompt), prompt, 0, light, (5,)) == (light, None)


def test_no_longer_name_takes_the_answer_away(prompt: Prompt) -> None:
    for seed in range(10):
        found, texts = played(episodes(prompt), prompt, seed, row((WHAT, "a cat")), (2,))
        assert texts == [f"a wild {name_in(found.turns[0].answer)}"] or texts == [
            f"{WHAT} a wild {name_in(found.turns[0].answer)}"
        ]


def test_what_is_no_name_or_not_in_the_memory_stays(prompt: Prompt) -> None:
    yes = row(("Is there a crab?", "yes"))
    long = row((WHAT, "a person rides a very old bicycle along the beach"))
    for mine, near in ((yes, (0, 1)), (MINE, (2,)), (MINE, ()), (long, (3,))):
        found, texts = played(episodes(prompt), prompt, 0, mine, near)
        assert texts is None
        assert found == mine


def test_a_row_whose_answers_are_all_common_stays(prompt: Prompt) -> None:
    common = row((WHAT, "rectangle, blue"))  # more than a twentieth of all answers, its two parts are names
    made = Episodes(1.0, BANK, prompt, [*ANSWERS, *["rectangle, blue"] * 20], value_tokens=200, fits=lambda row: True)
    assert played(made, prompt, 0, common, (4,)) == (common, None)


def test_where_every_answer_is_common_no_episode_is_possible(prompt: Prompt) -> None:
    def possible(*answers: str) -> bool:
        return Episodes(1.0, BANK, prompt, answers, value_tokens=200, fits=lambda row: True).possible

    assert possible(*ANSWERS)
    assert not possible(*["rectangle, blue"] * 20)
    assert not possible(*["true"] * 20, *["False."] * 20, "a person rides a very old bicycle along the beach")


def test_no_new_name_is_the_word_of_an_answer(prompt: Prompt) -> None:
    def words(*answers: str) -> set[str]:
        return set(Episodes(1.0, BANK, prompt, answers, value_tokens=200, fits=lambda row: True).words)

    known = sorted(words())[0]
    assert words("a crab") == words()
    assert words(f"a {known} crab", "teal") == words() - {known, "teal"}


def test_only_a_share_of_the_rows_and_only_those_that_fit_are_episodes(prompt: Prompt) -> None:
    some = episodes(prompt, share=0.5)
    made = [played(some, prompt, seed)[1] is not None for seed in range(100)]
    assert 30 < sum(made) < 70
    assert played(episodes(prompt, fits=lambda row: False), prompt, 0) == (MINE, None)


def test_rows_are_the_same_episodes_for_a_seed_and_an_epoch(prompt: Prompt) -> None:
    def rows(seed: int) -> Rows:
        near, similar = np.array([[0, 1]]), np.ones((1, 2), np.float32)
        features = np.zeros((1, 4), np.float32)
        return Rows([MINE], prompt, lambda rows: [features] * len(rows), near, similar, seed=seed).playing(
            episodes(prompt)
        )

    one, again, other = rows(0), rows(0), rows(1)
    assert one[0].texts == again[0].texts != other[0].texts
    assert one[0].turns == again[0].turns
    before = one[0].texts
    one.set_epoch(1)
    assert one[0].texts != before
    one.set_epoch(0)
    assert one[0].texts == before
