"""What was read of a picture is kept for the next question, and for nothing else."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

import tinyalign_edge as ta
from tests.conftest import STORED_BUNDLE
from tinyalign_edge.memory import Bank, Record
from tinyalign_edge.runtime import sight
from tinyalign_edge.runtime.decoder import Cache, Decoder
from tinyalign_edge.runtime.lru import Lru

PICTURE = STORED_BUNDLE.parent / "picture.png"
QUESTIONS = ("What colour is the circle?", "How many objects are there?", "Where is it?")
Floats = npt.NDArray[np.float32]


def drawn(seed: int) -> npt.NDArray[np.uint8]:
    """A picture (32, 32, 3) of coarse noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return np.kron(coarse, np.ones((8, 8, 1), np.uint8))


def logits_of(model: ta.Model, image: object, question: str, **options: object) -> list[Floats]:
    """The logits of every token of an answer."""
    seen: list[Floats] = []

    def record(_: object, logits: Floats) -> Floats:
        seen.append(logits.copy())
        return logits

    model.ask(image, question, processors=[record], max_new_tokens=6, drafts=False, **options)  # type: ignore[arg-type]
    return seen


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of all passes of language models from now on."""
    lengths: list[int] = []
    forward = Decoder.forward

    def counted(self: Decoder, cache: Cache, embeddings: Floats, num_logits: int = 1) -> Floats:
        lengths.append(len(embeddings))
        return forward(self, cache, embeddings, num_logits)

    monkeypatch.setattr(Decoder, "forward", counted)
    return lengths


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The sizes of all pictures that are preprocessed from now on."""
    sizes: list[tuple[int, int]] = []
    preprocess: Callable[..., object] = sight.preprocess

    def counted(image: Image.Image, config: object) -> object:
        sizes.append(image.size)
        return preprocess(image, config)

    monkeypatch.setattr(sight, "preprocess", counted)
    return sizes


def test_answers_do_not_depend_on_the_cache() -> None:
    with ta.load(STORED_BUNDLE, threads=1, cache_mb=0) as without, ta.load(STORED_BUNDLE, threads=1) as kept:
        for picture in (drawn(1), drawn(2)):
            image = kept.encode(picture)
            for question in QUESTIONS:
                expected = logits_of(without, picture, question)
                for given in (image, picture):  # filled by the very first question
                    np.testing.assert_array_equal(logits_of(kept, given, question), expected)


def test_the_second_question_reads_the_question_alone(passes: list[int]) -> None:
    with ta.load(STORED_BUNDLE) as model:
        image = model.encode(PICTURE)
        model.ask(image, QUESTIONS[0], max_new_tokens=1)
        question = len(model.prompt.question(QUESTIONS[0]).after)
        assert passes == [1 + len(image.tokens), question]
        model.ask(image, QUESTIONS[0], max_new_tokens=1)
        model.ask(PICTURE.read_bytes(), QUESTIONS[0], max_new_tokens=1)
        assert passes[2:] == [question, question]


def test_a_picture_is_known_by_its_content_and_not_by_its_path(tmp_path: Path, seen: list[tuple[int, int]]) -> None:
    with ta.load(STORED_BUNDLE) as model:
        path = tmp_path / "picture.png"
        path.write_bytes(PICTURE.read_bytes())
        model.encode(PICTURE)
        model.encode(path)
        model.encode(str(path))
        assert len(seen) == 1
        first = logits_of(model, path, QUESTIONS[0])[0]
        Image.fromarray(drawn(3)).save(path)
        assert not np.array_equal(logits_of(model, path, QUESTIONS[0])[0], first)
        assert len(seen) == 2
        np.testing.assert_array_equal(model.encode(path).visual_tokens, model.encode(drawn(3)).visual_tokens)
        assert len(seen) == 3  # pixels and files are not compared with each other


def test_pixels_of_another_shape_are_another_picture(seen: list[tuple[int, int]]) -> None:
    with ta.load(STORED_BUNDLE) as model:
        flat = np.zeros((16, 64, 3), np.uint8)
        model.encode(flat)
        model.encode(flat.reshape(64, 16, 3))
        model.encode(Image.fromarray(flat))
        assert seen == [(64, 16), (16, 64)]


def test_what_the_memory_says_is_part_of_the_key_and_gone_when_forgotten(bundle: Path, passes: list[int]) -> None:
    with ta.load(bundle, threads=1) as model:
        assert model.memory is not None
        prefixes = model._answering.prefixes
        image = model.encode(PICTURE)
        before = logits_of(model, image, QUESTIONS[0])[0]
        entry = model.memory.add(PICTURE, "a large red cat.")
        taught = logits_of(model, image, QUESTIONS[0])[0]
        assert not np.array_equal(taught, before)
        assert len(prefixes) > 0
        model.memory.forget(id=entry.id)
        assert len(prefixes) == 0
        np.testing.assert_array_equal(logits_of(model, image, QUESTIONS[0])[0], before)


