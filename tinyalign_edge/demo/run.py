"""`tinyalign-edge demo`: the whole path on a drawn world, with two towers pretrained on the spot."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyalign_edge.config import write_json
from tinyalign_edge.data import Row, read_rows
from tinyalign_edge.demo.dataset import write_dataset
from tinyalign_edge.demo.language_tower import pretrain_language
from tinyalign_edge.demo.pictures import SheetRow, contact_sheet, training_curves
from tinyalign_edge.demo.vision_tower import pretrain_vision
from tinyalign_edge.demo.world import make_scenes
from tinyalign_edge.errors import InputError
from tinyalign_edge.evaluate import Asked, MemoryMode, Scores, ci95, normalize, score
from tinyalign_edge.progress import progress
from tinyalign_edge.report import folder_bytes, megabytes, print_table
from tinyalign_edge.runtime.answer import Answer
from tinyalign_edge.runtime.answerer import BundleAnswerer
from tinyalign_edge.runtime.model import load

REPORT = "report.json"
MARKER = ".tinyalign-demo"  # says that the folder is ours
TRAIN_SCENES, TEST_SCENES = 3000, 2000
STEPS, EVAL_EVERY = 300, 25  # the baseline's held-out loss has flattened by then: see curves.png
VISUAL_TOKENS, NEIGHBOURS, KEY_GRID = 4, 1, 3
ASKED = 10
STAGES = ("encode", "retrieve", "first_token", "per_token")


@dataclass(frozen=True)
class Paths:
    """Where the demo keeps things, below its output folder."""

    out: Path

    @property
    def data(self) -> Path:
        return self.out / "data"

    @property
    def towers(self) -> Path:
        return self.out / "towers"

    @property
    def bundle(self) -> Path:
        return self.out / "bundle"

    def checkpoint(self, arm: str) -> Path:
        return self.out / "checkpoints" / arm


def run_demo(out: Path, *, seed: int) -> dict[str, Any]:
    """Make the demo in `out` and return what `report.json` holds.

    Raises:
        InputError: `out` holds something that is not an earlier demo.
    """
    known = {MARKER, REPORT, "bundle", "checkpoints", "data", "towers", "answers.png", "curves.png"}
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError(f"{out}: is not a folder; choose another --out")
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if names and (MARKER not in names or not names <= known):
        raise InputError(f"{out}: exists and is not an earlier demo alone; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).touch()
    _clear(out)
    try:
        return _demo(Paths(out), seed)
    except BaseException:
        _clear(out)
        raise


def _clear(out: Path) -> None:
    """Remove what an earlier or interrupted demo left, but the marker."""
    for path in out.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARKER:
            path.unlink()


def _demo(paths: Paths, seed: int) -> dict[str, Any]:
    from tinyalign_edge.export.run import export

    started = time.perf_counter()
    _make_world(paths, seed)
    _make_towers(paths, seed)
    for arm, memory in (("baseline", "none"), ("memory", "tokens")):
        _train(paths, arm, memory, seed)
    export(paths.checkpoint("memory"), paths.bundle)
    rows = read_rows(paths.data / "test.json", paths.data)
    asked = _ask_torch(paths, rows)
    with load(paths.bundle) as model:
        asked["memory_int8"] = list(BundleAnswerer(model).ask_all(rows))
        shown = [(row, model.ask(row.path, row.turns[0].question)) for row in rows[:ASKED]]
    latency = _latency(paths.bundle, rows[:200])
    report = _report(paths, rows, asked, latency, time.perf_counter() - started)
    write_json(paths.out / REPORT, report)
    _pictures(paths, shown, report)
    _print(paths, shown, report)
    return report


def _make_world(paths: Paths, seed: int) -> None:
    train, test = make_scenes(TRAIN_SCENES, seed=1000 + seed), make_scenes(TEST_SCENES, seed=2000 + seed)
    with progress("Drawing the world", len(train) + len(test)) as advance:
        write_dataset(paths.data, train, test, seed=seed, advance=advance)


def _make_towers(paths: Paths, seed: int) -> None:
    _pretrain("Pretraining vision", pretrain_vision, paths.towers / "vision", seed)
    _pretrain("Pretraining language", pretrain_language, paths.towers / "language", seed)


def _pretrain(label: str, run: Callable[..., None], folder: Path, seed: int) -> None:
    """Pretrain a tower under a bar whose length is known at its first step."""
    with progress(label, None) as advance:
        run(folder, seed=seed, progress=lambda done, total: advance(1, total=total))


def _train(paths: Paths, arm: str, memory: Any, seed: int) -> None:
    from tinyalign_edge.train.options import TrainOptions
    from tinyalign_edge.train.run import train

    options = TrainOptions(
        memory=memory,
        steps=STEPS,
        visual_tokens=VISUAL_TOKENS,
        k=NEIGHBOURS,
        key_grid=KEY_GRID,
        seed=seed,
        eval_every=EVAL_EVERY,
        device="cpu",
    )
    train(
        data=paths.data / "train.json",
        images=paths.data,
        vision=str(paths.towers / "vision"),
        lm=str(paths.towers / "language"),
        out=paths.checkpoint(arm),
        options=options,
        label=f"Training {arm}",
    )


def _ask_torch(paths: Paths, rows: Sequence[Row]) -> dict[str, list[Asked]]:
    from tinyalign_edge.train.answer import TorchAnswerer
    from tinyalign_edge.train.checkpoint import load_checkpoint

    runs: tuple[tuple[str, str, MemoryMode], ...] = (
        ("baseline", "baseline", "own"),
        ("memory", "memory", "own"),
        ("memory_shuffled", "memory", "shuffled"),
    )
    return {
        name: list(TorchAnswerer(load_checkpoint(paths.checkpoint(arm))).ask_all(rows, memory=mode))
        for name, arm, mode in runs
    }


def _latency(bundle: Path, rows: Sequence[Row]) -> dict[str, float]:
    """Median milliseconds of each stage over questions asked from the image's bytes, none of which was seen before."""
    with load(bundle, cache_mb=0) as model:
        answers = [model.ask(row.path.read_bytes(), row.turns[0].question) for row in rows]
    return {stage: float(np.median([answer.timings_ms[stage] for answer in answers])) for stage in STAGES}


