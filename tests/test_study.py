"""The study: its plan, parts that are not repeated, and a report from whatever parts there are."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("optimum")

from tinyalign_edge.bench import trained
from tinyalign_edge.bench.study import datasets, measure, plan, runner, tables
from tinyalign_edge.bench.study.datasets import DataSet, with_captions
from tinyalign_edge.bench.study.goals import Goal, goals
from tinyalign_edge.bench.study.measure import Bench
from tinyalign_edge.bench.study.plan import Part, Run
from tinyalign_edge.bench.study.report import Places, filled, write_report
from tinyalign_edge.bench.study.runner import run_missing
from tinyalign_edge.bench.study.score import ask
from tinyalign_edge.bench.study.store import keep, recorded, results
from tinyalign_edge.bench.study.summary import steps_ratio, summarise
from tinyalign_edge.config import read_json
from tinyalign_edge.errors import InputError
from tinyalign_edge.evaluate import single_questions
from tinyalign_edge.train.answer import TorchAnswerer
from tinyalign_edge.train.checkpoint import load_checkpoint
from tinyalign_edge.train.options import TrainOptions, check_options

ROOT = Path(__file__).parent.parent
SCORES = Part(Run("tiny", "memory"), "scores")


@pytest.fixture
def bench(world: Path, towers: Path, tmp_path: Path) -> Bench:
    tiny = DataSet(
        "tiny", world / "train.json", world / "train.json", world, (world / "test.json",), world,
        vision=str(towers / "vit"), lm=str(towers / "lm"),
    )  # fmt: skip
    options = TrainOptions(steps=2, batch_size=4, visual_tokens=4, k=2, device="cpu", eval_every=1)
    return Bench(tmp_path / "study", {"tiny": tiny}.__getitem__, {"tiny": options})


def test_the_plan_begins_with_what_matters_most_and_names_each_part_once() -> None:
    parts = plan.plan()
    assert len({part.name for part in parts}) == len(parts)
    mine = [part.name for part in parts if part.run.seed != plan.TUNING_SEED]
    assert mine[:2] == ["caltech.baseline.100.0.scores", "caltech.memory.100.0.scores"]
    assert mine.index(f"caltech.{plan.ABLATIONS[0]}.100.0.scores") > max(
        mine.index(f"{name}.memory.40.2.scores") for name in plan.MAIN
    )
    for name in plan.MAIN:
        for arm in ("baseline", "memory"):
            done = {
                (p.run.share, p.run.seed)
                for p in parts
                if (p.run.dataset, p.run.arm, p.kind) == (name, arm, "scores") and p.run.seed != plan.TUNING_SEED
            }
            assert done == {(share, seed) for share in plan.SHARES for seed in plan.SEEDS}


def test_both_arms_take_the_learning_rate_with_which_the_baseline_ends_lowest(bench: Bench) -> None:
    bench.settings = {"caltech": bench.settings["tiny"]}
    with pytest.raises(InputError, match=r"its learning rate comes from caltech\.baseline-lr-0\.001"):
        bench.options(Run("caltech", "memory"))
    for (rate, trial), loss in zip(plan.rate_trials("caltech").items(), (0.3, 0.2, 0.25), strict=True):
        keep(bench.out, trial, {"curve": [{"step": 0, "held_out_loss": 0.1}, {"step": 9, "held_out_loss": loss}]})
        assert bench.options(trial.run).learning_rate == rate
    for arm in ("baseline", "memory", "baseline-long"):
        assert bench.options(Run("caltech", arm)).learning_rate == 3e-3


def test_every_arm_is_a_training_that_can_be_had_and_both_arms_share_the_settings() -> None:
    shared = TrainOptions(steps=400)
    made = {name: Run("caltech", name, 40, 1).options(shared) for name in (*plan.ARMS, *plan.TRIALS)}
    for options in made.values():
        check_options(options)
    assert replace(made["memory"], memory="none") == made["baseline"]
    for name, changes in {
        "untrained": {"freeze_values": True},
        "read": {"reconstruct": plan.OWN_LOSS},
        "long": {"steps": 800},
        "gate": {"gate": True},
        "wide-48": {"latent_dim": 48},
        "wide-192": {"latent_dim": 192},
        "32": {"latents": 32},
    }.items():
        assert made[f"latents-{name}"] == replace(made["latents"], **changes)  # type: ignore[arg-type]
        assert f"latents-{name}" in (*plan.ABLATIONS, *plan.TRIED_ONCE)
    for arm in ("baseline", "memory"):
        assert made[f"{arm}{plan.DROPPED}"] == replace(made[arm], dropout=plan.DROPOUT)
    assert (made["memory"].fraction, made["memory"].seed, made["paper"].batch_size) == (0.4, 1, 96)


def test_ablations_and_trials_may_have_fewer_steps_and_are_read_beside_runs_with_as_many() -> None:
    names = {part.name for part in plan.plan()}

    def steps(dataset: str, *arms: str) -> list[int | None]:
        return [Run(dataset, arm).options(TrainOptions(steps=1200)).steps for arm in arms]

    for arm in plan.MAIN_ARMS:
        beside = plan.short("caltech", arm)
        assert steps("caltech", arm, beside, "k-1", "latents-long", "baseline-long") == [1200, 800, 800, 1600, 1600]
        assert steps("easy_vqa", arm, "k-1", "baseline-long") == [1200, 1200, 2400]
        assert plan.short("easy_vqa", arm) == arm
        assert f"caltech.{beside}.100.2.scores" in names and f"easy_vqa.{beside}-short.100.0.scores" not in names
        options = Run("caltech", arm).options(TrainOptions(steps=1200))
        beside_it = Run("caltech", beside).options(TrainOptions(steps=1200))
        key = None if arm == "baseline" else "picture"
        assert replace(options, steps=800, eval_every=beside_it.eval_every, key=key) == beside_it
    assert Run("caltech", "k-1").options(TrainOptions(steps=2)).steps == 2
    for arm, every in (("memory", 50), ("memory-short", 25), ("k-1", 25)):  # losses are known equally often
        assert Run("caltech", arm).options(TrainOptions(steps=1600, eval_every=50)).eval_every == every


def test_caltechs_memory_is_told_the_question_and_compared_with_the_key_of_the_picture_alone() -> None:
    made = {arm: Run("caltech", arm).options(datasets.SETTINGS["caltech"]) for arm in plan.ARMS}
    for arm in ("memory", "shuffled"):
        assert (made[arm].key, made[arm].steps, made[arm].batch_size) == ("question", 1600, 96)
        assert made[f"{arm}-picture"] == replace(made[arm], key="picture", batch_size=32)
    alike = replace(made["memory"], memory="none", key=None, memory_from=None, batch_size=32)
    assert alike == made["baseline"]  # as many questions a step: its rows have three
    assert made["baseline-apart"] == replace(made["baseline"], batch_size=96)  # as many questions a step
    assert plan.ARMS["baseline-apart"].text == "apart"
    assert made["question"] == replace(made["memory"], steps=800, eval_every=25)
    names = {part.name for part in plan.plan()}
    assert {"caltech.baseline-apart.100.0.scores", f"caltech.memory{plan.DROPPED}.100.2.scores"} <= names
    for seed in plan.SEEDS:
        wanted = {"memory-picture.100", "memory-picture.40", "shuffled-picture.100"}
        assert {f"caltech.{run}.{seed}.scores" for run in wanted} < names


def test_every_result_that_is_recorded_is_of_the_plan() -> None:
    """Those of no part would be lost by the next report."""
    names = {part.name for part in plan.plan()}
    for name in plan.DATASETS:
        recorded_parts = read_json(Places().results / f"{name}.json")["parts"]
        assert recorded_parts and not recorded_parts.keys() - names


def test_an_entry_keeps_what_its_row_answers_openly() -> None:
    def row(*answers: str) -> dict[str, object]:
        return {"conversations": [{"value": v} for answer in answers for v in ("?", answer)]}

    rows = with_captions([row("yes", "teal", "circle", "teal"), row("yes"), {**row("red"), "caption": "mine"}])
    assert [row.get("caption") for row in rows] == ["teal, circle", None, "mine"]


def test_a_part_that_is_there_is_not_repeated_and_a_checkpoint_serves_several(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = SCORES.run
    parts = [
        SCORES,
        *(Part(run, kind) for kind in ("emi", "copy", "bank_sizes")),
        Part(replace(run, arm="shuffled"), "scores"),
    ]
    labels = []
    train = trained.train
    monkeypatch.setattr(trained, "train", lambda **given: (labels.append(given["label"]), train(**given)))
    run_missing(bench, parts[:1])
    first = results(bench.out, parts)
    run_missing(bench, parts)
    done = results(bench.out, parts)
    assert list(done) == [part.name for part in parts]
    assert done[SCORES.name] == first[SCORES.name]
    assert labels == ["tiny.memory.100.0", "tiny.shuffled.100.0"]
    assert [point["step"] for point in first[SCORES.name]["curve"]] == [0, 1, 2, 3]  # the last one of the copy term
    assert done[parts[3].name]["100"]["loss"] == pytest.approx(first[SCORES.name]["loss"], abs=1e-6)
    told = done[parts[1].name]
    assert told["memory"] == pytest.approx(told["nll_image"] - first[SCORES.name]["loss"], abs=1e-6)
    assert_taken_up(done, bench, parts)
    bench.check(parts)
    with pytest.MonkeyPatch.context() as patch:  # a trial is to be measured again: which rate is right is not known
        patch.setattr(measure, "DATASETS", ("tiny",))
        bench.check(parts)
    newer = json.loads(json.dumps(done))
    newer[SCORES.name]["settings"]["memory"]["of_later_code"] = 1
    assert_taken_up({name: result for name, result in done.items() if ".memory." not in name}, bench, parts, held=newer)
    options = bench.settings["tiny"]
    bench.settings = {"tiny": replace(options, steps=3)}
    assert_taken_up({}, bench, parts, held=done)
    with pytest.raises(
        InputError, match=r"tiny\.memory\.100\.0 was trained with other settings .* remove .*100\.0\.\*"
    ):
        bench.check(parts)
    with pytest.raises(InputError, match="was trained with steps 2, not 3 as wanted"):
        bench.checkpoint(run)
    for changes, message in (
        ({"k": 3}, r"was trained with memory\.k 2, not 3 as wanted"),
        ({"copy_words": False}, r"was trained with memory\.copy_dim \d+, not 0 as wanted"),
        ({"memory_dropout": 0.25}, r"was trained with memory\.memory_dropout 0\.0, not 0\.25 as wanted"),
        ({"episodes": 0.2}, r"was trained with episodes 0\.1, not 0\.2 as wanted"),
        ({"connector": "pixel_shuffle"}, r"was trained with connector\.kind pooled, not pixel_shuffle as wanted"),
        ({"visual_tokens": 1}, r"was trained with connector\.visual_tokens 4, not 1 as wanted"),
        ({"weight_decay": 0.2}, r"was trained with weight_decay 0\.01, not 0\.2 as wanted"),
    ):
        bench.settings = {"tiny": replace(options, **changes)}
        with pytest.raises(InputError, match=message):
            bench.checkpoint(run)
    assert "0 of 5" in runner.time_left(bench.out, parts)


def assert_taken_up(
    wanted: dict[str, Any], bench: Bench, parts: list[Part], *, held: dict[str, Any] | None = None
) -> None:
    """What a bench that has nothing takes over of the results in a repository's file."""
    folder = bench.out / "recorded"
    folder.mkdir(exist_ok=True)
    (folder / "tiny.json").write_text(
        json.dumps({"parts": {**(held or wanted), "tiny.unplanned.100.0.scores": {}}}), "utf-8"
    )
    with tempfile.TemporaryDirectory(dir=bench.out) as scratch:
        other = Bench(Path(scratch), bench.dataset, bench.settings)
        other.take_up(recorded(folder, parts), parts)
        assert results(other.out, parts) == wanted
        keep(other.out, SCORES, {"loss": 3.0})
        other.take_up(recorded(folder, parts), parts)
        assert results(other.out, parts)[SCORES.name] == {"loss": 3.0}  # its own counts more


