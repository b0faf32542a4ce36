"""The study's data sets: their rows as the arms read them, their towers, and the settings that all arms share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from tinyalign_edge.bench.record import shared
from tinyalign_edge.bench.study.plan import Text
from tinyalign_edge.config import read_json, write_json
from tinyalign_edge.data import IMAGE, Row, read_rows
from tinyalign_edge.train.options import TrainOptions

CLOSED = ("yes", "no", "true", "false")  # answers of questions that are reported apart from the open ones
SCENES_SEED = 0
MOST_ASKED = 5000
SAME_TEXT = "a picture"

# What all arms of a data set share, but for what the plan's `TRIAL_SETTINGS` name. Steps: where the baseline's
# held-out loss flattens. The learning rate is chosen by the plan's trials, and where there are some, when the memory is
# first read and whether its words can be copied; those of caltech have the key of the picture alone.
COMMON = TrainOptions(bf16=True, device="cpu", eval_every=25, weight_decay=0.1)
SETTINGS = {
    "caltech": replace(COMMON, steps=1600, eval_every=50, key="question", memory_from=0.125),
    "easy_vqa": replace(
        COMMON, steps=400, batch_size=64, key="question", memory_from=0.375, copy_words=False, episodes=0.0
    ),
    "scenes": replace(COMMON, steps=1200, eval_every=50, visual_tokens=4, k=1, key_grid=3),  # as the demo, but longer
    "nlvr": replace(COMMON, steps=200),
}


@dataclass(frozen=True)
class DataSet:
    """Rows to train on and to test on, and the towers between which the connectors train.

    Attributes:
        train: rows whose entry in the bank is what they answer (see `with_captions` and `apart`).
        turns: the same rows, whose entries are their questions with their answers.
    """

    name: str
    train: Path
    turns: Path
    train_images: Path
    tests: tuple[Path, ...]
    test_images: Path
    vision: str
    lm: str

    def training_file(self, text: Text) -> Path:
        """The rows to train on, whose entries in the bank keep `text`."""
        if text in ("answers", "turns"):
            return self.train if text == "answers" else self.turns
        made = self.turns.with_name(f"{text}.json")
        if not made.is_file():
            rows = read_json(self.train)
            _write_rows(made, apart(rows) if text == "apart" else [{**row, "caption": SAME_TEXT} for row in rows])
        return made

    def test_rows(self) -> list[Row]:
        """The questions of the test files, one a row, or evenly spaced ones of many."""
        rows = [row for file in self.tests for row in read_rows(file, self.test_images)]
        return rows[:: -(-len(rows) // MOST_ASKED) or 1]


def find_dataset(name: str, out: Path) -> DataSet:
    """A data set by name, its prepared files below `out`."""
    return _MAKERS[name](name, out / "data" / name)


def with_captions(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows whose caption, what an entry of the bank keeps, is made of their own answers to open questions.

    "a bonsai" and not "Is there a chair? no What is in the picture? a bonsai": fewer tokens, and what `memory add`
    teaches has the same form. Rows that answer no open question stay as they are.
    """
    made = []
    for row in rows:
        answers = [message["value"] for message in row["conversations"][1::2]]
        known = list(dict.fromkeys(answer for answer in answers if answer not in CLOSED))
        made.append({**row, "caption": ", ".join(known)} if known and "caption" not in row else row)
    return made


def apart(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each question, as a key that tells what is asked takes them; an entry keeps the answer alone."""
    made = []
    for row in rows:
        turns = list(zip(row["conversations"][::2], row["conversations"][1::2], strict=True))
        for number, (asked, answer) in enumerate(turns):
            question = {**asked, "value": f"{IMAGE}\n{asked['value'].replace(IMAGE, '').strip()}"}
            one = {**row, "id": f"{row['id']}-{number}", "conversations": [question, answer]}
            made.append({**one, "caption": answer["value"]})
    return made


def is_closed(answer: str) -> bool:
    """Whether an answer is one of a yes/no question."""
    return answer in CLOSED


def _shared(
    folder: str, train: str, tests: tuple[str, ...], prepare: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
) -> Callable[[str, Path], DataSet]:
    def make(name: str, prepared: Path) -> DataSet:
        source = shared("data", folder)
        captioned, turns = prepared / "train.json", prepared / "turns.json"
        if not turns.is_file():
            rows = prepare(read_json(source / train))
            _write_rows(captioned, rows)
            _write_rows(turns, without_captions(rows))
        return DataSet(
            name, captioned, turns, source, tuple(source / test for test in tests), source,
            vision=str(shared("models", "mobilenet-v2-imagenet")), lm=str(shared("models", "caption-lm")),
        )  # fmt: skip

    return make


def _scenes(name: str, prepared: Path) -> DataSet:
    """The built-in world and its own towers, as the demo makes them."""
    from tinyalign_edge.demo.dataset import write_dataset
    from tinyalign_edge.demo.language_tower import pretrain_language
    from tinyalign_edge.demo.run import TEST_SCENES, TRAIN_SCENES
    from tinyalign_edge.demo.vision_tower import pretrain_vision
    from tinyalign_edge.demo.world import make_scenes

    whole = prepared / "whole"
    if not whole.exists():
        scenes = make_scenes(TRAIN_SCENES, seed=1000), make_scenes(TEST_SCENES, seed=2000)
        write_dataset(prepared, *scenes, seed=SCENES_SEED)
        pretrain_vision(prepared / "vision", seed=SCENES_SEED)
        pretrain_language(prepared / "language", seed=SCENES_SEED)
        _write_rows(prepared / "turns.json", without_captions(read_json(prepared / "train.json")))
        whole.touch()
    return DataSet(
        name, prepared / "train.json", prepared / "turns.json", prepared, (prepared / "test.json",), prepared,
        vision=str(prepared / "vision"), lm=str(prepared / "language"),
    )  # fmt: skip


def without_captions(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, whose entries are then their questions with their answers."""
    return [{name: value for name, value in row.items() if name != "caption"} for row in rows]


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path.with_suffix(".part"), rows)
    path.with_suffix(".part").replace(path)


_MAKERS = {
    "caltech": _shared("caltech101", "train.json", ("test.json", "test_yesno.json"), with_captions),
    "easy_vqa": _shared("easy_vqa", "train.json", ("test.json",), apart),
    "scenes": _scenes,
    "nlvr": _shared("nlvr", "dev.json", ("test.json",), with_captions),
}
find_dataset = cache(find_dataset)
