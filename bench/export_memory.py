"""The peak memory of a whole `tinyalign-edge export`, as a multiple of the model's float32 weights.

    python -m tinyalign_edge.bench.export_memory [--models smollm2-135m qwen2.5-0.5b] [--folder DIR]

A checkpoint is trained for two steps on drawn pictures, with a tiny vision encoder and a language model of random
weights in a public shape; then the real command exports it in a process of its own. Random weights may fail the gate:
the search then runs longer, and the bundle is written all the same. Linux only. Writes
`bench/results/export_memory.json`.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from tinyalign_edge.bench.peers.shapes import LANGUAGE
from tinyalign_edge.bench.random_bundle import random_checkpoint
from tinyalign_edge.bench.record import record
from tinyalign_edge.bundle import open_bundle
from tinyalign_edge.errors import TinyAlignError

COMMAND = "python -m tinyalign_edge.bench.export_memory"
ENCODER = "smoke-encoder"
VISUAL_TOKENS = 4
POLL_SECONDS = 0.02
IMPORTS = "import tinyalign_edge.export.run, tinyalign_edge.report"


@dataclass(frozen=True)
class Peak:
    """The most memory that a process held resident, in bytes: all of it, and what was not mapped from a file."""

    resident_bytes: int
    anonymous_bytes: int


@dataclass(frozen=True)
class Export:
    """One export. `multiple` is of the peak above the imports to the float32 weights."""

    model: str
    parameters: int
    weight_bytes: int
    import_bytes: int
    peak_bytes: int
    peak_anonymous_bytes: int
    multiple: float
    given_back: int
    seconds: float


def main() -> None:
    """Export each model and write what it took."""
    given = _arguments()
    rows = []
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        for model in given.models:
            rows.append(measure(model, Path(scratch) / model))
            print(f"{model}: {rows[-1].multiple:.2f} times its {rows[-1].weight_bytes / 1e6:.0f} MB of weights")
    command = f"{COMMAND} --models {' '.join(given.models)}"
    print(record("export_memory", command, {"rows": [asdict(row) for row in rows]}))


def measure(model: str, folder: Path) -> Export:
    """Make the checkpoint of `model` in `folder` and export it."""
    random_checkpoint(ENCODER, model, folder, visual_tokens=VISUAL_TOKENS)
    parameters = _parameters(folder / "lm", folder / "encoder", folder / "checkpoint")
    base = run_watched([sys.executable, "-c", IMPORTS])
    command = ["-m", "tinyalign_edge", "export", str(folder / "checkpoint"), "--out", str(folder / "bundle")]
    start = time.perf_counter()
    peak = run_watched([sys.executable, *command, "--allow-degraded"])
    seconds = time.perf_counter() - start
    return Export(
        model=model,
        parameters=parameters,
        weight_bytes=4 * parameters,
        import_bytes=base.resident_bytes,
        peak_bytes=peak.resident_bytes,
        peak_anonymous_bytes=peak.anonymous_bytes,
        multiple=(peak.resident_bytes - base.resident_bytes) / (4 * parameters),
        given_back=len(open_bundle(folder / "bundle").given_back),
        seconds=seconds,
    )


def run_watched(command: Sequence[str]) -> Peak:
    """Run a command to its end and watch its memory.

    Raises:
        TinyAlignError: it failed.
    """
    process = subprocess.Popen(command)  # returns once the command runs: its peak is its own from here on
    resident = anonymous = 0
    while process.poll() is None:
        resident = max(resident, _status_bytes(process.pid, "VmHWM"))  # wait4's figure begins with the parent's
        anonymous = max(anonymous, _status_bytes(process.pid, "RssAnon"))
        time.sleep(POLL_SECONDS)
    if process.returncode:
        raise TinyAlignError(f"{' '.join(command[:5])} ended with {process.returncode}; see what it printed above")
    return Peak(resident, anonymous)


def _status_bytes(pid: int, field: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has just ended
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def _parameters(*folders: Path) -> int:
    count = 0
    for file in (folder / "model.safetensors" for folder in folders):
        with safe_open(file, framework="numpy") as held:
            names: list[str] = held.keys()
            shapes = [held.get_slice(name).get_shape() for name in names]
        count += sum(math.prod(shape) for shape in shapes)
    return count


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m", "qwen2.5-0.5b"], choices=LANGUAGE)
    parser.add_argument(
        "--folder", type=Path, help="where the checkpoints are written meanwhile (default: the system's)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