def _report(
    paths: Paths, rows: Sequence[Row], asked: dict[str, list[Asked]], latency: dict[str, float], seconds: float
) -> dict[str, Any]:
    scores: dict[str, Scores] = {name: score(items) for name, items in asked.items()}
    pairs = zip(asked["memory"], asked["memory_int8"], strict=True)
    files = {p.relative_to(paths.bundle).as_posix(): p.stat().st_size for p in sorted(paths.bundle.glob("*.*"))}
    return {
        "loss": {arm: scores[arm].nll_per_token for arm in ("baseline", "memory")},
        "accuracy": {"majority": _majority(paths, rows), **{name: s.exact_match for name, s in scores.items()}},
        "accuracy_ci95": max(ci95(s.exact_match, s.n) for s in scores.values()),
        "questions": len(rows),
        "agreement_int8": float(np.mean([normalize(a.answer) == normalize(b.answer) for a, b in pairs])),
        "bundle_bytes": {
            **files,
            "memory": folder_bytes(paths.bundle / "memory"),
            "total": folder_bytes(paths.bundle),
        },
        "latency_ms": latency,
        "seconds": seconds,
    }


def _majority(paths: Paths, rows: Sequence[Row]) -> float:
    """Accuracy of always giving the commonest answer of the training rows."""
    counts = Counter(turn.answer for row in read_rows(paths.data / "train.json", paths.data) for turn in row.turns)
    return float(np.mean([row.turns[0].answer == counts.most_common(1)[0][0] for row in rows]))


def _pictures(paths: Paths, shown: Sequence[tuple[Row, Answer]], report: dict[str, Any]) -> None:
    sheet = [
        SheetRow(row.path, row.turns[0].question, answer.text, row.turns[0].answer, _texts(answer))
        for row, answer in shown
    ]
    contact_sheet(paths.out / "answers.png", sheet)
    curves = {arm: _curve(paths.checkpoint(arm)) for arm in ("baseline", "memory")}
    training_curves(paths.out / "curves.png", curves, accuracies=report["accuracy"])


def _curve(checkpoint: Path) -> list[tuple[int, float]]:
    from tinyalign_edge.train.checkpoint import METRICS
    from tinyalign_edge.train.curves import losses_in, read_evaluations

    return losses_in(read_evaluations(checkpoint / METRICS), "held_out_loss")


def _texts(answer: Answer) -> tuple[str, ...]:
    return tuple(memory.text for memory in answer.memories)


def _print(paths: Paths, shown: Sequence[tuple[Row, Answer]], report: dict[str, Any]) -> None:
    for row, answer in shown:
        turn = row.turns[0]
        mark = "ok " if normalize(answer.text) == normalize(turn.answer) else "NOT"
        print(f"\n{row.path}\n  Q: {turn.question}\n  A: {answer.text}   [{mark}, reference: {turn.answer}]")
        for memory in answer.memories:
            print(f"     remembers {memory.similarity:.2f}  {memory.text}")
    print()
    accuracy, loss, latency = report["accuracy"], report["loss"], report["latency_ms"]
    interval = f"± {report['accuracy_ci95']:.1%}"
    print_table(
        [
            ("commonest answer", f"{accuracy['majority']:.1%}"),
            ("baseline, no memory", f"{accuracy['baseline']:.1%} {interval}   loss {loss['baseline']:.3f}"),
            ("with memory", f"{accuracy['memory']:.1%} {interval}   loss {loss['memory']:.3f}"),
            ("with another's memory", f"{accuracy['memory_shuffled']:.1%} {interval}"),
            ("with memory, int8 bundle", f"{accuracy['memory_int8']:.1%} {interval}"),
            ("int8 answers as fp32", f"{report['agreement_int8']:.1%} of {report['questions']}"),
            ("bundle", megabytes(report["bundle_bytes"]["total"])),
            ("latency", ", ".join(f"{stage} {latency[stage]:.1f} ms" for stage in STAGES)),
            ("time", f"{report['seconds']:.0f} s"),
        ],
        title="Accuracy on held-out pictures",
    )
    bundle = paths.bundle
    print(f"\nlook at:  {paths.out / 'answers.png'}  {paths.out / 'curves.png'}")
    print(f"ask it:   tinyalign-edge ask {bundle} {shown[0][0].path} 'How many objects are there?'")
