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

RESULTS = Path(__file__).resolve().parent / "results"


def record(name: str, command: str, result: dict[str, Any]) -> Path:
    """Write `bench/results/NAME.json`; returns its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    write_json(path, {"command": command, "host": host(), "commit": commit(), "versions": tool_versions(), **result})
    return path


def host() -> dict[str, Any]:
    """Processor, cores and system of this machine."""
    return {"cpu": _cpu(), "cores": os.cpu_count(), "machine": platform.machine(), "system": platform.system()}


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


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        if names:
            return names[0]
    return platform.processor() or "unknown"
