"""The comparison with other engines: what is refused, what is counted, how it goes on. No speed is asserted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from tinyalign_edge.bench import record
from tinyalign_edge.bench.peers import check, limits, profile, run, table
from tinyalign_edge.bench.peers.plan import parts
from tinyalign_edge.bench.peers.shapes import LANGUAGE
from tinyalign_edge.latency.profile import node_times


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("peers")


@pytest.fixture
def measured(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the benchmark on a tiny model with our engine alone; returns the recorded result."""
    monkeypatch.setattr(record, "RESULTS", root / "results")
    monkeypatch.setattr(limits, "SECONDS", 0.01)
    monkeypatch.setattr(limits, "READ_BYTES", 2**16)
    monkeypatch.setattr(limits, "SIDE", 64)

    def go(model: str, *arguments: str) -> dict[str, Any]:
        fixed = ["--models", model, "--only", "tinyalign-edge", "--threads", "1", "--rounds", "2"]
        run.main([*fixed, "--root", str(root), *arguments])
        capsys.readouterr()
        found: dict[str, Any] = json.loads((root / "results" / "peers.json").read_text())
        return found

    return go


def test_every_phase_is_measured_and_a_second_run_measures_nothing_anew(measured: Any) -> None:
    result = measured("smoke-lm")
    assert result["failed"] == []
    phases = {(row["precision"], row["phase"], row["tokens"], row["context"]) for row in result["rows"]}
    assert phases == {(precision, *column) for precision in ("int8", "int4", "fp32") for column in table.COLUMNS}
    for row in result["rows"]:
        assert len(row["samples"]) == 2
        assert row["median_per_s"] == pytest.approx(np.mean(row["samples"]))
        assert row["peak_rss_bytes"] > row["bytes"] > 0
    assert [row["tokens"] for row in result["passes"]] == [1, 2, 4, 8, 16]
    exact, rounded = ({c["engine"]: c for c in result["correctness"]}[f"tinyalign-edge {p}"] for p in ("fp32", "int8"))
    assert exact["kl"] < 1e-8 < rounded["kl"]
    assert exact["top1"] == 1
    assert [share["phase"] for share in result["limits"]["shares"]] == ["prefill"] * 3 + ["decode"] * 2
    assert measured("smoke-lm")["rows"] == result["rows"]


def test_an_encoder_is_compared_with_torch_and_counted_in_images(measured: Any) -> None:
    result = measured("smoke-encoder")
    assert {(row["precision"], row["phase"]) for row in result["rows"]} == {("int8", "encode"), ("fp32", "encode")}
    assert all(figures["cosine"] > 0.999 for figures in result["correctness"])


@pytest.mark.slow
def test_an_engine_that_computes_another_model_is_reported_and_not_timed(measured: Any, root: Path) -> None:
    measured("smoke-lm")
    reference = root / "models" / "smoke-lm" / "source" / check.REFERENCE
    kept = reference.read_bytes()
    try:
        np.save(reference, np.roll(np.load(reference), 1, axis=-1))
        result = measured("smoke-lm", "--again")
    finally:
        reference.write_bytes(kept)
    assert result["rows"] == []
    assert [failure["engine"] for failure in result["failed"]] == [
        "tinyalign-edge int8",
        "tinyalign-edge int4",
        "tinyalign-edge fp32",
    ]
    assert all("computes another model" in failure["why"] for failure in result["failed"])


def test_divergence_and_agreement_of_distributions_known_by_hand() -> None:
    expected = np.log(np.array([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]], np.float32))
    found = np.log(np.array([[0.25, 0.5, 0.25], [0.8, 0.1, 0.1]], np.float32)) + 7  # logits have no origin
    figures = check.compare_logits(found, expected)
    assert figures["kl"] == pytest.approx((0.5 * np.log(2) + 0.25 * np.log(0.5)) / 2)
    assert figures["top1"] == 0.5


def test_counted_weights_are_those_of_the_model() -> None:
    config = LANGUAGE["smollm2-135m"].config
    norms = 61 * 576
    assert limits.layer_weights(config) + 576 * 49152 + norms == 134_515_008  # SmolLM2-135M, as published
    assert limits.multiply_adds(config, 2) - limits.multiply_adds(config, 1) == limits.layer_weights(config)


def test_models_are_measured_with_two_threads_first_and_tinyllama_only_so() -> None:
    names = [part.name for part in parts(["smollm2-135m", "tinyllama-1.1b"], [1, 2])]
    assert names == ["smollm2-135m-2", "smollm2-135m-1", "tinyllama-1.1b-2"]


def test_ratios_are_set_beside_their_goals() -> None:
    common = {"model": "smollm2-135m", "threads": 2, "phase": "prefill", "tokens": 256, "context": 0}
    sizes = {"bytes": 1, "peak_rss_bytes": 1}
    rows = [
        {"engine": "tinyalign-edge", "precision": "int8", **common, **sizes, "median_per_s": 900.0, "samples": [900.0]},
        {"engine": "llama.cpp", "precision": "q8_0", **common, **sizes, "median_per_s": 200.0, "samples": [200.0]},
    ]
    *_, (_, ratios) = table.tables({"rows": rows, "passes": []})
    reached = {(line[0], line[2]): line[3:] for line in ratios[1:]}
    assert reached["prefill 256", "llama.cpp q8_0"] == ["4.50", "≥ 5", "no"]
    assert reached["prefill 256", "onnxruntime-genai int8"] == ["–", "≥ 5", "–"]


def test_profile_sums_the_nodes_of_a_kind(capsys: pytest.CaptureFixture[str]) -> None:
    def event(operator: str, name: str, microseconds: int) -> dict[str, Any]:
        return {"cat": "Node", "name": f"{name}_kernel_time", "dur": microseconds, "args": {"op_name": operator}}

    events = [event("MatMul", f"layers.{i}.o_proj", 3000) for i in range(2)] + [event("Mul", "x", 2000)]
    session = {"cat": "Session", "name": "model_run", "dur": 9}
    profile.print_shares(node_times([*events * 3, session], profile.kind))
    first, second = capsys.readouterr().out.splitlines()[1:3]
    assert first.split() == ["MatMul", "o_proj", "2", "6.00", "75.0%"]
    assert second.split() == ["Mul", "1", "2.00", "25.0%"]
