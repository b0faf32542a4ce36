"""Measure one part: load its engines, check them, then time them in turn."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tinyalign_edge.bench.peers.check import passes
from tinyalign_edge.bench.peers.client import EngineError, Worker
from tinyalign_edge.bench.peers.plan import OURS, Engine, Part, Phase, measures
from tinyalign_edge.bench.peers.shapes import write_encoder, write_language
from tinyalign_edge.config import write_json

DONE = ".done"


@dataclass
class Result:
    """What is known of the engines of a part, by label."""

    samples: dict[str, dict[Phase, list[float]]] = field(default_factory=dict)  # tokens or images a second
    about: dict[str, dict[str, Any]] = field(default_factory=dict)  # bytes, peak_rss_bytes, versions, correctness
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Folders:
    """Where checkpoints, converted models and logs are kept between runs: all below `root`."""

    root: Path

    def source(self, model: str) -> Path:
        return self.root / "models" / model / "source"

    def converted(self, model: str, engine: Engine) -> Path:
        return self.root / "models" / model / f"{engine.module}-{engine.precision}"

    def log(self, engine: Engine) -> Path:
        return self.root / "logs" / f"{engine.module}-{engine.precision}.log"

    def part(self, part: Part) -> Path:
        return self.root / "parts" / f"{part.name}.json"


def prepare(part: Part, engines: Sequence[Engine], folders: Folders, say: Callable[[str], None]) -> dict[str, str]:
    """Write the checkpoint and each engine's own form of it, unless it is there; returns what failed, by label."""
    source = folders.source(part.model)
    if not (source / DONE).exists():
        say(f"{part.model}: writing random weights")
        with _whole(source) as folder:
            (write_language if part.kind == "language" else write_encoder)(part.model, folder)
    failed = {}
    for engine in engines:
        target = folders.converted(part.model, engine)
        if (target / DONE).exists() and engine.name != OURS:  # the exporter may have changed
            continue
        say(f"{part.model}: converting for {engine.label}")
        try:
            with _whole(target) as folder, _worker(engine, folders) as worker:
                worker.ask("prepare", source=str(source), folder=str(folder), precision=engine.precision)
        except EngineError as error:
            failed[engine.label] = str(error)
    return failed


def measure(
    part: Part,
    engines: Sequence[Engine],
    folders: Folders,
    *,
    rounds: int,
    say: Callable[[str], None],
    timed: Callable[..., None],
) -> Result:
    """Check, then time every phase `rounds` times, the engines in turn.

    Args:
        part: what is measured.
        engines: prepared ones; one that fails anywhere is left out from there on, and named in the result.
        folders: where things are.
        rounds: measurements of each phase.
        say: gets a line on what is done.
        timed: gets engine, phase and seconds after each measurement.
    """
    result = Result()
    loads = 1 if part.resident else rounds
    groups = [list(engines)] if part.resident else [[engine] for engine in engines]
    for _ in range(loads):
        for group in groups:
            with loaded(part, group, folders, result, say) as workers:
                for phase in part.phases:
                    for _ in range(rounds // loads):
                        for engine, worker in workers.items():
                            if measures(engine, phase) and engine.label not in result.failed:
                                _time(engine, worker, phase, result, timed)
                for engine, worker in workers.items():
                    if engine.label not in result.failed:
                        result.about[engine.label] |= worker.ask("memory")
    return result


@contextmanager
def loaded(
    part: Part, group: Sequence[Engine], folders: Folders, result: Result, say: Callable[[str], None]
) -> Iterator[dict[Engine, Worker]]:
    """Workers with the model loaded, checked and warm; those that fail are noted and closed."""
    workers: dict[Engine, Worker] = {}
    try:
        for engine in group:
            if engine.label in result.failed:
                continue
            workers[engine] = Worker(engine.module, engine.python(folders.root), folders.log(engine))
            try:
                _load(part, engine, workers[engine], folders, result)
                say(f"{part.name}: {engine.label} {_figures(result.about[engine.label]['correctness'])}")
            except EngineError as error:
                result.failed[engine.label] = str(error)
                say(f"{part.name}: {engine.label} FAILED: {error}")
                workers.pop(engine).close()
        yield workers
    finally:
        for worker in workers.values():
            worker.close()


def _load(part: Part, engine: Engine, worker: Worker, folders: Folders, result: Result) -> None:
    where = {"source": str(folders.source(part.model)), "folder": str(folders.converted(part.model, engine))}
    loaded = worker.ask("load", **where, precision=engine.precision, threads=part.threads)
    figures = worker.ask(f"check_{part.kind}")
    result.about[engine.label] = {"bytes": loaded["bytes"], "versions": loaded["versions"], "correctness": figures}
    if not passes(engine.precision.partition("-")[0], figures):
        raise EngineError(f"computes another model: {_figures(figures)}")
    worker.ask(**part.phases[0].request())  # the first pass makes buffers


def _time(engine: Engine, worker: Worker, phase: Phase, result: Result, timed: Callable[..., None]) -> None:
    try:
        seconds = worker.ask(**phase.request())["seconds"]
    except EngineError as error:
        result.failed[engine.label] = str(error)
        return
    result.samples.setdefault(engine.label, {}).setdefault(phase, []).append(phase.tokens / seconds)
    timed(engine, phase, seconds)


def store(part: Part, engines: Sequence[Engine], result: Result, path: Path, extra: dict[str, Any]) -> None:
    """Write the part as JSON: rows as `bench/results/peers.json` has them, passes, correctness, versions, failures."""
    rows, verified = [], []
    for engine in engines:
        for phase, samples in result.samples.get(engine.label, {}).items():
            about = result.about[engine.label]
            row = {"engine": engine.name, "precision": engine.precision, "model": part.model, "threads": part.threads}
            if phase.name == "verify":
                seconds = [phase.tokens / sample for sample in samples]
                row |= {"tokens": phase.tokens, "context": phase.context}
                verified.append(row | {"median_ms": 1e3 * float(np.median(seconds)), "samples_s": seconds})
                continue
            row |= {"phase": phase.name, "tokens": phase.tokens, "context": phase.context}
            row |= {"median_per_s": float(np.median(samples)), "samples": samples}
            rows.append(row | {"bytes": about["bytes"], "peak_rss_bytes": about.get("peak_rss_bytes")})
    versions = {
        engine.name: result.about[engine.label]["versions"] for engine in engines if engine.label in result.about
    }
    checked = {label: about["correctness"] for label, about in result.about.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"rows": rows, "passes": verified, "correctness": checked, "failed": result.failed, "versions": versions}
    write_json(path, {**extra, "engines": [engine.label for engine in engines], **found})


@contextmanager
def _worker(engine: Engine, folders: Folders) -> Iterator[Worker]:
    worker = Worker(engine.module, engine.python(folders.root), folders.log(engine))
    try:
        yield worker
    finally:
        worker.close()


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """An empty folder that is marked as done when the block ends, and removed when it raises."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    (folder / DONE).touch()


def _figures(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.6g}" for name, value in figures.items())
