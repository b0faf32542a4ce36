"""Measure every engine on the same shapes and weights, interleaved, and record the table.

    python -m tinyalign_edge.bench.peers.run [--models M ...] [--only ENGINE ...] [--threads 1 2] [--again]

A model with a number of threads is a part; a part that is there is not measured again, so that a run that was
stopped goes on where it was. When all is measured, `bench/results/peers.json` is written from the parts.
`just peers` makes the environments of the engines first.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinyalign_edge.bench.peers.limits import measure_limits, shares
from tinyalign_edge.bench.peers.measure import Folders, measure, prepare, store
from tinyalign_edge.bench.peers.plan import MEASURED, Engine, Part, Phase, measures, parts
from tinyalign_edge.bench.peers.shapes import ENCODERS, LANGUAGE
from tinyalign_edge.bench.peers.table import print_tables
from tinyalign_edge.bench.record import RESULTS, record
from tinyalign_edge.config import read_json, write_json
from tinyalign_edge.latency.host import commit

COMMAND = "python -m tinyalign_edge.bench.peers.run"


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare, measure, record, print."""
    given = _arguments(argv)
    folders = Folders(given.root.resolve())
    wanted = parts(given.models, given.threads)
    chosen = {part: [e for e in part.engines if not given.only or e.name in given.only] for part in wanted}
    log = _Log(
        [part for part in wanted if given.again or not _is_there(part, chosen[part], folders)], chosen, given.rounds
    )
    for part in log.parts:
        unprepared = prepare(part, chosen[part], folders, log.say)
        ready = [engine for engine in chosen[part] if engine.label not in unprepared]
        log.begin(part)
        rounds = given.rounds or part.rounds
        result = measure(part, ready, folders, rounds=rounds, say=log.say, timed=log.timed)
        result.failed |= unprepared
        now: dict[str, Any] = {"commit": commit(), "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        now |= {"model": part.model, "threads": part.threads}
        store(part, chosen[part], result, folders.part(part), now)
    limits = folders.root / "parts" / "limits.json"
    if given.again or not limits.exists():
        log.say("the machine's own limits")
        write_json(limits, measure_limits())
    stored = [folders.part(part) for part in parts([*LANGUAGE, *ENCODERS], [1, 2]) if part.model in given.models]
    path = record(given.name, COMMAND, _merge([read_json(path) for path in stored if path.exists()], read_json(limits)))
    print_tables(path)
    print(path)


def _merge(found: list[dict[str, Any]], limits: dict[str, Any]) -> dict[str, Any]:
    """The parts as one result; `versions` is what the engines said."""
    merged: dict[str, Any] = {"versions": {}, "units": "tokens a second; encode: images a second", "parts": []}
    merged |= {"rows": [], "passes": [], "correctness": [], "failed": []}
    for part in found:
        merged["versions"] |= part["versions"]
        merged["rows"] += part["rows"]
        merged["passes"] += part["passes"]
        about = {"model": part["model"], "threads": part["threads"]}
        merged["parts"].append({**about, "commit": part["commit"], "measured_at": part["measured_at"]})
        for label, figures in part["correctness"].items():
            merged["correctness"].append({"engine": label, **about, **figures})
        merged["failed"] += [{"engine": label, **about, "why": why} for label, why in part["failed"].items()]
    merged["limits"] = {**limits, "shares": shares(merged["rows"], limits)}
    return merged


def _is_there(part: Part, engines: Sequence[Engine], folders: Folders) -> bool:
    path = folders.part(part)
    return path.exists() and {engine.label for engine in engines} <= set(read_json(path)["engines"])


class _Log:
    """Lines with the time that is left, on standard output."""

    def __init__(self, wanted: list[Part], chosen: dict[Part, list[Engine]], rounds: int) -> None:
        self.parts = wanted
        self._rounds = rounds
        self._chosen = chosen
        self._spent = self._expected = 0.0  # seconds measured so far; seconds guessed for the same measurements
        self._left = {part: self._guess(part) for part in wanted}

    def begin(self, part: Part) -> None:
        self._part = part

    def say(self, line: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)

    def timed(self, engine: Engine, phase: Phase, seconds: float) -> None:
        guess = _guess(self._part, phase)
        self._spent += seconds
        self._expected += guess
        self._left[self._part] -= guess
        left = sum(self._left.values()) * self._spent / self._expected / 60
        rate = f"{phase.tokens / seconds:9.1f}/s" if phase.name != "verify" else f"{1e3 * seconds:8.1f} ms"
        what = f"{self._part.name:<20} {phase.name:<8}{phase.tokens:4} at {phase.context:<5}{engine.label:<28}"
        self.say(f"{what}{rate}  about {left:.0f} min left")

    def _guess(self, part: Part) -> float:
        every = [_guess(part, p) for engine in self._chosen[part] for p in part.phases if measures(engine, p)]
        return (self._rounds or part.rounds) * sum(every)


def _guess(part: Part, phase: Phase) -> float:
    """Relative cost of one measurement: the weights are read once a decoded token, and for eight tokens of a pass."""
    config = part.shape.config
    width, layers = config["hidden_size"], config.get("num_hidden_layers", 1)
    weights = layers * width * (4 * width + 3 * config["intermediate_size"]) + width * config.get("vocab_size", 0)
    passes = {"prefill": phase.tokens / 8, "decode": phase.tokens, "verify": 10, "encode": 20}[phase.name]
    return float(weights * passes / part.threads)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MEASURED), choices=[*LANGUAGE, *ENCODERS])
    parser.add_argument("--only", nargs="+", default=[], metavar="ENGINE", help="engines' names; default: all")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=0, help="measurements of each phase; default: by model")
    parser.add_argument("--again", action="store_true", help="measure parts that are there once more")
    parser.add_argument("--root", type=Path, default=RESULTS.parents[1] / "runs" / "peers")
    parser.add_argument("--name", default="peers", help="bench/results/NAME.json is written")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
