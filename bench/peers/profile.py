"""Where our decoder's time goes: the share of each kind of node, from onnxruntime's own profile.

    python -m tinyalign_edge.bench.peers.profile [--model smollm2-135m] [--tokens 1] [--context 256] [--threads 2]

Writes `bench/results/profile-TOKENS-at-CONTEXT.json`. Profiling makes every node a little slower, the small ones
most: the pass without it is given beside.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from tinyalign_edge.bench.peers.engines import edge
from tinyalign_edge.bench.peers.shapes import LANGUAGE, write_language
from tinyalign_edge.bench.record import record
from tinyalign_edge.latency.profile import NodeTime, decoder_pass, node_times, trace
from tinyalign_edge.runtime.sessions import open_session

COMMAND = "python -m tinyalign_edge.bench.peers.profile"
RUNS = 30


def main() -> None:
    """Export, run, print a table."""
    given = _arguments()
    with tempfile.TemporaryDirectory() as scratch:
        source, folder = Path(scratch) / "source", Path(scratch) / "exported"
        folder.mkdir()
        write_language(given.model, source)
        edge.prepare(source, folder, given.precision)
        block = edge.read_block(folder)
        prepare = partial(decoder_pass, block=block, tokens=given.tokens, context=given.context)
        pass_ms = pass_milliseconds(prepare(open_session(folder / block.file, threads=given.threads)))
        nodes = node_times(trace(folder / block.file, prepare, threads=given.threads, passes=RUNS), kind)
    print(f"{given.model} {given.precision}, {given.threads} threads, {given.tokens} tokens at {given.context}")
    print_shares(nodes)
    print(f"without profile: {pass_ms:.2f} ms a pass")
    options_given = f"--model {given.model} --precision {given.precision} --threads {given.threads}"
    command = f"{COMMAND} {options_given} --tokens {given.tokens} --context {given.context}"
    result = {"nodes": [asdict(node) for node in nodes], "ms_without_profile": pass_ms}
    print(record(f"profile-{given.tokens}-at-{given.context}", command, result))


def pass_milliseconds(step: Callable[[], object]) -> float:
    """Median time of `RUNS` passes."""
    seconds = []
    for _ in range(RUNS):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return 1e3 * float(np.median(seconds))


def print_shares(nodes: list[NodeTime]) -> None:
    """Nodes, milliseconds and share of each kind."""
    print(f"{'node':<44}{'nodes':>6}{'ms':>8}{'share':>8}")
    for node in nodes:
        print(f"{node.name:<44}{node.nodes:>6}{node.ms:>8.2f}{node.share:>8.1%}")
    print(f"{'all':<44}{sum(node.nodes for node in nodes):>6}{sum(node.ms for node in nodes):>8.2f}")


def kind(operator: str, name: str) -> str:
    """The operator, with the part of the model where that is told by the node's name."""
    part = re.search(r"\b(\w+_(?:proj|head))\b", name)
    return f"{operator} {part[1]}" if part and "MatMul" in operator else operator


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", choices=LANGUAGE)
    parser.add_argument("--precision", default="int8", choices=("int8", "fp32"))
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
