"""The other end of `client.Worker`: an engine in a process of its own, told what to do by lines of JSON.

    python -m tinyalign_edge.bench.peers.worker ENGINE

Needs numpy and the engine only. A request is an object with "do" and arguments, an answer an object; one that has
"error" tells why the request failed, and the process lives on.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

import tinyalign_edge
from tinyalign_edge.bench.peers.check import (
    PROMPT_TOKENS,
    REFERENCE,
    Floats,
    check_ids,
    compare_features,
    compare_logits,
)
from tinyalign_edge.latency.process import peak_bytes

CAPACITY = 1152  # positions that every engine keeps room for
EXPECTED = "expected.npy"  # beside an encoder: what torch computes in float32 for `fixed_image`


class Language(ABC):
    """A language model with one sequence.

    Attributes:
        length: positions of the sequence so far.
        weight_bytes: size of the files.
    """

    length: int
    weight_bytes: int
    vocab_size: int

    @abstractmethod
    def append(self, ids: NDArray[np.int64], *, num_logits: int = 1) -> Floats:
        """Append `ids` (T,) to the sequence; returns logits (>= 1, V), the last row being the last position's."""

    @abstractmethod
    def step(self) -> None:
        """Append the likeliest next token."""

    @abstractmethod
    def truncate(self, length: int) -> None:
        """Forget the positions from `length` on."""


class Encoder(ABC):
    """A vision encoder with one picture, `fixed_image`, as its input."""

    weight_bytes: int

    @abstractmethod
    def encode(self) -> Floats:
        """Features (..., C)."""


def main() -> None:
    """Answer requests until standard input ends or says "quit"."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not come between the answers
    serve(importlib.import_module(f"tinyalign_edge.bench.peers.engines.{sys.argv[1]}"), sys.stdin, answers)


def serve(module: Any, requests: TextIO, answers: TextIO) -> None:
    """Drive `module`, which has `prepare`, `load` and `PACKAGES`."""
    session = _Session(module)
    for line in requests:
        request = json.loads(line)
        command = request.pop("do")
        if command == "quit":
            break
        try:
            answer = getattr(session, command)(**request)
        except Exception as error:  # whatever an engine raises is a result: it failed
            answer = {"error": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.300}"}
        answers.write(json.dumps(answer) + "\n")


class _Session:
    """The commands."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._engine: Any = None
        self._rng = np.random.default_rng(1)

    def prepare(self, source: str, folder: str, precision: str) -> dict[str, Any]:
        self._module.prepare(Path(source), Path(folder), precision)
        return {}

    def load(self, source: str, folder: str, precision: str, threads: int) -> dict[str, Any]:
        start = time.perf_counter()
        self._source, self._folder = Path(source), Path(folder)
        self._engine = self._module.load(self._source, self._folder, precision, threads)
        versions = {name: _version(name) for name in self._module.PACKAGES}
        note = getattr(self._module, "build", lambda: "")()
        if note:
            versions[f"{self._module.PACKAGES[0]} build"] = note
        return {"bytes": self._engine.weight_bytes, "seconds": time.perf_counter() - start, "versions": versions}

    def check_language(self) -> dict[str, float]:
        ids = check_ids(self._engine.vocab_size)
        self._engine.truncate(0)
        rows = [self._engine.append(ids[:PROMPT_TOKENS])[-1].copy()]
        rows += [self._engine.append(ids[i : i + 1])[-1].copy() for i in range(PROMPT_TOKENS, len(ids))]
        return compare_logits(np.stack(rows), np.load(self._source / REFERENCE))

    def check_encoder(self) -> dict[str, float]:
        return compare_features(self._engine.encode(), np.load(self._folder / EXPECTED))

    def prefill(self, tokens: int) -> dict[str, float]:
        """Seconds of one pass over `tokens` tokens into an empty sequence."""
        self._engine.truncate(0)
        return self._timed_append(tokens, 1)

    def decode(self, tokens: int, context: int) -> dict[str, float]:
        """Seconds of `tokens` greedy steps after `context` tokens."""
        self._fill(context - 1)
        self._engine.step()  # some engines choose a token before they compute, some after
        start = time.perf_counter()
        for _ in range(tokens):
            self._engine.step()
        return {"seconds": time.perf_counter() - start}

    def verify(self, tokens: int, context: int, repeats: int) -> dict[str, float]:
        """Seconds of one pass over `tokens` tokens after `context`, with logits of all: the median of `repeats`."""
        seconds = []
        for _ in range(repeats):
            self._fill(context)
            seconds.append(self._timed_append(tokens, tokens)["seconds"])
        return {"seconds": float(np.median(seconds))}

    def encode(self, images: int) -> dict[str, float]:
        """Seconds of `images` pictures, one after another."""
        start = time.perf_counter()
        for _ in range(images):
            self._engine.encode()
        return {"seconds": time.perf_counter() - start}

    def memory(self) -> dict[str, int]:
        return {"peak_rss_bytes": peak_bytes()}

    def _fill(self, length: int) -> None:
        """Make the sequence `length` long, its last position fresh."""
        self._engine.truncate(min(self._engine.length, length - 1))
        self._engine.append(self._ids(length - self._engine.length))

    def _timed_append(self, tokens: int, num_logits: int) -> dict[str, float]:
        ids = self._ids(tokens)
        start = time.perf_counter()
        self._engine.append(ids, num_logits=num_logits)
        return {"seconds": time.perf_counter() - start}

    def _ids(self, tokens: int) -> NDArray[np.int64]:
        return self._rng.integers(3, self._engine.vocab_size, tokens)


def _version(package: str) -> str:
    if package == "tinyalign-edge":  # run from the working tree, installed or not
        return tinyalign_edge.__version__
    return importlib.metadata.version(package)


if __name__ == "__main__":
    main()
