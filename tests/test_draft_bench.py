"""What the benchmark of drafts on captions asks, in which arms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")

import tinyalign_edge as ta
from tests.test_prefix import drawn
from tinyalign_edge.bench.caption_drafts import VIEWS, asked, view_of
from tinyalign_edge.bench.drafts import measure, teach
from tinyalign_edge.data import Picture, Row, Turn


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
