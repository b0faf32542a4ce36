"""From a started process to the first token of an answer, and what the process then holds in memory.

    python -m tinyalign_edge.bench.cold_start [BUNDLE] [--rounds 7] [--threads 2] [--out runs/cold-start]

Without BUNDLE, one in the shapes of SigLIP-B/16-224 and SmolLM2-135M with random weights is made once. Two arms, in
turns: as it is, and with packed weights (`ta.load(..., packed_dir=...)`), which are made first. Every start is a new
process; the files are in the system's cache, as after a first start. Then, in each arm: memory of one process after
loading, after answers about so many pictures that the cache of prefixes is full, and after 100 more; and of two
processes at once. What the arms compute is compared before. Linux only, on an idle machine; writes
`bench/results/cold-start.json`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from tinyalign_edge.bench.random_bundle import random_bundle
from tinyalign_edge.bench.record import record
from tinyalign_edge.bundle import MANIFEST, open_bundle
from tinyalign_edge.errors import TinyAlignError
from tinyalign_edge.progress import progress
from tinyalign_edge.runtime.model import CACHE_MB
from tinyalign_edge.runtime.probe import pattern

COMMAND = "python -m tinyalign_edge.bench.cold_start"
WORKER = "tinyalign_edge.bench.cold_start_worker"
ARMS = ("plain", "packed")
WARM_UP, ANSWERS, AT_ONCE = 40, 100, 10  # the last: between two signs of progress
GRAPHS = (".onnx", ".data")  # the files that hold weights

Told = dict[str, Any]


def main() -> None:
    """Measure both arms and print a table."""
    given = _arguments()
    bundle = given.bundle or full_shape(given.out)
    picture = given.out / "picture.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pattern()).save(picture)
    result = measure(bundle, picture, given.out / "packed", threads=given.threads, rounds=given.rounds)
    print(
        f"{'':<8}{'first token, ms':>16}{'load, ms':>10}{'after load':>12}{'two processes, MB':>19}{'100 answers':>13}"
    )
    for arm in ARMS:
        found = result[arm]
        figures = f"{found['start_ms']:>16.0f}{found['times_ms']['load']:>10.0f}{found['load_to_weights']:>12.2f}"
        print(f"{arm:<8}{figures}{found['two_share_bytes'] / 1e6:>19.0f}{found['growth_bytes'] / 1e6:>+13.1f}")
    name = f" {bundle.name}" if given.bundle else ""
    print(record("cold-start", f"{COMMAND}{name} --rounds {given.rounds} --threads {given.threads}", result))


def full_shape(out: Path) -> Path:
    """A bundle in full shape with random weights below `out`; made where it is not there yet. It is not gated."""
    folder = out / "source" / "bundle"
    if not (folder / MANIFEST).is_file():
        shutil.rmtree(out / "source", ignore_errors=True)
        random_bundle("siglip-b16-224", "smollm2-135m", out / "source", visual_tokens=196)
    return folder


def measure(
    bundle: Path, picture: Path, packed: Path, *, threads: int, rounds: int, cache_mb: float = CACHE_MB
) -> dict[str, Any]:
    """Times and memory of both arms. `packed` is made anew. `WARM_UP` answers must fill `cache_mb`.

    Raises:
        TinyAlignError: the arms compute different things, or a process failed.
    """
    weights = sum(file.bytes for name, file in open_bundle(bundle).files.items() if name.endswith(GRAPHS))
    shutil.rmtree(packed, ignore_errors=True)
    plain = [str(bundle), str(picture), str(threads), str(cache_mb)]
    commands = {"plain": plain, "packed": [*plain, str(packed)]}
    _, making = start(commands["packed"])
    time.sleep(2.5)  # files that were just written are hashed again; that is over then
    starts: dict[str, list[Told]] = {arm: [] for arm in ARMS}
    whole: dict[str, list[float]] = {arm: [] for arm in ARMS}
    with progress("Starting", len(ARMS) * (rounds + 1)) as advance:
        for repetition in range(rounds + 1):
            for arm in ARMS:
                seconds, told = start(commands[arm])
                if repetition:  # the first one has the packed files verified
                    whole[arm].append(seconds * 1000)
                    starts[arm].append(told)
                advance()
    if len({told["logits"] for arm in ARMS for told in starts[arm]}) != 1:
        raise TinyAlignError("packed weights compute something else; nothing is recorded")
    found: dict[str, Any] = {
        "weight_bytes": weights,
        "packed_bytes": sum(path.stat().st_size for path in packed.rglob("*") if path.is_file()),
        "making_load_ms": making["times_ms"]["load"],
    }
    for arm in ARMS:
        found[arm] = {
            "start_ms": statistics.median(whole[arm]),
            "start_samples_ms": whole[arm],
            "times_ms": {
                stage: statistics.median(told["times_ms"][stage] for told in starts[arm])
                for stage in starts[arm][0]["times_ms"]
            },
            "verify_ms": statistics.median(told["verify_ms"] for told in starts[arm]),
            **_memory(commands[arm], weights),
        }
    return found


def start(arguments: list[str]) -> tuple[float, Told]:
    """Seconds from the start of a process to its first token, and what it told."""
    started = time.perf_counter()
    with worker(arguments) as process:
        told = _told(process)
        seconds = time.perf_counter() - started
        return seconds, {**_told(process), **told}


@contextmanager
def worker(arguments: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process of `cold_start_worker`; it ends with the block."""
    command = [sys.executable, "-m", WORKER, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process


def growth(arguments: list[str]) -> dict[str, Any]:
    """Resident bytes of one process: what loading added, what answers added once the cache of prefixes was full, and
    all readings."""
    with worker(arguments) as process, progress("Answering", WARM_UP + ANSWERS) as advance:
        told, resident = _told(process), list[int]()
        _told(process)
        for _ in range((WARM_UP + ANSWERS) // AT_ONCE):
            resident.append(_told(process, AT_ONCE)["memory"]["resident"])
            advance(AT_ONCE)
    full, later = resident[WARM_UP // AT_ONCE - 1], resident[-1]
    imported = told["at_import"]["resident"]
    return {
        "import_bytes": imported,
        "load_bytes": told["at_load"]["resident"] - imported,
        "cache_full_bytes": full,
        "growth_bytes": later - full,
        "resident_bytes": resident,
    }


def _memory(arguments: list[str], weights: int) -> dict[str, Any]:
    """Of one process while it answers, and of two at once."""
    one = growth(arguments)
    with ExitStack() as stack:
        both = [stack.enter_context(worker(arguments)) for _ in range(2)]
        for process in both:
            _told(process)
            _told(process)
        two = [_told(process, 0)["memory"] for process in both]
    return {
        **one,
        "load_to_weights": one["load_bytes"] / weights,
        "two_share_bytes": sum(memory["share"] for memory in two),
        "two_private_bytes": sum(memory["private"] for memory in two),
    }


def _told(process: subprocess.Popen[str], answers: int | None = None) -> Told:
    """The next line of a worker, after it was asked for so many answers."""
    assert process.stdin is not None and process.stdout is not None
    if answers is not None:
        print(answers, file=process.stdin, flush=True)
    line = process.stdout.readline()
    if not line:
        raise TinyAlignError(f"{WORKER} ended with {process.wait()}; see what it printed above")
    told: Told = json.loads(line)
    return told


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/cold-start"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
