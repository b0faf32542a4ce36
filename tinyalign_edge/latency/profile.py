"""Where a pass's time goes: onnxruntime's own profile of a graph."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from tinyalign_edge.bundle import DecoderBlock, open_bundle
from tinyalign_edge.runtime.decoder import Cache
from tinyalign_edge.runtime.sessions import ThreadsLike, onnxruntime_errors, session_options

PASSES = 10
MOST = 10  # nodes of a pass that are shown

Pass = Callable[[], object]


@dataclass(frozen=True)
class NodeTime:
    """What the nodes of one name take in a pass."""

    name: str
    nodes: int
    ms: float
    share: float  # of all nodes together


def profile(folder: Path, *, threads: int, tokens: int) -> list[dict[str, Any]]:
    """The `MOST` most expensive nodes of encoding a picture, of reading a prompt in one pass, and of decoding a token.

    Args:
        folder: the bundle.
        threads: of one operator.
        tokens: of the prompt, after which the token is decoded.
    """
    manifest = open_bundle(folder)
    image, decoder = manifest.image, manifest.decoder
    pixels = np.random.default_rng(0).standard_normal((1, 3, image.height, image.width), np.float32)
    passes: dict[str, tuple[str, Callable[[ort.InferenceSession], Pass]]] = {
        "encode": (manifest.vision.file, lambda session: lambda: session.run(None, {"pixel_values": pixels})),
        "prefill": (decoder.file, lambda session: decoder_pass(session, decoder, tokens=tokens, context=0)),
        "per_token": (decoder.file, lambda session: decoder_pass(session, decoder, tokens=1, context=tokens)),
    }
    found = []
    for stage, (file, prepare) in passes.items():
        events = trace(folder / file, prepare, threads=threads, passes=PASSES)
        nodes = node_times(events, lambda operator, name: f"{operator} {name}")
        found += [{"stage": stage, "threads": threads, **asdict(node)} for node in nodes[:MOST]]
    return found


def decoder_pass(session: ort.InferenceSession, block: DecoderBlock, *, tokens: int, context: int) -> Pass:
    """Something to call for a pass over `tokens` random embeddings after `context` random positions."""
    cache, random = Cache(session, block, context + tokens), np.random.default_rng(0)
    if block.kv == "fp32":
        cache.buffer[...] = random.standard_normal(cache.buffer.shape, np.float32)
    cache.length = context
    cache.stage(random.standard_normal((tokens, block.width), np.float32), 1)
    return lambda: session.run_with_iobinding(cache.binding)


def trace(
    path: Path, prepare: Callable[[ort.InferenceSession], Pass], *, threads: ThreadsLike, passes: int
) -> list[dict[str, Any]]:
    """The events of onnxruntime's profile of so many passes through the graph `path`.

    Raises:
        BundleError: onnxruntime does not take the file.
    """
    options = session_options(threads)
    with tempfile.TemporaryDirectory() as scratch, onnxruntime_errors(path):
        options.enable_profiling, options.profile_file_prefix = True, str(Path(scratch) / "trace")
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        step = prepare(session)
        for _ in range(passes):
            step()
        events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    return events


def node_times(events: Iterable[dict[str, Any]], name_of: Callable[[str, str], str]) -> list[NodeTime]:
    """What the nodes take in a pass, the longest first: of each node the median of all passes, summed by name.

    Args:
        events: as `trace` gives them.
        name_of: the name under which a node, of an operator and with a name of its own, is counted.
    """
    found: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            node = event["args"]["op_name"], event["name"].removesuffix("_kernel_time")
            found[*node, int(event["args"].get("node_index", 0))].append(event["dur"] / 1e3)
    spent: dict[str, float] = defaultdict(float)
    for (operator, name, _), samples in found.items():
        spent[name_of(operator, name)] += statistics.median(samples)
    nodes = Counter(name_of(operator, name) for operator, name, _ in found)
    total = sum(spent.values())
    names = sorted(spent, key=lambda name: -spent[name])
    return [NodeTime(name, nodes[name], spent[name], spent[name] / total) for name in names]