def test_of_many_test_questions_evenly_spaced_ones_are_asked(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = bench.dataset("tiny")
    rows = tiny.test_rows()
    for most, step in ((len(rows), 1), (len(rows) - 1, 2), (3, -(-len(rows) // 3))):
        monkeypatch.setattr(datasets, "MOST_ASKED", most)
        assert tiny.test_rows() == rows[::step]


@pytest.mark.slow
def test_a_bundle_and_a_share_are_measured_too(bench: Bench, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("teach", "query"):
        rows = read_json(world / "test.json")[: 5 if name == "teach" else 2]
        (world / f"{name}.json").write_text(json.dumps(rows), "utf-8")
    monkeypatch.setattr(measure, "TAUGHT", "tiny")
    monkeypatch.setattr(measure, "teach_accuracies", partial(measure.teach_accuracies, folder=world))
    run = SCORES.run
    parts = [SCORES, Part(run, "int8"), Part(replace(run, share=50), "full_bank"), Part(run, "emi"), Part(run, "teach")]
    run_missing(bench, parts)
    whole, other = (
        answerer.checkpoint.config.memory.floor
        for answerer in (bench.answerer(run), bench.answerer(replace(run, share=50), bank_of=run))
    )
    assert other == whole != bench.checkpoint(replace(run, share=50)).config.memory.floor
    done = results(bench.out, parts)
    for figure in ("image", "memory", "shuffled_memory"):  # of the first seed
        assert done[parts[1].name]["emi"][figure] == pytest.approx(done[parts[3].name][figure], abs=0.05)
    taught, in_torch = done[parts[1].name]["teach"], done[parts[4].name]
    assert taught["teach"].keys() == in_torch["teach"].keys() and taught["seen"].keys() == in_torch["seen"].keys()
    assert taught["teach_ceiling"] == in_torch["teach_ceiling"]
    assert done[parts[1].name]["loss"] == pytest.approx(done[SCORES.name]["loss"], rel=0.05)
    assert done[parts[1].name]["fp32"]["loss"] == pytest.approx(done[SCORES.name]["loss"], abs=1e-6)
    assert done[parts[1].name]["answers_as_fp32"] > 0.5
    assert done[parts[2].name]["loss"] > 0


def test_answers_are_those_of_plain_greedy_decoding(world: Path, checkpoints: dict[str, Path]) -> None:
    answerer = TorchAnswerer(load_checkpoint(checkpoints["tokens"]))
    rows = single_questions(measure.read_rows(world / "train.json", world), 24)
    plain = list(answerer.ask_all(rows))
    found = ask(answerer, rows)
    assert [item.answer for item in found] == [item.answer for item in plain]
    assert [item.nll for item in found] == pytest.approx([item.nll for item in plain], abs=1e-4)


def scores(last: float, share: float = 0.5, *, test: float = 1.0, kind: str = "open") -> dict[str, Any]:
    curve = [{"step": step, "held_out_loss": loss} for step, loss in ((0, 2.0), (100, 1.2 * last), (200, last))]
    return {"cpu_seconds": 60.0, "loss": test, kind: {"exact_match": share}, "curve": curve}


def seeds_of(dataset: str, arm: str, *results: dict[str, Any], kind: plan.Kind = "scores") -> dict[str, dict[str, Any]]:
    return {Part(Run(dataset, arm, seed=seed), kind).name: result for seed, result in enumerate(results)}


def goal_of(done: dict[str, dict[str, Any]], text: str) -> Goal:
    (found,) = (goal for goal in goals(done) if goal.dataset == "caltech" and goal.text.endswith(text))
    return found


@pytest.mark.parametrize("reached", [0, 1])
def test_a_loss_that_is_never_reached_misses_the_goal(reached: int) -> None:
    memory = [scores(0.5)] * reached + [scores(0.9)] * (3 - reached)
    done = seeds_of("caltech", "baseline", *[scores(0.6)] * 3) | seeds_of("caltech", "memory", *memory)
    done |= seeds_of("caltech", "k-1", scores(0.9)) | seeds_of("caltech", "baseline-short", scores(0.8))
    summary = summarise(done)
    never = 3 - reached
    assert summary["caltech"]["steps_to_baseline_loss_ratio"] == {"mean": None, "std": None, "seeds": 3, "never": never}
    json.dumps(summary, allow_nan=False)
    assert goal_of(done, "steps to the baseline's loss / its steps").met is False
    text = f"not reached ({never} of 3)"
    assert f"its steps | {text} | 3 of 3 | at most 0.5 | **no** |" in tables.goal_table(done, summary)
    assert f" {text} |" in tables.losses(done, summary)
    (line,) = (line for line in tables.ablations(done, summary).splitlines() if "| k-1 |" in line)
    assert line.endswith(" not reached |")


def test_short_runs_are_told_beside_the_others_and_compared_with_each_other() -> None:
    done = seeds_of("caltech", "baseline", *[scores(0.6)] * 3) | seeds_of("caltech", "memory", *[scores(0.55)] * 3)
    done |= seeds_of("caltech", "baseline-short", *[scores(0.8, 0.25)] * 3)
    done |= seeds_of("caltech", "memory-short", *[scores(0.65, 0.75, test=0.5)] * 3)
    done[Part(Run("caltech", "memory-short", plan.FEW, 1), "scores").name] = scores(0.7, 0.375, kind="yes_no")
    summary = summarise(done)
    short = summary["caltech"]["short"]
    assert "short" not in summary["easy_vqa"]
    assert short["final_loss"]["baseline"]["mean"] == pytest.approx(0.8)
    assert short["final_loss"]["shuffled_memory"]["seeds"] == 0
    assert short["test_loss"]["memory"]["mean"] == 0.5
    assert short["steps_to_baseline_loss_ratio"]["memory"]["mean"] == 0.5
    assert summary["caltech"]["steps_to_baseline_loss_ratio"]["mean"] == 1.0
    assert short["score"]["100"]["memory"]["mean"] == 0.75
    assert short["score_yes_no"][f"{plan.FEW}"]["memory"] == {"mean": 0.375, "std": None, "seeds": 1}
    (line,) = (line for line in tables.fewer_steps(done, summary).splitlines() if "| memory, key" in line)
    assert line.startswith(
        "| caltech | memory, key of the picture alone | 0.6500 ± 0.0000 | 0.5000 ± 0.0000 | 0.50 ± 0.00 | 75.0"
    )
    assert summary["caltech"]["beside"]["steps_to_baseline_loss_ratio"]["memory"]["mean"] == 1.0
    done |= seeds_of("caltech", "memory-picture", scores(0.5, 0.5))
    taught = {"teach": {"5": 0.25}, "teach_ceiling": {"5": 0.75}}
    done[Part(Run("caltech", "memory-picture"), "teach").name] = taught
    (line,) = (line for line in tables.beside(done, summarise(done)).splitlines() if "| memory, key of the" in line)
    assert line.startswith("| caltech | memory, key of the picture alone | 0.5000 |")
    assert line.endswith("| 25.0 | 75.0 | – | – |")


def test_one_seed_that_never_reaches_the_loss_decides_and_a_missing_one_does_not() -> None:
    done = seeds_of("caltech", "baseline", *[scores(0.6)] * 3) | seeds_of("caltech", "memory", scores(0.9))
    assert goal_of(done, "steps to the baseline's loss / its steps").met is False
    done |= seeds_of("caltech", "memory", scores(0.5))
    assert goal_of(done, "steps to the baseline's loss / its steps").met is None


def test_goals_compare_each_seed_with_itself_and_are_met_by_all_seeds_alone() -> None:
    done = seeds_of("caltech", "baseline", scores(0.6, 0.8), scores(0.6, 0.9), scores(0.6, 0.9))
    done[Part(Run("caltech", "memory", 40, 1), "scores").name] = scores(0.5, 0.88)  # above the mean, below its own
    goal = goal_of(done, "minus the baseline's with all")
    assert goal.measured == pytest.approx(-0.02)
    assert goal.met is None
    assert "| -0.0200 | 1 of 3 | at least 0 | not known |" in tables.goal_table(done, summarise(done))
    done |= {Part(Run("caltech", "memory", 40, seed), "scores").name: scores(0.5, 0.91) for seed in (0, 2)}
    assert goal_of(done, "minus the baseline's with all").met is True


@pytest.mark.parametrize(("loss", "met"), [(0.59, False), (0.6, True)])
def test_shuffled_memory_is_to_lower_no_loss(loss: float, met: bool) -> None:
    done = seeds_of("caltech", "baseline", *[scores(0.6)] * 3) | seeds_of("caltech", "shuffled", *[scores(loss)] * 3)
    assert goal_of(done, "held-out loss with shuffled memory / the baseline's").met is met
    assert f" {loss:.4f} " in tables.losses(done, summarise(done))


def test_the_loss_after_as_many_steps_as_the_baseline_stands_beside_that_of_the_copy_terms_own() -> None:
    memory = {**scores(0.5), "settings": {"training": {"steps": 100}}}
    assert summarise(seeds_of("caltech", "memory", memory))["caltech"]["final_loss"]["memory_before_copying"] == {
        "mean": 0.6,
        "std": None,
        "seeds": 1,
    }


def test_int8_is_judged_by_its_worst_seed() -> None:
    done = seeds_of("caltech", "baseline", *[scores(0.6, 0.8)] * 3)  # of all questions; int8 is asked some
    int8 = [scores(0.6, score) for score in (0.92, 0.92, 0.88)]
    asked = [{**result, "fp32": scores(0.6, share)} for result, share in zip(int8, (0.91, 0.9, 0.9), strict=True)]
    done |= seeds_of("caltech", "baseline", *asked, kind="int8")
    goal = goal_of(done, "open questions, arm baseline")
    assert goal.measured == pytest.approx(-0.02)
    assert goal.met is False


def test_the_final_loss_is_the_held_out_one_and_the_test_questions_stand_beside_it() -> None:
    done = seeds_of("easy_vqa", "baseline", scores(0.6, test=0.7))
    summary = summarise(done)["easy_vqa"]
    assert (summary["final_loss"]["baseline"]["mean"], summary["test_loss"]["baseline"]["mean"]) == (0.6, 0.7)
    assert summary["lowest_loss"]["baseline"]["mean"] == 0.6
    overfit = scores(0.6) | {
        "curve": [{"step": step, "held_out_loss": loss} for step, loss in ((0, 2), (1, 0.5), (2, 0.6))]
    }
    assert summarise(seeds_of("nlvr", "memory", overfit))["nlvr"]["lowest_loss"]["memory"]["mean"] == 0.5
    for table in (tables.losses, tables.ablations):
        assert {"0.6000", "0.7000"} <= set(table(done, summarise(done)).split())


def test_what_a_bundle_tells_and_learns_stands_beside_the_checkpoint() -> None:
    shots = {"0": 0.0, "1": 0.1, "3": 0.3, "5": 0.5}
    taught = {"teach": shots, "teach_choices": shots, "teach_ceiling": shots, "seen": {"before": 0.9, "after": 0.89}}
    worse = {**taught, "teach": {**shots, "5": 0.45}}
    told = {"cpu_seconds": 1.0, "image": 0.2, "memory": 0.1, "shuffled_memory": -0.1}
    done = seeds_of("caltech", "memory", told, kind="emi") | seeds_of("caltech", "memory", taught, kind="teach")
    in_bundle = {**scores(0.5, 0.8), "emi": {**told, "memory": 0.09}, "emi_in_torch": told, "teach": worse,
                 "refused": ["NLL change is 0.02, must be <= 0.01"]}  # fmt: skip
    done |= seeds_of("caltech", "memory", in_bundle, kind="int8")
    summary = summarise(done)
    assert summary["caltech"]["teach"]["int8"]["5"]["mean"] == 0.45
    assert "| caltech | memory, beyond the picture | +0.1000 | +0.0900 |" in tables.bundles(done, summary)
    assert tables.bundles(done, summary).splitlines()[2].endswith("| 1 of 1 |")
    text = tables.taught(done, summary)
    assert "| memory, int8 bundle: free | 0.0 | 10.0 | 30.0 | 45.0 |" in text
    assert "| memory, int8 bundle | 90.0 | 89.0 |" in text
    assert goal_of(done, "worst seed: 5 taught examples a class, free").met is False
    assert goal_of(done, "worst seed: 3 taught examples a class, free").measured == 0


def test_yes_no_questions_are_not_shown_as_open_ones() -> None:
    done = seeds_of("nlvr", "baseline", scores(0.6, 0.55, kind="yes_no"))
    done |= seeds_of(
        "nlvr", "baseline", {**scores(0.6, 0.54, kind="yes_no"), "fp32": scores(0.6, 0.55, kind="yes_no")}, kind="int8"
    )
    summary = summarise(done)
    assert summary["nlvr"]["score"]["baseline"]["100"]["mean"] == 0.55  # there are no others
    for table in (tables.shares, tables.controls):
        text = table(done, summary)
        assert "| nlvr | yes/no |" in text and "| nlvr | open |" not in text
    assert "| – | – | 55.0 | 54.0 |" in tables.bundles(done, summary)


def test_trials_of_every_data_set_are_shown() -> None:
    trials = [Part(Run(name, next(iter(plan.TRIALS)), seed=plan.TUNING_SEED), "scores").name for name in plan.DATASETS]
    text = tables.tuning({name: scores(0.6) for name in trials}, {})
    assert [name for name in plan.DATASETS if f"| {name} |" in text] == list(plan.DATASETS)


def test_the_report_is_made_from_the_parts_there_are(tmp_path: Path) -> None:
    done = {
        Part(Run("caltech", "baseline"), "scores").name: scores(0.6, 0.70),
        Part(Run("caltech", "memory"), "scores").name: scores(0.5, 0.80),
        Part(Run("caltech", "memory", seed=1), "scores").name: scores(0.5, 0.90),
    }
    (tmp_path / "docs").mkdir()
    report = tmp_path / "docs" / "study.md"
    report.write_text((ROOT / "docs" / "study.md").read_text("utf-8"), "utf-8")
    for _ in range(2):  # a second time it replaces what the first one wrote
        write_report(done, Places(tmp_path / "results", tmp_path / "docs"))
    summary = read_json(tmp_path / "results" / "summary.json")["caltech"]
    assert summary["score"]["memory"]["100"] == {
        "mean": pytest.approx(0.85),
        "std": pytest.approx(0.0707, abs=1e-4),
        "seeds": 2,
    }
    assert summary["score"]["memory"]["40"] == {"mean": None, "std": None, "seeds": 0}
    assert summary["steps_to_baseline_loss_ratio"]["mean"] == 0.5
    text = report.read_text("utf-8")
    assert (
        text.count("| caltech | held-out loss with memory / without | 0.8333 | 1 of 3 | at most 0.85 | not known |")
        == 1
    )
    assert "Not finished" in text and "of easy_vqa" in text
    missing = read_json(tmp_path / "results" / "summary.json")["missing_parts"]
    assert "easy_vqa.baseline.100.0.scores" in missing and not done.keys() & set(missing)
    assert json.loads((tmp_path / "results" / "caltech.json").read_text())["parts"].keys() == done.keys()
    assert (tmp_path / "docs" / "study-loss.png").is_file()


def test_a_goal_without_its_parts_is_not_met_and_not_missed() -> None:
    assert {goal.met for goal in goals({})} == {None}
    assert steps_ratio({}, "caltech", 0) is None
    with pytest.raises(InputError, match="has no '<!-- state -->'"):
        filled("# nothing", {}, summarise({}))
