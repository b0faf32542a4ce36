"""Results as JSON: what was measured, by which command, on which machine, with which versions."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from tinyalign_edge.config import write_json
from tinyalign_edge.errors import InputError
from tinyalign_edge.export.components import tool_versions

CPU_FEATURES = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")
RESULTS = Path(__file__).resolve().parent / "results"


def record(name: str, command: str, result: dict[str, Any]) -> Path:
    """Write `bench/results/NAME.json`; returns its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    write_json(path, {"command": command, "host": host(), "commit": commit(), "versions": tool_versions(), **result})
    return path


def host() -> dict[str, Any]:
    """Processor, what it has for matrix products, cores and system of this machine."""
    found = _cpuinfo("flags", "Features").split()
    return {
        "cpu": _cpuinfo("model name") or platform.processor() or "unknown",
        "features": [feature for feature in CPU_FEATURES if feature in found],
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "system": platform.system(),
    }


def commit() -> str:
    """The commit of the working tree; "-dirty" where files differ from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=RESULTS.parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def shared(*parts: str) -> Path:
    """A path below `TINYALIGN_SHARED` (default: the folder `shared` beside the repository).

    Raises:
        InputError: it is absent.
    """
    folder = Path(os.environ.get("TINYALIGN_SHARED", RESULTS.parents[2] / "shared")).joinpath(*parts)
    if not folder.exists():
        raise InputError(f"{folder}: absent; set TINYALIGN_SHARED to the folder of pretrained weights and data")
    return folder


def _cpuinfo(*keys: str) -> str:
    """The first value of one of the keys in Linux's `/proc/cpuinfo`; empty where there is none."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    values = (value for key, _, value in (line.partition(":") for line in lines) if key.strip() in keys)
    return next(values, "").strip()
