"""Where our decoder's time goes: the share of each kind of node, from onnxruntime's own profile.

    python -m tinyalign_edge.bench.peers.profile [--model smollm2-135m] [--tokens 1] [--context 256] [--threads 2]

Writes `bench/results/profile-TOKENS-at-CONTEXT.json`. Profiling makes every node a little slower, the small ones
most: the pass without it is given beside.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from tinyalign_edge.bench.peers.engines import edge
from tinyalign_edge.bench.peers.shapes import LANGUAGE, write_language
from tinyalign_edge.bench.record import record
from tinyalign_edge.bundle import DecoderBlock
from tinyalign_edge.config import from_json, read_json
from tinyalign_edge.runtime.decoder import Cache

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
        options = _options(given.threads)
        pass_ms = pass_milliseconds(folder, options, tokens=given.tokens, context=given.context)
        options.enable_profiling, options.profile_file_prefix = True, str(folder / "trace")
        pass_milliseconds(folder, options, tokens=given.tokens, context=given.context)
        (trace,) = folder.glob("trace*.json")
        print(f"{given.model} {given.precision}, {given.threads} threads, {given.tokens} tokens at {given.context}")
        nodes = node_times(json.loads(trace.read_text()))
    print_shares(nodes)
    print(f"without profile: {pass_ms:.2f} ms a pass")
    options_given = f"--model {given.model} --precision {given.precision} --threads {given.threads}"
    command = f"{COMMAND} {options_given} --tokens {given.tokens} --context {given.context}"
    result = {"nodes": [asdict(node) for node in nodes], "ms_without_profile": pass_ms}
    print(record(f"profile-{given.tokens}-at-{given.context}", command, result))


def pass_milliseconds(folder: Path, options: ort.SessionOptions, *, tokens: int, context: int) -> float:
    """Median time of `RUNS` passes over `tokens` tokens after `context`, of what `edge.prepare` wrote."""
    block = from_json(DecoderBlock, read_json(folder / edge.BLOCK), edge.BLOCK)
    session = ort.InferenceSession(folder / block.file, options, providers=["CPUExecutionProvider"])
    cache = Cache(session, block, context + tokens)
    cache.buffer[...] = np.random.default_rng(0).standard_normal(cache.buffer.shape, np.float32)
    cache.length = context
    cache.stage(np.random.default_rng(0).standard_normal((tokens, block.width), np.float32), 1)
    seconds = []
    for _ in range(RUNS):
        start = time.perf_counter()
        session.run_with_iobinding(cache.binding)
        seconds.append(time.perf_counter() - start)
    if options.enable_profiling:
        session.end_profiling()
    return 1e3 * float(np.median(seconds))


@dataclass(frozen=True)
class NodeTime:
    """What the nodes of one kind take in a pass."""

    kind: str
    nodes: int
    ms: float
    share: float  # of all kinds together


def node_times(events: Iterable[dict[str, Any]]) -> list[NodeTime]:
    """The kinds of nodes in onnxruntime's trace of `RUNS` passes, the one that takes longest first."""
    spent: dict[str, float] = defaultdict(float)
    nodes: dict[str, int] = defaultdict(int)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            kind = _kind(event["args"]["op_name"], event["name"].removesuffix("_kernel_time"))
            spent[kind] += event["dur"] / 1e3 / RUNS
            nodes[kind] += 1
    total = sum(spent.values())
    kinds = sorted(spent, key=lambda kind: -spent[kind])
    return [NodeTime(kind, nodes[kind] // RUNS, spent[kind], spent[kind] / total) for kind in kinds]


def print_shares(nodes: list[NodeTime]) -> None:
    """Nodes, milliseconds and share of each kind."""
    print(f"{'node':<44}{'nodes':>6}{'ms':>8}{'share':>8}")
    for node in nodes:
        print(f"{node.kind:<44}{node.nodes:>6}{node.ms:>8.2f}{node.share:>8.1%}")
    print(f"{'all':<44}{sum(node.nodes for node in nodes):>6}{sum(node.ms for node in nodes):>8.2f}")


def _kind(operator: str, name: str) -> str:
    """The operator, with the part of the model where that is told by the node's name."""
    part = re.search(r"\b(\w+_(?:proj|head))\b", name)
    return f"{operator} {part[1]}" if part and "MatMul" in operator else operator


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return options


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
