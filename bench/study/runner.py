"""Runs the parts that are missing, one after another, and says how long the rest will take."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path

from tinyalign_edge.bench.study.measure import Bench
from tinyalign_edge.bench.study.plan import Part
from tinyalign_edge.bench.study.store import is_done, keep, results
from tinyalign_edge.latency.host import commit


def run_missing(bench: Bench, parts: Sequence[Part]) -> None:
    """Measure every part that has no result yet."""
    for part in parts:
        if is_done(bench.out, part):
            continue
        print(f"{time.strftime('%H:%M:%S')} {part.name} ({time_left(bench.out, parts)})", file=sys.stderr, flush=True)
        start = time.process_time()
        result = bench.measure(part)
        keep(bench.out, part, {"commit": commit(), "cpu_seconds": round(time.process_time() - start, 1), **result})


def chosen(parts: Iterable[Part], patterns: Sequence[str]) -> list[Part]:
    """The parts whose names match one of the shell patterns."""
    return [part for part in parts if any(fnmatch(part.name, pattern) for pattern in patterns)]


def time_left(out: Path, parts: Sequence[Part]) -> str:
    """How many parts are missing, and for how many hours of processor time, if they take what those like them took."""
    done = results(out, parts)
    seconds = {part: float(done[part.name]["cpu_seconds"]) for part in parts if part.name in done}
    missing = [part for part in parts if part.name not in done]
    if not seconds:
        return f"{len(missing)} of {len(parts)} parts to do"
    left = sum(_expected(part, seconds) for part in missing)
    return f"{len(missing)} of {len(parts)} parts to do, about {left / 3600:.1f} h of one core"


def _expected(part: Part, seconds: dict[Part, float]) -> float:
    alike = (
        lambda other: (
            other.kind == part.kind and other.run.dataset == part.run.dataset and other.run.arm == part.run.arm
        ),
        lambda other: other.kind == part.kind and other.run.dataset == part.run.dataset,
        lambda other: other.kind == part.kind,
        lambda other: True,
    )
    found = next(times for like in alike if (times := [s for other, s in seconds.items() if like(other)]))
    return sum(found) / len(found)
