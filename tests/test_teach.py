"""Teaching by example: what is taught when, what counts as right, and the ceiling."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.conftest import shared  # noqa: E402
from tests.towers import train_tiny  # noqa: E402
from tinyalign_edge.bench import teach  # noqa: E402
from tinyalign_edge.bench.study.eye import Eye  # noqa: E402
from tinyalign_edge.config import read_json  # noqa: E402
from tinyalign_edge.data import Row, read_rows  # noqa: E402
from tinyalign_edge.evaluate import normalize  # noqa: E402
from tinyalign_edge.memory import Bank  # noqa: E402
from tinyalign_edge.train.answer import TorchAnswerer  # noqa: E402
from tinyalign_edge.train.checkpoint import load_checkpoint  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

FILES = ("teach", "query", "test")


def row(image: str, answer: str) -> dict[str, Any]:
    said = ({"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": answer})
    return {"id": image, "image": image, "conversations": said}


def write(folder: Path, **files: Sequence[dict[str, Any]]) -> Path:
    for name in FILES:
        (folder / f"{name}.json").write_text(json.dumps(files[name]), "utf-8")
        for item in files[name]:
            (folder / item["image"]).touch()
    return folder


class Pupil:
    """Names a class freely once it has seen three examples of it, among choices once it has seen one; the nearest entry
    is the one that was taught last. It forgets what it was trained on when it knows ten examples."""

    def __init__(self) -> None:
        self.lessons: list[list[Row]] = []

    @property
    def taught(self) -> Counter[str]:
        return Counter(row.turns[0].answer for rows in self.lessons for row in rows)

    def teach(self, rows: Sequence[Row]) -> None:
        self.lessons.append(list(rows))

    def say(self, rows: Sequence[Row]) -> list[str]:
        taught = self.taught
        known = {answer for answer, count in taught.items() if count >= 3}
        known |= {"a cat"} if taught.total() < 10 else set()
        return [row.turns[0].answer.upper() if row.turns[0].answer in known else "?" for row in rows]

    def choose(self, rows: Sequence[Row], choices: Sequence[str]) -> list[str]:
        assert list(choices) == ["a zab", "a kop", "a vun"]
        taught = self.taught
        return [row.turns[0].answer if taught[row.turns[0].answer] else "?" for row in rows]

    def nearest(self, rows: Sequence[Row]) -> list[str]:
        last = next(rows[-1] for rows in reversed(self.lessons) if rows)
        return [last.turns[0].answer] * len(rows)


def test_accuracies_are_taken_after_each_number_of_examples_none_of_which_is_taught_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = {"a zab": 6, "a kop": 4, "a vun": 1}
    lessons = [row(f"{answer[2:]}{i}", answer) for i in range(6) for answer, count in named.items() if i < count]
    queries = [row(f"query{i}", answer) for i, answer in enumerate(["a zab", "a zab", "a kop", "a vun"])]
    seen = [row("cat", "a cat"), row("dog", "a dog")]
    pupil = Pupil()
    monkeypatch.setattr(teach, "_pupil", lambda *_: pupil)
    found = teach.teach_accuracies(tmp_path, folder=write(tmp_path, teach=lessons, query=queries, test=seen))
    assert [[row.id for row in rows] for rows in pupil.lessons] == [
        [],
        ["zab0", "kop0", "vun0"],
        ["zab1", "kop1", "zab2", "kop2"],
        ["zab3", "kop3", "zab4"],
    ]
    assert found == {
        "teach": {"0": 0.0, "1": 0.0, "3": 0.75, "5": 0.75},
        "teach_choices": {"0": 0.0, "1": 1.0, "3": 1.0, "5": 1.0},
        "teach_ceiling": {"1": 0.25, "3": 0.25, "5": 0.5},  # the last ones are a vun, a kop, a zab
        "seen": {"before": 0.5, "after": 0.0},
    }


def test_a_limit_asks_fewer_queries_the_same_ones_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    class Asked(Pupil):
        def say(self, rows: Sequence[Row]) -> list[str]:
            asked.append([row.id for row in rows])
            return super().say(rows)

    rows = {name: [row(f"{name}{i}", "a zab") for i in range(20)] for name in FILES}
    rows["teach"] += [row("kop", "a kop"), row("vun", "a vun")]
    monkeypatch.setattr(teach, "_pupil", lambda *_: Asked())
    for limit in (4, 4, None):
        teach.teach_accuracies(tmp_path, folder=write(tmp_path, **rows), limit=limit)
    first, second, whole = (asked[start : start + 6] for start in (0, 6, 12))  # before, four numbers, after
    assert first == second != whole
    assert {len(ids) for ids in first} == {4} and {len(ids) for ids in whole} == {20}
    assert first[0] == first[5] and len({tuple(ids) for ids in first[1:5]}) == 1


def test_a_checkpoint_is_taught_beside_its_own_memory_which_stays(world: Path, towers: Path, tmp_path: Path) -> None:
    """Names are of no class; a query whose picture is a lesson's finds that lesson, and what is said is compared."""
    checkpoint = train_tiny(world, towers, tmp_path / "c", k=2, episodes=0.0)
    names = [item["image"] for item in read_json(world / "test.json")]
    lessons = [row(names[i], ("a zab", "a kop")[i % 2]) for i in range(6)]
    asked = [(0, "a zab"), (2, "a zab"), (1, "a zab"), (8, "a kop"), (9, "a kop")]
    queries = [row(names[i], answer) for i, answer in asked]
    (tmp_path / "images").symlink_to(world / "images")
    write(tmp_path, teach=lessons, query=queries, test=read_json(world / "test.json")[12:15])
    files = {name: read_rows(tmp_path / f"{name}.json", tmp_path) for name in FILES}
    before = {path.name: path.read_bytes() for path in (checkpoint / "memory").iterdir()}
    found = teach.teach_accuracies(checkpoint, folder=tmp_path, encode=Eye())
    assert {path.name: path.read_bytes() for path in (checkpoint / "memory").iterdir()} == before

    answerer, bank = TorchAnswerer(load_checkpoint(checkpoint)), Bank(checkpoint / "memory")
    taught, wanted = (answerer.prepare(files[name]).keys for name in ("teach", "query"))
    old = bank.nearest(wanted, 1)
    for shots in (1, 3, 5):
        ceiling = []
        for query, own, entry, alike in zip(wanted, files["query"], old.rows[:, 0], old.similarity[:, 0], strict=True):
            known = [i for i in range(6) if i // 2 < shots]
            best = max(known, key=lambda i: float(taught[i] @ query))
            text = files["teach"][best].turns[0].answer if taught[best] @ query > alike else bank.entry(int(entry)).text
            ceiling.append(normalize(text) == normalize(own.turns[0].answer))
        assert found["teach_ceiling"][str(shots)] == np.mean(ceiling)
        assert ceiling[0] and not ceiling[2]  # the same picture, called so and otherwise
    assert ceiling[1] and found["teach_ceiling"]["5"] > 0

    said = [item.answer for item in answerer.ask_all(files["test"])]
    right = [normalize(a) == normalize(row.turns[0].answer) for a, row in zip(said, files["test"], strict=True)]
    assert found["seen"]["before"] == np.mean(right)
    pupil = teach.TorchPupil(checkpoint, tmp_path / "bank", answerer.encode)
    pupil.teach(files["teach"])
    for figure, rows in (("teach", files["query"]), ("seen", files["test"])):
        right = [normalize(a) == normalize(b.turns[0].answer) for a, b in zip(pupil.say(rows), rows, strict=True)]
        assert found[figure]["5" if figure == "teach" else "after"] == np.mean(right)
    chosen = pupil.choose(files["query"], ["a zab", "a kop"])
    right = [a == b.turns[0].answer for a, b in zip(chosen, files["query"], strict=True)]
    assert found["teach_choices"]["5"] == np.mean(right)


def test_no_picture_that_is_taught_is_asked_and_no_class_was_trained_on() -> None:
    folder = shared("data", "caltech101")
    train, lessons, queries = (read_json(folder / f"{name}.json") for name in ("train", "teach", "query"))
    pictures = [{item["image"] for item in rows} for rows in (train, lessons, queries)]
    assert not pictures[1] & pictures[2] and not pictures[0] & (pictures[1] | pictures[2])
    answers = [{m["value"] for item in rows for m in item["conversations"][1::2]} for rows in (train, lessons, queries)]
    assert answers[2] <= answers[1]
    assert not answers[0] & answers[1]
    counts = Counter(item["conversations"][1]["value"] for item in lessons)
    assert min(counts.values()) >= teach.SHOTS[-1]
