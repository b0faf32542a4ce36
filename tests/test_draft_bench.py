"""What the benchmark of drafts on captions asks, in which arms."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")

import tinyalign_edge as ta
from tests.test_prefix import drawn
from tinyalign_edge.bench.caption_drafts import VIEWS, asked, view_of
from tinyalign_edge.bench.drafts import measure, teach
from tinyalign_edge.bench.note_drafts import QUESTION, notes_of, write_data
from tinyalign_edge.data import Picture, Row, Turn, read_rows


def test_the_views_of_a_photograph_differ() -> None:
    photograph = Image.fromarray(drawn(1))
    views = [view_of(photograph, view) for view in range(VIEWS)]
    assert [view.size for view in views] == [(32, 32)] + [(27, 27)] * 4
    assert len({np.asarray(view).tobytes() for view in views}) == VIEWS


def test_no_view_is_asked_about_with_its_own_caption(bundle: Path, tmp_path: Path) -> None:
    rows = []
    for number in range(6):
        path = tmp_path / f"{number}.png"
        Image.fromarray(drawn(number)).save(path)
        picture = Picture(path.name, path)
        rows.append(Row(f"view-{number}", (picture,), (Turn("What?", f"a thing of kind {number}"),), None, ""))
    with ta.load(bundle, threads=1, memory_dir=tmp_path / "memory") as model:
        teach(model, rows)
        arms = asked(model, rows)
        for row, (own, _), (other, _), (none, _) in zip(rows, *arms.values(), strict=True):
            assert len(own.memories) == len(other.memories) == model.manifest.memory.k
            assert row.id not in [entry.source for entry in own.memories]
            assert none.memories == ()
            np.testing.assert_array_equal(own.visual_tokens, other.visual_tokens)
        found = measure(model, arms["own"], new_tokens=12, rounds=1)
    assert (found["answers"], found["differ"], len(found["speed_up_samples"])) == (6, 0, 1)
    assert 0 < found["tokens_a_pass"] < 16


def test_a_note_is_long_and_the_same_for_all_pictures_of_a_class(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "data"
    source.mkdir()
    kinds = {"1.png": "an anchor", "2.png": "a soccer ball", "3.png": "an anchor", "4.png": "a soccer ball"}
    for name in kinds:
        Image.fromarray(drawn(int(name[0]))).save(source / name)
    for part, names in {"train": ("1.png", "2.png"), "test": ("3.png", "4.png")}.items():
        turns = [
            [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": kinds[name]}] for name in names
        ]
        rows = [{"id": name, "image": name, "conversations": said} for name, said in zip(names, turns, strict=True)]
        (source / f"{part}.json").write_text(json.dumps(rows))
    write_data(folder, source)
    train, test = (read_rows(folder / f"{part}.json", source) for part in ("train", "test"))
    notes = [row.turns[0].answer for row in train]
    assert [row.turns[0].answer for row in test] == notes
    assert notes == list(notes_of({"anchor", "soccer ball"}).values())
    assert notes[0] != notes[1] and notes[1].startswith("the soccer ball is kept on the ")
    assert {row.turns[0].question for row in train} == {QUESTION}
    assert len(set(notes_of(set(map(str, range(100)))).values())) == 100
