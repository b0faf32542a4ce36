"""The recorded runs of the latency benchmark: the bundle in given shapes, what the README shows, the goal's measure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from tinyalign_edge.bench import first_token, latency, record
from tinyalign_edge.errors import InputError
from tinyalign_edge.latency.measure import Setting, check
from tinyalign_edge.latency.work import Work


@pytest.fixture(scope="module")
def shaped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes") / latency.FULL
    return latency.shaped_bundle(folder, "smoke-encoder", "smoke-lm", 4, 50)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where results go, beside a README with the marks."""
    (tmp_path / "README.md").write_text(f"before\n\n{latency.BEGIN}\nold\n{latency.END}\n\nafter\n")
    for module in (record, latency):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "bench" / "results")
    (tmp_path / "bench" / "results").mkdir(parents=True)
    return tmp_path / "bench" / "results"


def test_a_bundle_in_given_shapes_reads_its_whole_memory_and_is_made_once(shaped: Path) -> None:
    facts = check(Setting(str(shaped), "shapes", True, 1), Work(prompt_tokens=latency.PROMPT_TOKENS))
    found = (facts.visual_tokens, facts.memory_tokens, facts.prompt_tokens)
    assert found == (4, 4 * latency.ENTRY_TOKENS, latency.PROMPT_TOKENS)
    before = (shaped / "bundle.json").stat().st_mtime_ns
    assert latency.shaped_bundle(shaped, "smoke-encoder", "smoke-lm", 4, 50) == shaped
    assert (shaped / "bundle.json").stat().st_mtime_ns == before
    assert [path.name for path in shaped.parent.iterdir()] == [shaped.name]


def test_the_run_is_stored_and_shown_between_the_marks(
    shaped: Path, results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(latency, "full_bundle", lambda _: shaped)
    monkeypatch.setattr(latency, "CONTEXTS", (40,))
    goal = {"tokens": 76, "share": 0.5, "goal": 0.25, "median_ms": {"ours": 1, "llama.cpp": 1, "encoder": 1}}
    (results / latency.GOAL_FILE).write_text(json.dumps(goal))
    for _ in range(2):
        latency.main(["--only", latency.FULL, "--threads", "1", "--repetitions", "1"])
    stored = json.loads((results / f"latency-{latency.FULL}.json").read_text())
    assert stored["command"].endswith(f"--only {latency.FULL} --threads 1 --repetitions 1")
    assert {"host", "commit", "versions", "rows", "nodes"} <= set(stored)
    text = (results.parents[1] / "README.md").read_text()
    assert text.startswith(f"before\n\n{latency.BEGIN}") and text.endswith(f"{latency.END}\n\nafter\n")
    assert "old" not in text and "50.0% of their sum (goal: 25%" in text
    assert text.count("| first_token |") == 2 and "most expensive" not in text
    with pytest.raises(InputError, match=r"bench\.demo"):
        latency.main(["--only", "demo", "--runs", str(results)])


class Engine:
    """Answers a fixed time, in place of another package's engine, which is not installed here."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def ask(self, **request: Any) -> dict[str, float]:
        self.asked.append(request)
        return {"seconds": 0.5}


def test_the_goal_is_our_first_token_beside_prefill_of_as_many_tokens_and_encoder(shaped: Path) -> None:
    work = Work(prompt_tokens=latency.PROMPT_TOKENS, new_tokens=2, repetitions=2, warmup=0)
    setting = Setting(str(shaped), "ours", True, 1)
    llama, encoder = Engine(), Engine()
    checked = first_token.Checked(setting, check(setting, work))
    found = first_token.measure(checked, work, llama, encoder, 1)  # type: ignore[arg-type]
    assert found["tokens"] == 4 + 4 * latency.ENTRY_TOKENS + latency.PROMPT_TOKENS
    assert {request["tokens"] for request in llama.asked} == {found["tokens"]}
    assert {name: len(samples) for name, samples in found["samples_ms"].items()} == dict.fromkeys(
        ("ours", "llama.cpp", "encoder"), 2
    )
    assert found["share"] == pytest.approx(found["median_ms"]["ours"] / 1000)
