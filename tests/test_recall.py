"""The benchmark of the memory, at tiny sizes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tests.banks import make_bank
from tinyalign_edge.memory import rebuild as rebuild_module
from tinyalign_edge.runtime import sight

pytest.importorskip("torch")  # the benchmarks' extra


def test_sizes_are_measured_once_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tinyalign_edge.bench import recall
    from tinyalign_edge.memory import verified

    monkeypatch.setattr(rebuild_module, "SWITCH_OVER", 50)
    monkeypatch.setattr(verified, "SETTLED_NS", 0)
    bank, out = make_bank(tmp_path / "bank"), tmp_path / "out"
    part = recall.part("real", out, bank=bank)
    assert (part["entries"], part["stats"]["graph_entries"]) == (270, 270)
    assert all(found["near"] > 0.99 for found in part["quality"].values())
    assert part["verified"]["open_ms"] > 0
    assert {path.name for path in out.iterdir()} == {"real.json"}
    shutil.rmtree(bank)
    assert recall.part("real", out, bank=bank) == part
    parts = [{**part, "name": "270"}] * 3 + [part]
    with (tmp_path / "table").open("w+") as file:
        Console(width=80, file=file).print(recall.table(parts))
        file.seek(0)
        shown = file.read()
    assert "within 0.005 of 4th" in shown and "real, 270" in shown and "…" not in shown
    assert len(shown.splitlines()) == len(recall._lines(32)) + 1  # no cell takes two lines


def test_synthetic_keys_have_the_spectrum_that_is_fitted_to_them() -> None:
    from tinyalign_edge.bench.synthetic_keys import Spectrum, fit_spectrum, stored_spectrum, synthetic_keys

    keys = synthetic_keys(2000, 64, Spectrum(-0.8, 20, 0.4), seed=3)
    np.testing.assert_allclose(np.linalg.norm(keys, axis=1), 1, atol=1e-5)
    fitted = fit_spectrum(keys, texts=100)
    assert (fitted.exponent, fitted.group) == (pytest.approx(-0.8, abs=0.1), 20)
    assert fitted.within == pytest.approx(0.4, abs=0.1)
    assert stored_spectrum().exponent < 0


def test_the_memorys_share_of_the_first_token_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tinyalign_edge.bench import retrieval_share
    from tinyalign_edge.bench.random_bundle import random_bundle

    bundle = random_bundle("smoke-encoder", "smoke-lm", tmp_path / "shapes", visual_tokens=4)
    seen: list[object] = []
    preprocess = sight.preprocess
    monkeypatch.setattr(sight, "preprocess", lambda *given: (seen.append(given), preprocess(*given))[1])
    found = retrieval_share.measure(bundle, 300, 5, 1, 2)
    assert len(seen) == 1 + 2 * (retrieval_share.WARM_UP + 2)  # the picture is encoded for every question
    assert (found["memory_tokens"], found["visual_tokens"]) == (20, 4)
    assert found["retrieval_share"] > 0
