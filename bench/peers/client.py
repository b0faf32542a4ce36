"""Engines as processes: starting them in their environments, asking, closing."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from tinyalign_edge.bench.record import RESULTS

REPOSITORY = RESULTS.parents[1]


class EngineError(Exception):
    """An engine failed at what it was asked, or its process ended."""


class Worker:
    """A process that runs `worker.py` for one engine.

    Args:
        engine: the file of `engines/`, without its suffix.
        python: the interpreter of an environment that has the engine.
        log: what the engine prints is appended here.
    """

    def __init__(self, engine: str, python: Path, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stream:
            self._process = subprocess.Popen(
                [python, "-m", "tinyalign_edge.bench.peers.worker", engine],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                env=_environment(),
            )
        self._log = log

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            EngineError: the engine raised, or the process ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise EngineError(f"the process ended with code {self._process.wait()} in {do!r}; see {self._log.name}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineError(f"{do}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.communicate()  # closes its input: it reads no further request and ends


def _environment() -> dict[str, str]:
    """This process's environment without thread counts, which are given to each engine, and without the network."""
    kept = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
    return {**kept, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
