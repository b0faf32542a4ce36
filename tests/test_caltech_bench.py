"""The Caltech-101 run trains what it says: the study's arms, for the steps that are asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("optimum")

from tinyalign_edge.bench import caltech
from tinyalign_edge.bench.study.datasets import SETTINGS, DataSet
from tinyalign_edge.train.options import TrainOptions, check_options


class BegunError(Exception):
    """All that is trained is known."""


@pytest.mark.parametrize("arm", ["none", "tokens", "latents"])
def test_every_arm_is_the_studys_with_the_steps_that_are_asked_for(
    arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataSet("caltech", tmp_path / "train.json", tmp_path / "turns.json", tmp_path, (), tmp_path, "v", "l")
    given: dict[str, Any] = {}

    def trained(folder: Path, **rest: Any) -> None:
        given.update(rest, folder=folder)
        raise BegunError

    monkeypatch.setattr(caltech, "find_dataset", lambda *_: data)
    monkeypatch.setattr(caltech, "trained", trained)
    with pytest.raises(BegunError):
        caltech.run_arm(arm, tmp_path / "out", 40)
    options: TrainOptions = given["options"]
    check_options(options)
    assert (given["folder"], given["data"]) == (tmp_path / "out" / arm, data.train)
    assert (options.memory, options.steps, options.learning_rate) == (arm, 40, caltech.LEARNING_RATE)
    joins = None if arm == "none" else SETTINGS["caltech"].memory_from
    same = replace(options, memory="tokens", memory_from=joins)
    assert same == replace(
        SETTINGS["caltech"],
        steps=40,
        eval_every=25,
        learning_rate=caltech.LEARNING_RATE,
        memory_from=joins,
        memory="tokens",
        key=None if arm == "none" else "picture",
    )