def test_prefixes_go_whoever_has_forgotten_what_they_hold(bundle: Path) -> None:
    with ta.load(bundle) as model:
        assert model.memory is not None
        bank, other, prefixes = model.memory.bank, Bank(bundle / "memory"), model._answering.prefixes
        ways = (
            lambda number: bank.forget(id=number),
            lambda number: (other.forget(id=number), model.memory.refresh()),
            lambda number: (other.forget(id=number), model.memory.add(drawn(1), "new")),
            lambda number: (other.forget(id=number), bank.verify()),
        )
        for way in ways:
            model.ask(PICTURE, QUESTIONS[0], max_new_tokens=1)
            assert len(prefixes) > 0
            way(model.encode(PICTURE).memories[0].id)
            assert len(prefixes) == 0
        model.ask(PICTURE, QUESTIONS[0], max_new_tokens=1)
        other.add(unit_key(bank), Record("more"), value=np.array([1]))
        model.memory.refresh()
        assert len(prefixes) > 0  # nothing is gone


def unit_key(bank: Bank) -> Floats:
    """A key (key_dim,)."""
    return np.ones(bank.manifest.spec.key_dim, np.float32)


def test_what_is_forgotten_during_an_answer_is_not_kept_either(bundle: Path) -> None:
    with ta.load(bundle) as model:
        assert model.memory is not None
        stream = model.stream(PICTURE, QUESTIONS[0])
        next(iter(stream))
        model.memory.forget(id=model.encode(PICTURE).memories[0].id)
        del stream
        assert len(model._answering.prefixes) == 0


def test_the_cache_is_bounded(passes: list[int]) -> None:
    with ta.load(STORED_BUNDLE, cache_mb=0.1) as model:
        prefixes = model._answering.prefixes
        for seed in range(12):
            model.ask(drawn(seed), QUESTIONS[0], max_new_tokens=1)
            assert 0 < prefixes.nbytes <= prefixes.max_bytes < 100_000
        assert 1 < len(prefixes) < 12
        passes.clear()
        model.ask(drawn(11), QUESTIONS[0], max_new_tokens=1)
        model.ask(drawn(0), QUESTIONS[0], max_new_tokens=1)
        assert [len(passes), passes[0]] == [3, passes[2]]  # the newest is there, the oldest is not
    with pytest.raises(ta.InputError, match="cache_mb -1: must be"):
        ta.load(STORED_BUNDLE, cache_mb=-1)


def test_concurrent_questions_about_one_picture_do_not_disturb_each_other() -> None:
    with ta.load(STORED_BUNDLE, threads=1) as model:
        pictures = [drawn(seed) for seed in range(3)]
        pairs = [(picture, question) for picture in pictures for question in QUESTIONS] * 3
        expected = [model.ask(picture, question).text for picture, question in pairs]
        assert len(set(expected)) > 1
    with ta.load(STORED_BUNDLE, threads=1) as model, ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda pair: model.ask(*pair).text, pairs)) == expected


def test_an_lru_lets_go_of_what_was_used_longest_ago() -> None:
    store: Lru[npt.NDArray[np.uint8]] = Lru(10)
    four = np.zeros(4, np.uint8)
    store.put("a", four)
    store.put("b", four)
    store.get("a")
    store.put("c", four)
    assert [store.get(name) is not None for name in "abc"] == [True, False, True]
    store.put("a", np.zeros(11, np.uint8))  # too large: what was there under this name is out of date
    assert (len(store), store.nbytes) == (1, 4)


def test_an_array_of_another_kind_is_refused_though_its_bytes_were_seen() -> None:
    with ta.load(STORED_BUNDLE, threads=1) as model:
        picture = drawn(1)
        model.encode(picture)
        for wrong in (picture.view(np.int8), np.zeros((1,) * 25, np.uint8)):
            with pytest.raises(ta.InputError, match="image array: need"):
                model.encode(wrong)


def test_an_answer_tells_what_was_kept_and_the_cache_can_be_cleared(
    passes: list[int], seen: list[tuple[int, int]]
) -> None:
    with ta.load(STORED_BUNDLE, threads=1) as model:
        picture = drawn(1)
        first, again = (model.ask(picture, question, max_new_tokens=1) for question in QUESTIONS[:2])
        visual = len(model.encode(picture).tokens)
        assert (first.cached_tokens, again.cached_tokens) == (0, again.prompt_tokens - passes[-1])
        assert visual <= again.cached_tokens < again.prompt_tokens
        model.clear_cache()
        cleared = model.ask(picture, QUESTIONS[1], max_new_tokens=1)
        assert (cleared.text, cleared.cached_tokens, len(seen)) == (again.text, 0, 2)
        assert cleared.prompt_tokens == again.prompt_tokens == sum(passes[-2:])
    with pytest.raises(ta.InputError, match="closed"):
        model.clear_cache()
