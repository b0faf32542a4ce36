"""Drafts from memories and question: what is proposed, and that answers do not change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import tinyalign_edge as ta
from tests.conftest import STORED_BUNDLE
from tests.test_prefix import QUESTIONS, drawn
from tinyalign_edge.runtime.drafts import FIRST, MOST, REST, Drafts

END = 2


def test_the_beginning_of_a_memory_is_continued_to_its_end() -> None:
    drafts = Drafts([[5, 6, 7, END], [5, 9, 8, END]], [])
    assert drafts.propose([5], 9) == [6, 7, END]  # the most similar one of those that begin so
    assert drafts.propose([5, 9], 9) == [8, END]
    assert drafts.propose([5], 2) == [6, 7]
    assert drafts.propose([6], 9) == []  # one token within a text is no sign
    assert drafts.propose([], 9) == []


def test_the_longest_match_wins_and_then_the_most_common_continuation() -> None:
    memories = [[1, 2, 3, 4], [8, 2, 3, 5], [9, 2, 3, 5, 6]]
    assert Drafts(memories, []).propose([7, 2, 3], 9) == [5]
    assert Drafts(memories, []).propose([1, 2, 3], 9) == [4]
    assert Drafts([], [4, 5, 6, 7]).propose([4, 5], 9) == [6, 7]  # the question
    assert Drafts([], []).propose([4, 5, 6, 4, 5], 9) == [6, 4, 5]  # the answer itself


def test_drafts_get_longer_while_they_are_right_and_rest_when_they_are_wrong() -> None:
    drafts = Drafts([list(range(100))], [])
    lengths = []
    for _ in range(3):
        lengths.append(len(drafts.propose([1, 2, 3], 99)))
        drafts.learn(lengths[-1], lengths[-1])
    assert lengths == [FIRST, MOST, MOST]
    drafts.learn(MOST, 4)
    assert len(drafts.propose([1, 2, 3], 99)) == 5
    for pause in (REST, 2 * REST):
        drafts.learn(5, 0)
        assert [drafts.propose([1, 2, 3], 99) for _ in range(pause)] == [[]] * pause
        assert drafts.propose([1, 2, 3], 99)


def answers(model: ta.Model, count: int, **options: object) -> list[ta.Answer]:
    """Answers to `count` questions about noise and, since they repeat what they said, of some length."""
    found = []
    for seed in range(-(-count // len(QUESTIONS))):
        image = model.encode(drawn(seed))
        for question in QUESTIONS:
            found.append(model.ask(image, question, max_new_tokens=12, **options))  # type: ignore[arg-type]
    return found[:count]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_500_greedy_answers_are_the_same_with_and_without_drafts(fp32_bundle: Path, precision: str) -> None:
    with ta.load(fp32_bundle if precision == "fp32" else STORED_BUNDLE, threads=1) as model:
        with_drafts, without = answers(model, 500), answers(model, 500, drafts=False)
    assert [answer.text for answer in with_drafts] == [answer.text for answer in without]
    assert [answer.tokens for answer in with_drafts] == [answer.tokens for answer in without]
    passes, tokens = (sum(getattr(a, name) for a in with_drafts) for name in ("passes", "tokens"))
    assert passes < sum(answer.passes for answer in without)
    assert tokens > passes, "drafts were accepted"


def test_drawn_answers_are_the_same_with_and_without_drafts(fp32_bundle: Path) -> None:
    options = {"temperature": 0.7, "seed": 3, "top_k": 8}
    with ta.load(fp32_bundle, threads=1) as model:
        with_drafts, without = answers(model, 60, **options), answers(model, 60, drafts=False, **options)
    assert [answer.text for answer in with_drafts] == [answer.text for answer in without]
    assert sum(answer.passes for answer in with_drafts) < sum(answer.passes for answer in without)
    assert len({answer.text for answer in without}) > 5


def test_a_drafted_token_is_kept_with_its_probability(fp32_bundle: Path) -> None:
    """The second token of many drawn answers, where a draft proposes one, has the model's own distribution."""
    with ta.load(fp32_bundle, threads=1, memory=False) as model:
        image = model.encode(drawn(1))
        first = model.prompt.tokenizer.encode(" red").ids[0]
        rows: dict[int, np.ndarray] = {}

        def force(ids, logits):  # type: ignore[no-untyped-def]
            if not ids:
                forced = np.full_like(logits, -np.inf)
                forced[first] = 0
                return forced
            rows.setdefault(len(ids), logits.copy())
            return logits

        options = {"temperature": 1.0, "processors": force, "max_new_tokens": 2}
        texts = [model.ask(image, "red red red?", seed=seed, **options).text for seed in range(300)]  # type: ignore[arg-type]
    scores = rows[1].astype(np.float64)
    shares = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    top = int(shares.argmax())
    expected = shares[top]
    found = np.mean([text == model.prompt.text([first, top]) for text in texts])
    assert abs(found - expected) <= 4 * np.sqrt(expected * (1 - expected) / len(texts)) + 0.02
