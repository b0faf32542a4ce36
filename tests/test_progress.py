"""What is told of long work: a bar that fits its terminal, plain lines in a log."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from tinyalign_edge import progress as progress_module
from tinyalign_edge.progress import progress

NOTE = "loss 0.586, 43,354 tokens/s"
LEFT = r"\d:\d\d:\d\d left"
SHOWN_CURSOR = b"\x1b[?25h"  # what a bar ends with


def work(label: str = "Training memory", steps: int = 3, total: int | None = 2000) -> None:
    with progress(label, total) as advance:
        for _ in range(steps):
            advance(400, NOTE)


def test_a_log_has_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress_module, "EVERY_S", 0.0)
    work(steps=5)
    lines = capsys.readouterr().err.splitlines()
    wanted = [rf"Training memory: {n} of 2000, {NOTE}, after \d:\d\d:\d\d(, {LEFT})?" for n in (400, 800, 1200, 1600)]
    wanted.append(rf"Training memory: 2000 of 2000, {NOTE}, done after \d:\d\d:\d\d")
    assert len(lines) == 5
    for line, pattern in zip(lines, wanted, strict=True):
        assert re.fullmatch(pattern, line), line
    assert all(re.search(LEFT, line) for line in lines[1:-1])


def test_short_work_is_one_line_of_a_log(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as many a CI does: a log holds no escapes all the same
    work(steps=5)
    work("Reading", steps=2, total=None)
    (first, second) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"Training memory: 2000 of 2000, {NOTE}, done after \d:\d\d:\d\d", first)
    assert re.fullmatch(rf"Reading: 800, {NOTE}, done after \d:\d\d:\d\d", second)


def test_work_that_is_not_shown_prints_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress_module, "EVERY_S", 0.0)
    for hidden in (progress("few", 3, brief=True), progress("of another process", 3, shown=False)):
        with hidden as advance:
            advance()
    assert capsys.readouterr().err == ""


def test_work_that_was_not_brief_after_all_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress_module, "EVERY_S", 0.0)
    with progress("few, and slow", 3, brief=True) as advance:
        advance()
        monkeypatch.setattr(progress_module, "BRIEF_S", 0.0)
        advance()
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("few, and slow: 2 of 3, after ")
    assert last.startswith("few, and slow: 2 of 3, done after ")


@pytest.mark.parametrize(("columns", "label"), [(80, "Training mem"), (120, "Training memory without dropout")])
def test_a_terminal_shows_every_figure(monkeypatch: pytest.MonkeyPatch, columns: int, label: str) -> None:
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm-256color")
    with os.fdopen(master, "rb", buffering=0) as screen, os.fdopen(slave, "w") as terminal:
        with monkeypatch.context() as patch:
            patch.setattr("sys.stderr", terminal)
            work("Training memory without dropout", total=12000)
        drawn = b""
        while not drawn.endswith(SHOWN_CURSOR):
            drawn += screen.read(4096)
    rows = [row for row in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.decode())) if row.strip()]
    assert max(map(len, rows)) <= columns
    assert rows[-1].startswith(label)
    assert re.search(rf"[━╸╺]{{4,}} +1200/12000 {NOTE} \d:\d\d:\d\d left \d:\d\d:\d\d$", rows[-1].rstrip()), rows[-1]


@pytest.mark.filterwarnings("ignore")
def test_a_training_tells_its_log_loss_and_speed_and_keeps_the_speed(
    world: Path, towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.towers import train_tiny

    monkeypatch.setattr(progress_module, "EVERY_S", 0.0)
    out = train_tiny(world, towers, tmp_path / "c", memory="none")
    points = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    first, second, last = points
    assert first["tokens_per_second"] is first["train_loss"] is None
    assert all(isinstance(point["tokens_per_second"], int) for point in (second, last))
    lines = capsys.readouterr().err.splitlines()
    told = [line for line in lines if re.match(r"Training[^:]*: [1-4] of 4, ", line)]
    loss, speed = last["train_loss"], last["tokens_per_second"]
    assert f" 4 of 4, loss {loss:.3f}, {speed:,} tokens/s, done after " in told[-1]  # the last step's own
    assert any(line.split(": ")[1].startswith("2 of 4, ") and re.search(LEFT, line) for line in told)
    assert any(re.match(r"Encoding pictures: 8 of 80, after ", line) for line in lines)
