"""What may happen to an open model: threads, forks, folders that vanish, other models beside it."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

import tinyalign_edge as ta
from tests.conftest import STORED_BUNDLE
from tests.test_prefix import PICTURE, QUESTIONS, drawn
from tinyalign_edge.runtime.sessions import DEVICES, threads_of
from tinyalign_edge.runtime.sight import Sight


def test_a_bundle_that_is_removed_while_it_is_open_goes_on_answering(bundle: Path) -> None:
    with ta.load(bundle, threads=1) as model:
        assert model.memory is not None
        expected = [model.ask(PICTURE, question).text for question in QUESTIONS]
        shutil.rmtree(bundle)
        assert [model.ask(PICTURE, question).text for question in QUESTIONS] == expected
        assert model.ask(drawn(5), QUESTIONS[0]).tokens > 0  # encoded and searched anew
        with pytest.raises(ta.TinyAlignError, match=str(bundle)):
            model.memory.add(PICTURE, "a cat")
        with pytest.raises(ta.TinyAlignError, match=str(bundle)):
            model.memory.refresh()
        assert model.ask(PICTURE, QUESTIONS[0]).text == expected[0]
    with pytest.raises(ta.InputError, match="no such bundle folder"):
        ta.load(bundle)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_is_told_to_load_the_model_itself() -> None:
    with ta.load(STORED_BUNDLE, threads=1) as model:
        talk = model.chat()
        child = os.fork()
        if child == 0:
            refused = 0
            for act in (lambda: model.ask(PICTURE, QUESTIONS[0]), lambda: talk.ask("What?", PICTURE), model.chat):
                try:
                    act()
                except ta.InputError as error:
                    refused += "before this process was forked" in str(error)
            os._exit(refused)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        assert model.ask(PICTURE, QUESTIONS[0]).text


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_closes_and_loads_though_the_threads_stayed_behind() -> None:
    with ta.load(STORED_BUNDLE, threads=2) as model:
        expected = model.ask(PICTURE, QUESTIONS[0]).text
        child = os.fork()
        if child == 0:
            signal.alarm(30)  # where it waits for ever, this ends it
            model.close()
            with ta.load(STORED_BUNDLE, threads=2) as own:
                os._exit(7 if own.ask(PICTURE, QUESTIONS[0]).text == expected else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert model.ask(PICTURE, QUESTIONS[0]).text == expected


def test_two_models_in_one_process_do_not_meet(bundle: Path) -> None:
    with ta.load(STORED_BUNDLE, threads=1) as one, ta.load(bundle, threads=1) as other:
        assert other.memory is not None
        entry = other.memory.add(PICTURE, "a large red cat.")
        assert entry.id in [memory.id for memory in other.ask(PICTURE, QUESTIONS[0]).memories]
        expected = one.ask(PICTURE, QUESTIONS[0])
        assert entry.text not in [memory.text for memory in expected.memories]
        other.close()
        assert one.ask(PICTURE, QUESTIONS[0]).text == expected.text


def test_closing_ends_conversations_too() -> None:
    with ta.load(STORED_BUNDLE, threads=1) as model:
        talk = model.chat()
        talk.ask(QUESTIONS[0], PICTURE)
    for act in (lambda: talk.ask(QUESTIONS[1]), model.chat):
        with pytest.raises(ta.InputError, match="the model was closed"):
            act()


@pytest.mark.parametrize("threads", [None, 1, "phone", "board", "server", ta.Threads(2, spinning=False, affinity="1")])
def test_threads_are_a_number_a_device_or_settings(threads: int | str | ta.Threads | None) -> None:
    with ta.load(STORED_BUNDLE, threads=threads) as model:
        assert model.ask(PICTURE, QUESTIONS[0]).text
    assert [threads_of(device).spinning for device in DEVICES] == [False, False, True]


def test_threads_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ta.InputError, match="threads 'toaster': not one of phone, board, server"):
        ta.load(STORED_BUNDLE, threads="toaster")
    with pytest.raises(ta.InputError, match="threads 0: must be 1 to"):
        ta.load(STORED_BUNDLE, threads=0)
    for count, affinity in ((None, "1"), (3, "1"), (1, "1"), (2, "first"), (2, "")):
        with pytest.raises(ta.InputError, match="name the processors of"):
            ta.Threads(count, affinity=affinity)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_closing_unmaps_every_file_though_answers_are_kept(bundle: Path) -> None:
    def mapped() -> list[str]:
        return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(bundle) in line]

    model = ta.load(bundle, threads=1)
    answer, image = model.ask(PICTURE, QUESTIONS[0]), model.encode(PICTURE)
    assert mapped()
    model.close()
    gc.collect()
    assert mapped() == []
    assert answer.memories[0].text
    assert image.memories[0].value.size


def test_an_answer_of_a_model_that_is_closed_meanwhile_is_never_one_without_its_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with ta.load(STORED_BUNDLE, threads=1) as model:
        see = Sight.see

        def closed_meanwhile(self: Sight, *given: Any) -> Any:
            seen = see(self, *given)
            model.close()
            return seen

        monkeypatch.setattr(Sight, "see", closed_meanwhile)
        with pytest.raises(ta.InputError, match="the model was closed"):
            model.ask(drawn(9), QUESTIONS[0])


def test_a_memory_of_another_bank_is_searched_anew(bundle: Path) -> None:
    with ta.load(STORED_BUNDLE, threads=1) as one, ta.load(bundle, threads=1) as other:
        assert one.memory is not None and other.memory is not None
        other.memory.add(PICTURE, "a large red cat.")
        image = other.encode(PICTURE)
        assert "a large red cat." in [entry.text for entry in image.memories]
        expected = [entry.text for entry in one.encode(PICTURE).memories]
        assert [entry.text for entry in one.ask(image, QUESTIONS[0]).memories] == expected


def test_a_closed_model_is_not_taught_either() -> None:
    with ta.load(STORED_BUNDLE, threads=1) as model:
        memory, image = model.memory, model.encode(PICTURE)
    assert memory is not None
    with pytest.raises(ta.InputError, match="the model was closed"):
        memory.add(image, "a cat")
