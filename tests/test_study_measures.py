"""What the study measures without a model, or with another memory; what its plan and its summary hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("optimum")

from tests.banks import key_of, make_bank, unit
from tinyalign_edge.bench.study import measure
from tinyalign_edge.bench.study.datasets import SAME_TEXT, SETTINGS, DataSet, apart
from tinyalign_edge.bench.study.measure import Bench
from tinyalign_edge.bench.study.plan import ABLATIONS, DATASETS, MAIN, NOTHING_TOLD, OWN, Run, plan, short
from tinyalign_edge.bench.study.summary import summarise
from tinyalign_edge.config import read_json
from tinyalign_edge.data import IMAGE, Turn, read_rows
from tinyalign_edge.evaluate import MemoryMode, score
from tinyalign_edge.memory import Bank, Record, write_bank
from tinyalign_edge.memory.search import quantize_keys
from tinyalign_edge.train.options import TrainOptions

SHARES = (10, 20, 40, 70, 100)


def row(name: str, *turns: str, **more: Any) -> dict[str, Any]:
    """A row of the picture `name`: question, answer, question, answer ..."""
    said = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    said[0]["value"] = f"{IMAGE}\n{said[0]['value']}"
    return {"id": name, "image": name, "conversations": said, **more}


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(rows), "utf-8")
    for name in {row["image"] for row in rows}:
        (path.parent / name).touch()
    return path


def at(*degrees: float) -> np.ndarray:
    """Unit keys in a plane."""
    angles = np.deg2rad(np.array(degrees))
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


class Looking(Bench):
    """A bench whose answerer has a bank and the keys of the questions, and no model."""

    bank: Bank
    keys: np.ndarray

    def answerer(self, run: Run, *, bank_of: Run | None = None) -> Any:
        prepared = SimpleNamespace(keys=self.keys)
        return SimpleNamespace(checkpoint=SimpleNamespace(bank=self.bank), prepare=lambda rows: prepared)


@pytest.mark.parametrize("near", [1, 256], ids=["looked for among all", "found among the nearest"])
def test_what_is_copied_is_the_answer_of_the_nearest_entry_that_was_asked_the_same(
    near: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "NEAR", near)
    turns = write(
        tmp_path / "turns.json",
        [
            row("a.png", "How many?", "two", "Is it red?", "yes"),
            row("b.png", "What colour?", "teal", "How many?", "four"),
            row("c.png", "What colour?", "blue"),
            row("d.png", "Is it red?", "no"),
        ],
    )
    tests = write(
        tmp_path / "test.json",
        [
            row("q.png", "What colour?", "teal"),  # nearest: a, not asked; b is, and right
            row("r.png", "How many?", "two"),  # nearest: a, and right
            row("s.png", "What colour?", "teal"),  # nearest: d, not asked; c is nearer than b, and wrong
            row("t.png", "Where?", "here"),  # nobody was asked
            row("q.png", "Is it red?", "yes"),  # nearest: a, and right
            row("s.png", "Is it red?", "yes"),  # nearest: d, and wrong
        ],
    )
    data = DataSet("hand", turns, turns, tmp_path, (tests,), tmp_path, vision="", lm="")
    bench = Looking(tmp_path, {"hand": data}.__getitem__)
    records = [Record("a caption", source=name) for name in ("a.png", "b.png", "c.png", "d.png")]
    write_bank(tmp_path / "bank", at(0, 30, 60, 120), records, fingerprint="f", vocab_size=9, token_ids=[[1]] * 4)
    bench.bank, bench.keys = Bank(tmp_path / "bank"), at(5, 5, 119, 0, 5, 119)
    found = measure.copy(bench, Run("hand", "memory"))
    assert found.keys() == {"open", "yes_no"}  # and no loss
    assert (found["open"]["n"], found["open"]["exact_match"]) == (4, 0.5)
    assert (found["yes_no"]["n"], found["yes_no"]["exact_match"]) == (2, 0.5)


@pytest.mark.parametrize("count", [1, 3, 30, 299, 300])
@pytest.mark.parametrize("k", [1, 4, 16])
def test_a_part_of_a_bank_finds_what_a_search_of_the_kept_entries_alone_does(
    count: int, k: int, tmp_path: Path
) -> None:
    whole, keys = Bank(make_bank(tmp_path / "bank")), unit(300)
    rounded, scales = quantize_keys(keys)
    exact = rounded * scales[:, None]
    kept = np.sort(np.random.default_rng(count).permutation(300)[:count])
    queries = np.stack([keys[kept[0]], *(key_of(f"query {i}") for i in range(20))])
    cosines = queries @ exact[kept].T
    for floor in (-1.0, 0.5):
        found = measure._Part(whole, kept).nearest(queries, k, floor=floor)
        for mine, rows, alike in zip(cosines, found.rows, found.similarity, strict=True):
            order = [i for i in np.argsort(-mine)[:k] if mine[i] >= floor]
            assert rows.tolist() == [*kept[order].tolist(), *[-1] * (k - len(order))]
            assert alike[: len(order)] == pytest.approx(mine[order], abs=1e-5)


@pytest.fixture(scope="module")
def bench(world: Path, towers: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("study")
    few = [{**row, "conversations": row["conversations"][:2]} for row in read_json(world / "test.json")]
    (folder / "test.json").write_text(json.dumps(few[:10]), "utf-8")
    tiny = DataSet(
        "tiny", world / "train.json", world / "train.json", world, (folder / "test.json",), world,
        vision=str(towers / "vit"), lm=str(towers / "lm"),
    )  # fmt: skip
    options = TrainOptions(
        steps=3, batch_size=4, visual_tokens=4, k=2, device="cpu", eval_every=3, learning_rate=1e-2, episodes=0.0
    )
    return Bench(folder, {"tiny": tiny}.__getitem__, {"tiny": options})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("arm", "own"), [("memory", "own"), ("shuffled", "shuffled")])
def test_an_arm_is_asked_with_the_memory_that_it_was_trained_with_and_with_none(
    arm: str, own: MemoryMode, bench: Bench
) -> None:
    run = Run("tiny", arm)
    found, answerer, rows = measure.scores(bench, run), bench.answerer(run), bench.rows(run)
    losses = {}
    for memory in ("own", "shuffled", "none"):
        asked = list(answerer.ask_all(rows, memory=memory))
        result = found["empty_bank"] if memory == "none" else found
        losses[memory] = sum(item.nll for item in asked) / sum(item.tokens for item in asked)
        if memory in (own, "none"):
            assert result["loss"] == pytest.approx(losses[memory], abs=1e-5)
            groups = [[item for item in asked if (item.reference in ("yes", "no")) == closed] for closed in (0, 1)]
            for group, items in zip(("open", "yes_no"), groups, strict=True):
                assert result[group]["exact_match"] == score(items).exact_match
                assert result[group]["n"] == len(items) > 0
    assert len({round(loss, 4) for loss in losses.values()}) == 3  # or nothing would tell them apart


def test_the_plan_measures_all_that_is_asked_of_it() -> None:
    names = {part.name for part in plan()}
    wanted = set()
    for name in ("caltech", "easy_vqa", "scenes", "nlvr"):
        for seed in (0, 1, 2) if name in ("caltech", "easy_vqa") else (0,):
            wanted |= {f"{name}.{arm}.{share}.{seed}.scores" for arm in ("baseline", "memory") for share in SHARES}
            wanted |= {f"{name}.shuffled.100.{seed}.scores"}
            wanted |= {f"{name}.memory.100.{seed}.{kind}" for kind in ("copy", "emi")}
            if name in ("caltech", "easy_vqa"):
                wanted |= {f"{name}.{arm}.100.{seed}.int8" for arm in ("baseline", "memory")}
            if name == "caltech":
                wanted |= {f"{name}.memory.100.{seed}.teach"}
    wanted |= {f"{name}.memory.100.0.bank_sizes" for name in ("caltech", "easy_vqa")}
    assert not wanted - names


ABLATED: list[tuple[str, dict[str, Any]]] = [
    ("fused", {"memory": "tokens", "key": "fused"}),
    ("random", {"memory": "paper", "key": "picture"}),
    ("latents-untrained", {"memory": "latents", "freeze_values": True}),
    ("latents", {"memory": "latents", "freeze_values": False}),
    ("hybrid", {"memory": "hybrid"}),
    *((f"k-{k}", {"memory": "tokens", "k": k}) for k in (1, 2, 8, 16)),
    *((f"latents-{n}", {"memory": "latents", "latents": n}) for n in (2, 4, 16, 32)),
]


def test_a_memory_that_tells_nothing_keeps_the_same_words_of_every_picture(tmp_path: Path) -> None:
    rows = [{"id": f"{i}", "caption": f"a {name}", "conversations": []} for i, name in enumerate(("crab", "lobster"))]
    train, turns = tmp_path / "train.json", tmp_path / "turns.json"
    train.write_text(json.dumps(rows), "utf-8")
    data = DataSet("tiny", train, turns, tmp_path, (), tmp_path, vision="", lm="")
    assert (data.training_file("answers"), data.training_file("turns")) == (train, turns)
    for _ in range(2):  # made once
        said = read_json(data.training_file("same"))
        assert [row["id"] for row in said] == ["0", "1"]
        assert {row["caption"] for row in said} == {SAME_TEXT}
    asked = [{"id": "0", "caption": "a crab", "conversations": [{"value": f"{IMAGE}\nWhat?"}, {"value": "crab"}] * 2}]
    train.write_text(json.dumps(asked), "utf-8")
    assert [row["caption"] for row in read_json(data.training_file("apart"))] == ["crab", "crab"]
    arms = [Run("caltech", arm).options(SETTINGS["caltech"]) for arm in ("no-copy", *NOTHING_TOLD)]
    shuffled = replace(arms[0], shuffle_memory=True)
    assert arms == [arms[0], shuffled, arms[0], shuffled]  # two of them differ from the others in the text alone


@pytest.mark.parametrize(("arm", "differs"), ABLATED, ids=[arm for arm, _ in ABLATED])
def test_every_ablation_that_is_asked_for_is_planned_on_both_data_sets(arm: str, differs: dict[str, Any]) -> None:
    names = {part.name for part in plan()}
    for name in ("caltech", "easy_vqa"):
        assert f"{name}.{arm}.100.0.scores" in names
        options = Run(name, arm).options(SETTINGS[name])
        assert {option: getattr(options, option) for option in differs} == differs


@pytest.mark.parametrize("name", MAIN)
def test_an_ablation_is_left_out_where_the_data_sets_own_settings_are_the_same(name: str) -> None:
    def made(arm: str) -> TrainOptions:
        options = Run(name, arm).options(SETTINGS[name])
        return replace(options, key=options.key or "picture", copy_words=options.copy_words is not False)

    names = {part.name for part in plan()}
    for arm in ABLATIONS:
        same = made(arm) == made(short(name, "memory"))
        assert (f"{name}.{arm}.100.0.scores" not in names) == same == (arm in OWN[name]), arm


def final(loss: float) -> dict[str, Any]:
    return {"curve": [{"step": 0, "held_out_loss": 2.0}, {"step": 40, "held_out_loss": loss}]}


def figures(name: str) -> dict[str, dict[str, dict[str, Any]]]:
    """The paths of `summary.json` that are demanded of a data set, and parts of which each is made to be 0.25."""
    matched = {"open": {"exact_match": 0.25}}
    curve = [{"step": step, "held_out_loss": loss} for step, loss in ((0, 2.0), (10, 0.5), (40, 0.4))]
    paths: dict[str, dict[str, dict[str, Any]]] = {
        f"final_loss.{arm}": {f"{arm}.100.0.scores": final(0.25)} for arm in ("baseline", "memory")
    }
    paths["steps_to_baseline_loss_ratio"] = {
        "baseline.100.0.scores": final(0.5), "memory.100.0.scores": {"curve": curve},
    }  # fmt: skip
    for arm in ("baseline", "memory"):
        paths |= {f"score.{arm}.{share}": {f"{arm}.{share}.0.scores": matched} for share in SHARES}
    paths["score.shuffled_memory"] = {"shuffled.100.0.scores": matched}
    paths["score.copy_neighbour"] = {"memory.100.0.copy": matched}
    paths |= {f"emi.{what}": {"memory.100.0.emi": {what: 0.25}} for what in ("image", "memory")}
    paths["emi.shuffled"] = {"shuffled.100.0.emi": {"shuffled_memory": 0.25}}
    if name == "caltech":
        for figure, shots in (("teach", (0, 1, 3, 5)), ("teach_choices", (0, 1, 3, 5)), ("teach_ceiling", (1, 3, 5))):
            paths |= {f"{figure}.{n}": {"memory.100.0.teach": {figure: {str(n): 0.25}}} for n in shots}
    return paths


DEMANDED = [(name, path) for name in DATASETS for path in figures(name)]


@pytest.mark.parametrize(("name", "path"), DEMANDED, ids=[f"{name}.{path}" for name, path in DEMANDED])
def test_the_summary_has_every_figure_that_is_asked_of_it_by_its_name(name: str, path: str) -> None:
    done = {f"{name}.{part}": result for part, result in figures(name)[path].items()}
    for results, mean in (({}, None), (done, 0.25)):
        found = json.loads(json.dumps(summarise(results)))[name]
        for key in path.split("."):
            found = found[key]
        assert {"mean", "std"} <= found.keys()
        assert (found["mean"], found["std"]) == (mean, None)


def test_rows_taken_apart_have_one_question_each_whose_answer_is_what_their_entry_keeps(tmp_path: Path) -> None:
    rows = [
        row("a.png", "What colour?", "red", "Is it red?", "yes", caption="a red circle"),
        row("b.png", "How many?", "two"),
    ]
    rows[0]["conversations"][2]["value"] = f"Is it {IMAGE} red?"
    before = json.dumps(rows)
    made = apart(rows)
    assert json.dumps(rows) == before
    asked = [one["conversations"][0]["value"] for one in made]
    assert all(text.count(IMAGE) == 1 and text.startswith(f"{IMAGE}\n") for text in asked)
    assert [one["id"] for one in made] == ["a.png-0", "a.png-1", "b.png-0"]
    read = read_rows(write(tmp_path / "apart.json", made), tmp_path)
    assert [(one.image, one.turns, one.caption) for one in read] == [
        ("a.png", (Turn("What colour?", "red"),), "red"),
        ("a.png", (Turn("Is it  red?", "yes"),), "yes"),
        ("b.png", (Turn("How many?", "two"),), "two"),
    ]
    assert [turn for one in read for turn in one.memory_turns] == [Turn("", text) for text in ("red", "yes", "two")]
