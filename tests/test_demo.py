"""The demo's folder: made whole, and never at the cost of what is not its own. The demo itself takes minutes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")

from tinyalign_edge.demo import run
from tinyalign_edge.errors import InputError


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not an earlier demo"):
        run.run_demo(tmp_path, seed=0)
    (tmp_path / run.MARKER).touch()
    with pytest.raises(InputError, match="not an earlier demo"):
        run.run_demo(tmp_path, seed=0)
    assert (tmp_path / "thesis.txt").exists()


def test_an_interrupted_demo_leaves_a_folder_that_the_next_one_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_make_towers", interrupt)
    monkeypatch.setattr(run, "TRAIN_SCENES", 30)
    monkeypatch.setattr(run, "TEST_SCENES", 20)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run.run_demo(tmp_path / "out", seed=0)
        assert [path.name for path in (tmp_path / "out").iterdir()] == [run.MARKER]


@pytest.mark.slow
def test_the_demo_shows_what_it_promises(tmp_path: Path) -> None:
    report = run.run_demo(tmp_path / "out", seed=1)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    accuracy = report["accuracy"]
    assert report["agreement_int8"] >= 0.97
    assert accuracy["memory"] > max(accuracy["baseline"], accuracy["memory_shuffled"]) + report["accuracy_ci95"]
    assert report["loss"]["memory"] < report["loss"]["baseline"]
