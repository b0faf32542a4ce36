"""The conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import tinyalign_edge as ta
from tests.conftest import STORED_BUNDLE
from tinyalign_edge import cli, cli_chat

PICTURE = STORED_BUNDLE.parent / "picture.png"
QUESTION = "What colour is the circle?"
Talk = Callable[..., tuple[int, list[str], list[str]]]


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    """Type lines into the chat about a bundle; an exception among them is what the terminal raises."""

    def call(bundle: Path, *given: object, lines: Sequence[str | BaseException]) -> tuple[int, list[str], list[str]]:
        typed = iter(lines)

        def read(_: str) -> str:
            line = next(typed, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(sys, "argv", ["tinyalign-edge", "chat", str(bundle), *map(str, given)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out.splitlines(), err.splitlines()

    return call


def test_a_conversation_in_the_terminal(talk: Talk, bundle: Path) -> None:
    with ta.load(bundle) as model:
        expected = model.ask(PICTURE, QUESTION).text
    lines = [f"/image {PICTURE}", "", QUESTION, "/reset", QUESTION, "/exit", "not asked any more"]
    assert talk(bundle, lines=lines) == (0, [expected, expected], [])
    assert talk(bundle, PICTURE, lines=[QUESTION]) == (0, [expected], [])


def test_the_memory_is_taught_and_made_to_forget(talk: Talk, bundle: Path) -> None:
    lines = ["/remember a large red cat.", "/memories", "/forget", "/memories", "/forget"]
    code, out, err = talk(bundle, PICTURE, lines=lines)
    assert code == 0
    number = out[0].removeprefix("remembered as entry ")
    assert out[1].split()[0] == number
    assert out[1].endswith("a large red cat.  (chat, " + out[1].rpartition(", ")[2])
    forgotten = out.index(f"forgotten: entry {number}")
    assert not any("red cat" in line for line in out[forgotten:])
    assert len(err) == 1
    assert "nothing was remembered" in err[0]
    with ta.load(bundle) as model:
        assert model.memory is not None
        assert int(number) not in model.memory.bank.ids
    code, _, err = talk(bundle, PICTURE, lines=["/remember a red cat.", f"/forget {int(number) + 1}", "/forget"])
    assert (code, len(err), "nothing was remembered" in err[0]) == (0, 1, True)


def test_mistakes_are_one_line_and_the_conversation_goes_on(talk: Talk, bundle: Path) -> None:
    lines = [
        "/memories",
        "/image nowhere.png",
        "/fly",
        "/forget 1 2",
        "/forget 123456",
        "why " * 400,
        "/help",
        QUESTION,
    ]
    code, out, err = talk(bundle, lines=lines)
    assert code == 0
    parts = ("no picture was shown", "nowhere.png: no such image", "/fly: no such command", "/forget 1 2: not a number")
    for line, part in zip(err, (*parts, "/forget 123456: there is no such", "the context has 256"), strict=True):
        assert line.startswith("error: ")
        assert part in line
    assert out[: len(cli_chat.HELP.splitlines())] == cli_chat.HELP.splitlines()
    assert len(out) == len(cli_chat.HELP.splitlines()) + 1
    assert "no memory" in talk(bundle, PICTURE, "--no-memory", lines=["/memories"])[2][0]


def test_an_interrupt_ends_the_answer_and_not_the_program(
    talk: Talk, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinyalign_edge.runtime.text import Text

    push, calls = Text.push, [0]

    def interrupted(self: Text, token: int) -> str:
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        return push(self, token)

    with ta.load(bundle) as model:
        expected = model.ask(PICTURE, QUESTION).text
    monkeypatch.setattr(Text, "push", interrupted)
    code, out, err = talk(bundle, PICTURE, lines=[QUESTION, KeyboardInterrupt(), QUESTION])
    assert (code, err) == (0, [])
    assert [line for line in out if "interrupted" in line] == ["(interrupted; /exit leaves)"] * 2
    assert out[-1] == expected, "with the picture, which came with the question that was not answered"
