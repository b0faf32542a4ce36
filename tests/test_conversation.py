"""Conversations: several turns and pictures, what is kept between them, and how answers end early."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import tinyalign_edge as ta
from tests.conftest import STORED_BUNDLE
from tests.test_prefix import PICTURE, QUESTIONS, drawn, passes  # noqa: F401
from tinyalign_edge.prompt import Said
from tinyalign_edge.runtime.context import Context
from tinyalign_edge.runtime.lru import Lru

Floats = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def model() -> ta.Model:
    return ta.load(STORED_BUNDLE, threads=1)


@pytest.fixture(scope="module")
def plain() -> ta.Model:
    """Without memories there is room for many turns."""
    return ta.load(STORED_BUNDLE, threads=1, memory=False)


def test_the_first_turn_is_answered_like_a_single_question(model: ta.Model) -> None:
    for picture in (PICTURE, drawn(1)):
        for question in QUESTIONS:
            assert model.chat().ask(question, picture).text == model.ask(picture, question).text


def test_a_turn_reads_its_own_tokens_only(plain: ta.Model, passes: list[int]) -> None:  # noqa: F811
    talk = plain.chat()
    talk.ask(QUESTIONS[0], drawn(1), max_new_tokens=4, drafts=False)
    passes.clear()
    talk.ask(QUESTIONS[1], max_new_tokens=1)
    turn = len(plain.prompt.question(QUESTIONS[1]).after)
    (read,) = passes
    answer = len(plain.prompt.closed(" " + talk.exchanges[0].answer))
    assert read == answer + turn, "the answer with the token that ends it, and the question"


def test_what_is_kept_between_turns_is_what_would_be_read_anew(fp32_bundle: Path) -> None:
    with ta.load(fp32_bundle, threads=1) as model:
        seen: list[Floats] = []

        def record(ids: Sequence[int], logits: Floats) -> Floats:
            if not ids:
                seen.append(logits.copy())
            return logits

        def ask(question: str, images: object = ()) -> None:
            talk.ask(question, images, max_new_tokens=6, processors=record)  # type: ignore[arg-type]

        talk = model.chat()
        ask(QUESTIONS[0], drawn(2))
        ask(QUESTIONS[1])
        ask(QUESTIONS[2], [drawn(3), drawn(4)])
        *before, last = talk.exchanges
        turns = [Said(one.question, one.answer, len(one.images)) for one in before]
        turns.append(Said(last.question, None, len(last.images)))
        images = [image for one in talk.exchanges for image in one.images]
        anew = Context(model._decoder, Lru(0), model._copying)
        logits = anew.read(model._answering.spans(turns, images), room=0)
        np.testing.assert_allclose(seen[-1], logits, atol=1e-4)
        assert [len(one.images) for one in talk.exchanges] == [1, 0, 2]
        assert np.abs(seen[-1] - seen[0]).max() > 0.01


def test_a_picture_of_a_later_turn_stands_at_its_question(plain: ta.Model) -> None:
    ids = plain.prompt.conversation([Said("one?", "yes"), Said("two?", None, 2)])
    text = [plain.prompt.tokenizer.decode(list(part), skip_special_tokens=False).strip() for part in ids]
    assert text == ["<s>", "Question: one? Answer: yes</s>Question:", "", "two? Answer:"]
    assert plain.prompt.conversation([Said("one?", None, 0)]) == [sum(plain.prompt.conversation([Said("one?")]), ())]


def test_a_conversation_may_begin_without_a_picture(plain: ta.Model) -> None:
    talk = plain.chat()
    assert talk.ask(QUESTIONS[0], max_new_tokens=3).memories == ()
    talk.ask(QUESTIONS[1], PICTURE, max_new_tokens=3)
    assert [len(one.images) for one in talk.exchanges] == [0, 1]


def test_the_oldest_turns_make_room_and_the_newest_picture_stays(plain: ta.Model) -> None:
    talk = plain.chat()
    first, second = plain.encode(drawn(1)), plain.encode(drawn(2))
    talk.ask("first?", first, max_new_tokens=8)
    talk.ask("second?", second, max_new_tokens=8)
    for turn in range(20):
        answer = talk.ask(f"And {turn} of {turn}?", max_new_tokens=8)
        assert answer.finish_reason in ("stop", "length")
        assert [image for one in talk.exchanges for image in one.images][-1] is second
    kept = [one.question for one in talk.exchanges]
    assert 3 < len(kept) < 20
    assert kept == [f"And {turn} of {turn}?" for turn in range(20 - len(kept), 20)]
    assert [image for one in talk.exchanges for image in one.images] == [second]
    with pytest.raises(ta.InputError, match="the context has 256"):
        talk.ask("why " * 300)
    assert [one.question for one in talk.exchanges] == kept


def test_one_answer_at_a_time(model: ta.Model) -> None:
    talk = model.chat()
    stream = iter(talk.stream(QUESTIONS[0], PICTURE))
    next(stream)
    for act in (lambda: talk.ask(QUESTIONS[1]), talk.reset):
        with pytest.raises(ta.InputError, match="an answer is being given"):
            act()
    del stream  # left before its end
    assert talk.exchanges == ()
    assert talk.ask(QUESTIONS[0], PICTURE).text == model.ask(PICTURE, QUESTIONS[0]).text
    talk.reset()
    assert talk.ask(QUESTIONS[0], PICTURE).text == model.ask(PICTURE, QUESTIONS[0]).text


def test_many_conversations_share_one_model(model: ta.Model) -> None:
    def converse(seed: int) -> list[str]:
        talk = model.chat()
        return [talk.ask(QUESTIONS[0], drawn(seed)).text, talk.ask(QUESTIONS[1]).text, talk.ask(QUESTIONS[2]).text]

    expected = [converse(seed) for seed in range(4)]
    assert len({tuple(texts) for texts in expected}) > 1
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(converse, range(4))) == expected


def test_a_turn_that_fails_is_no_part_of_the_conversation(model: ta.Model) -> None:
    def second_answer(*, fail: bool) -> str:
        talk = model.chat()
        talk.ask(QUESTIONS[0], PICTURE)
        if fail:
            for failure in (KeyboardInterrupt, ValueError):
                with pytest.raises(failure):
                    talk.ask("Is it blue?", processors=raising(failure))
            assert len(talk.exchanges) == 1
        return talk.ask(QUESTIONS[1]).text

    assert second_answer(fail=True) == second_answer(fail=False)


def raising(failure: type[BaseException]):  # type: ignore[no-untyped-def]
    """A processor that fails at the third token, as an interrupt may come."""

    def process(ids: Sequence[int], logits: Floats) -> Floats:
        if len(ids) == 2:
            raise failure
        return logits

    return process


def test_an_interrupt_while_streaming_leaves_the_model_usable(model: ta.Model) -> None:
    expected = model.ask(PICTURE, QUESTIONS[0]).text
    with pytest.raises(KeyboardInterrupt):
        list(model.stream(PICTURE, QUESTIONS[0], processors=raising(KeyboardInterrupt)))
    stream = model.stream(PICTURE, QUESTIONS[0])
    with pytest.raises(ZeroDivisionError):  # raised by who reads the stream
        for _ in stream:
            raise ZeroDivisionError
    with pytest.raises(ta.InputError, match="left before its end"):
        stream.result()
    assert model.ask(PICTURE, QUESTIONS[0]).text == expected


def test_cancelling_ends_the_answer_within_one_token(model: ta.Model) -> None:
    whole = model.ask(PICTURE, QUESTIONS[0], drafts=False, max_new_tokens=20)

    def cancel(ids: Sequence[int], logits: Floats) -> Floats:
        if len(ids) == 3:
            stream.cancel()  # while the fourth token is being picked
        return logits

    stream = model.stream(PICTURE, QUESTIONS[0], processors=cancel, drafts=False)
    answer = stream.result()
    assert (answer.tokens, answer.finish_reason) == (4, "cancelled")
    assert whole.text.startswith(answer.text)
    talk = model.chat()
    stream = talk.stream(QUESTIONS[0], PICTURE, processors=cancel, drafts=False)
    assert talk.exchanges == ()
    assert [stream.result().text] == [one.answer for one in talk.exchanges]


def test_a_timeout_ends_the_answer_with_what_there_is(model: ta.Model, passes: list[int]) -> None:  # noqa: F811
    def wait(ids: Sequence[int], logits: Floats) -> Floats:
        if len(ids) == 1:
            time.sleep(2)
        return logits

    answer = model.ask(PICTURE, QUESTIONS[0], timeout_s=2, processors=wait, drafts=False)
    assert (answer.tokens, answer.finish_reason) == (2, "timeout")
    passes.clear()
    for options in ({}, {"choices": ["red", "blue"]}):
        answer = model.ask(PICTURE, QUESTIONS[0], timeout_s=1e-6, **options)
        assert (answer.text, answer.tokens, answer.finish_reason) == ("", 0, "timeout")
    assert passes == [], "no pass begins after the time is up"
    assert model.ask(PICTURE, QUESTIONS[0], timeout_s=3600).finish_reason in ("stop", "length")


def test_choosing_can_be_cancelled_between_two_choices(
    model: ta.Model,
    passes: list[int],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choices = ["red", "blue", "a circle", "two"]
    append, stream = Context.append, model.stream(drawn(77), QUESTIONS[0], choices=choices)

    def cancel(self: Context, ids: Sequence[int], num_logits: int = 1) -> Floats:
        stream.cancel()
        return append(self, ids, num_logits)

    monkeypatch.setattr(Context, "append", cancel)
    passes.clear()
    assert list(stream) == []
    answer = stream.result()
    assert (answer.text, answer.finish_reason, answer.likelihoods) == ("", "cancelled", ())
    assert len(passes) == 3, "picture, question and the first choice"
    monkeypatch.undo()
    assert model.ask(PICTURE, QUESTIONS[0], choices=choices).text in choices


def test_every_turn_tells_all_its_stages(model: ta.Model) -> None:
    talk = model.chat()
    stages = {"decode_image", "preprocess", "encode", "retrieve", "prefill", "first_token", "per_token", "total"}
    with_picture, without = (talk.ask(QUESTIONS[0], images, max_new_tokens=2) for images in (PICTURE, ()))
    ended = [talk.ask(QUESTIONS[1], timeout_s=1e-6), talk.ask(QUESTIONS[1], choices=["red", "blue"])]
    for answer in (with_picture, without, *ended):
        assert set(answer.timings_ms) == stages
    assert with_picture.timings_ms["encode"] > 0 == without.timings_ms["encode"]


def test_asyncio_goes_on_during_an_answer(model: ta.Model) -> None:
    async def converse() -> None:
        ticked, entered = threading.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()

        def wait(ids: Sequence[int], logits: Floats) -> Floats:
            if len(ids) == 1:
                loop.call_soon_threadsafe(entered.set)
                assert ticked.wait(60), "the loop stood still"
            return logits

        asked = asyncio.create_task(model.aask(PICTURE, QUESTIONS[0], processors=wait))
        await entered.wait()
        ticked.set()
        expected = model.ask(PICTURE, QUESTIONS[0])
        assert (await asked).text == expected.text
        stream = model.astream(PICTURE, QUESTIONS[0])
        assert "".join([piece async for piece in stream]) == expected.text
        assert stream.answer is not None
        talk = model.chat()
        assert (await talk.aask(QUESTIONS[0], PICTURE)).text == expected.text

    asyncio.run(converse())


def test_cancelling_a_task_ends_its_answer(model: ta.Model) -> None:
    tokens: list[int] = []
    ended = threading.Event()

    async def converse() -> None:
        entered, go_on = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        def wait(ids: Sequence[int], logits: Floats) -> Floats:
            tokens.append(len(ids))
            if len(ids) == 2:
                loop.call_soon_threadsafe(entered.set)
                go_on.wait(60)
                ended.set()
            return logits

        asked = asyncio.create_task(model.aask(PICTURE, QUESTIONS[0], processors=wait, drafts=False))
        await entered.wait()
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        go_on.set()

    asyncio.run(converse())  # ends when its threads have ended
    assert ended.is_set()
    assert tokens == [0, 1, 2], "no token after the one that was being picked"


def test_a_conversation_is_free_once_the_pass_of_a_cancelled_task_has_ended(model: ta.Model) -> None:
    async def converse() -> None:
        talk = model.chat()
        entered, go_on = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        def wait(ids: Sequence[int], logits: Floats) -> Floats:
            if len(ids) == 1:
                loop.call_soon_threadsafe(entered.set)
                assert go_on.wait(60)
            return logits

        asked = asyncio.create_task(talk.aask(QUESTIONS[0], PICTURE, processors=wait, drafts=False))
        await entered.wait()
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        with pytest.raises(ta.InputError, match="an answer is being given"):
            talk.reset()
        go_on.set()
        await loop.shutdown_default_executor()  # its threads have ended
        talk.reset()
        assert talk.ask(QUESTIONS[0], PICTURE).text == model.ask(PICTURE, QUESTIONS[0]).text

    asyncio.run(converse())


def test_what_is_forgotten_is_read_by_no_later_turn(bundle: Path, passes: list[int]) -> None:  # noqa: F811
    with ta.load(bundle, threads=1) as model:
        assert model.memory is not None
        entry = model.memory.add(PICTURE, "a large red cat.")
        talk = model.chat()
        assert entry.id in [memory.id for memory in talk.ask(QUESTIONS[0], PICTURE, max_new_tokens=2).memories]
        model.memory.forget(id=entry.id)
        assert talk._context is None
        assert entry.id not in [memory.id for one in talk.exchanges for memory in one.images[0].memories]
        passes.clear()
        assert entry.id not in [memory.id for memory in talk.ask(QUESTIONS[1], max_new_tokens=1).memories]
        assert passes[0] == 1 + len(model.encode(PICTURE).tokens)


def test_what_is_forgotten_during_an_answer_is_gone_after_it(bundle: Path) -> None:
    with ta.load(bundle, threads=1) as model:
        assert model.memory is not None
        entry = model.memory.add(PICTURE, "a large red cat.")
        talk = model.chat()
        stream = talk.stream(QUESTIONS[0], PICTURE)
        pieces = iter(stream)
        next(pieces)
        model.memory.forget(id=entry.id)
        assert talk._context is not None
        list(pieces)
        assert talk._context is None
        assert len(model._answering.prefixes) == 0
        assert entry.id not in [memory.id for memory in talk.exchanges[0].images[0].memories]


def test_a_stream_for_asyncio_that_is_left_half_way_leaves_the_conversation_free(model: ta.Model) -> None:
    async def converse() -> None:
        talk = model.chat()
        async for _ in talk.astream(QUESTIONS[0], PICTURE):
            break
        talk.reset()
        assert (await talk.aask(QUESTIONS[0], PICTURE)).text == model.ask(PICTURE, QUESTIONS[0]).text

    asyncio.run(converse())


def test_closing_frees_the_weights_though_a_conversation_is_kept() -> None:
    for half_way in (False, True):
        model = ta.load(STORED_BUNDLE, threads=1)
        weights = weakref.ref(model.decoder)
        talk = model.chat()
        talk.ask(QUESTIONS[0], PICTURE, max_new_tokens=2)
        pieces = iter(talk.stream(QUESTIONS[1]) if half_way else ())
        next(pieces, None)
        model.close()
        list(pieces)  # goes on to its end
        del pieces
        gc.collect()
        assert weights() is None
        for act in (lambda: talk.ask(QUESTIONS[0]), model.chat):  # noqa: B023
            with pytest.raises(ta.InputError, match="the model was closed"):
                act()
