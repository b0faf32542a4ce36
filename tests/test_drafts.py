"""Drafts from memories and question: what is proposed, and that answers do not change."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

import tinyalign_edge as ta
from tests.conftest import STORED_BUNDLE
from tests.test_prefix import QUESTIONS, drawn
from tinyalign_edge.prompt import Said
from tinyalign_edge.runtime.decode import Decoding
from tinyalign_edge.runtime.drafts import COST, FIRST, LEAST, MOST, MOST_LOST, Drafts, Pace
from tinyalign_edge.runtime.picker import Picker

END = 2


def test_the_beginning_of_a_memory_is_continued_to_its_end() -> None:
    drafts = Drafts([[5, 6, 7, END], [5, 9, 8, END]], [], Pace())
    assert drafts.propose([5], 9) == [6, 7, END]  # the most similar one of those that begin so
    assert drafts.propose([5, 9], 9) == [8, END]
    assert drafts.propose([5], 2) == [6, 7]
    assert drafts.propose([6], 9) == []  # one token within a text is no sign
    assert drafts.propose([], 9) == []


def test_the_longest_match_wins_and_then_the_most_common_continuation() -> None:
    memories = [[1, 2, 3, 4], [8, 2, 3, 5], [9, 2, 3, 5, 6]]
    assert Drafts(memories, [], Pace()).propose([7, 2, 3], 9) == [5]
    assert Drafts(memories, [], Pace()).propose([1, 2, 3], 9) == [4]
    assert Drafts([], [4, 5, 6, 7], Pace()).propose([4, 5], 9) == [6, 7]  # the question
    assert Drafts([], [], Pace()).propose([4, 5, 6, 4, 5], 9) == [6, 4, 5]  # the answer itself


def test_drafts_get_longer_while_they_are_right() -> None:
    drafts = Drafts([list(range(100))], [], Pace())
    lengths = []
    for _ in range(3):
        lengths.append(len(drafts.propose([1, 2, 3], 99)))
        drafts.learn(lengths[-1], lengths[-1], saved=lengths[-1])
    assert lengths == [FIRST, MOST, MOST]
    drafts.learn(MOST, 4, saved=4)
    assert len(drafts.propose([1, 2, 3], 99)) == 5
    drafts.learn(5, 0, saved=0)
    assert len(drafts.propose([1, 2, 3], 99)) == LEAST


def test_passes_that_were_lost_without_a_draft_leave_its_length() -> None:
    drafts = Drafts([list(range(100))], [], Pace())
    drafts.learn(0, 0, saved=0)
    assert len(drafts.propose([0], 99)) == FIRST


@pytest.mark.parametrize("saved", [(0,), (-8,), (0, 0, 3, -6), (1, -2)])
def test_drafts_that_do_not_pay_cost_little(saved: tuple[int, ...]) -> None:
    pace, outcomes, lost, tried = Pace(), itertools.cycle(saved), 0.0, 0
    for _ in range(20_000):
        if pace.pays():
            outcome = next(outcomes)
            lost, tried = lost + COST - outcome, tried + 1
            pace.learn(outcome - COST)
    assert tried > 10
    assert 0 < lost / 20_000 <= 1.1 * MOST_LOST


def test_drafts_that_pay_go_on_after_others() -> None:
    pace = Pace()
    for _ in range(5):
        assert pace.pays()
        pace.learn(3)
    pace.learn(-COST)  # once is forgiven
    assert pace.pays()
    for _ in range(20):
        pace.learn(-COST)
    waited = next(passes for passes in itertools.count() if pace.pays())
    assert 0 < waited <= COST / MOST_LOST + 1
    pace.learn(3)
    assert pace.pays()


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
    assert tokens > 500
    if precision == "fp32":
        assert passes < sum(answer.passes for answer in without)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_drawn_answers_are_the_same_with_and_without_drafts(fp32_bundle: Path, precision: str) -> None:
    options = {"temperature": 2.0, "seed": 3}
    with ta.load(fp32_bundle if precision == "fp32" else STORED_BUNDLE, threads=1) as model:
        with_drafts, without = answers(model, 60, **options), answers(model, 60, drafts=False, **options)
    assert [answer.text for answer in with_drafts] == [answer.text for answer in without]
    assert precision == "int8" or sum(answer.passes for answer in with_drafts) < sum(
        answer.passes for answer in without
    )
    assert len({answer.text for answer in without}) > 5


def test_a_drafted_token_is_kept_with_its_probability(fp32_bundle: Path) -> None:
    """The token after the first one, where a draft proposes the second likeliest, has the model's distribution."""
    with ta.load(fp32_bundle, threads=1) as model:
        answering = model._answering
        context = answering.context()
        first = model.prompt.tokenizer.encode(" red").ids[0]
        context.read(answering.spans([Said(QUESTIONS[0])], [model.encode(drawn(1))]), room=8)
        start = len(context)
        scores = context.append([first])[0].astype(np.float64)
        likeliest = np.argsort(-scores)[:3].tolist()
        forced = np.full(len(scores), -np.inf, np.float32)
        forced[first] = 0
        found, drafted = [], []
        for seed in range(600):
            context.truncate(start)
            drafts = Drafts([[first, likeliest[1], likeliest[0], END]], [], Pace())
            picker = Picker(ta.Generation(temperature=1.5, seed=seed))
            decoding = Decoding(context, forced, picker, ends=(), limit=4, drafts=drafts)
            found.append(list(decoding)[1])
            drafted.append(decoding.passes < 3)
    assert any(drafted)
    shares = np.exp((scores - scores.max()) / 1.5)
    shares /= shares.sum()
    for token in likeliest:
        share = shares[token]
        assert 0.02 < share < 0.98
        assert abs(np.mean(np.array(found) == token) - share) <= 4 * np.sqrt(share * (1 - share) / len(found))
