"""Results as JSON: what was measured, by which command, on which machine, with which versions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tinyalign_edge.config import write_json
from tinyalign_edge.errors import InputError
from tinyalign_edge.export.components import tool_versions
from tinyalign_edge.latency.host import commit, host

RESULTS = Path(__file__).resolve().parent / "results"


def record(name: str, command: str, result: dict[str, Any]) -> Path:
    """Write `bench/results/NAME.json`; returns its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    write_json(path, {"command": command, "host": host(), "commit": commit(), "versions": tool_versions(), **result})
    return path


def shared(*parts: str) -> Path:
    """A path below `TINYALIGN_SHARED` (default: the folder `shared` beside the repository).

    Raises:
        InputError: it is absent.
    """
    folder = Path(os.environ.get("TINYALIGN_SHARED", RESULTS.parents[2] / "shared")).joinpath(*parts)
    if not folder.exists():
        raise InputError(f"{folder}: absent; set TINYALIGN_SHARED to the folder of pretrained weights and data")
    return folder
