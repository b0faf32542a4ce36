"""A fresh process that opens a bank, or times queries beside FAISS; its last line is JSON.

    python -m tinyalign_edge.bench.recall_worker open BANK QUERIES
    python -m tinyalign_edge.bench.recall_worker time BANK QUERIES KEYS THREADS [PEER_DIM ...]

QUERIES and KEYS are .npy files of float32 (Q, key_dim) and (E, key_dim). The number of threads of numpy's BLAS is what
OMP_NUM_THREADS says.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyalign_edge.latency.process import resident_bytes
from tinyalign_edge.memory import Bank
from tinyalign_edge.memory.lookup import nearest_entries

Float = npt.NDArray[np.float32]
K = 4
SECONDS = 10.0  # for each engine at most
PEER_ROWS = 1 << 14  # of random keys made at once
TURN = 100  # queries of one engine before the next one's
COLD_QUERIES = 200
OTHER_BYTES = 64 << 20  # read before a cold query


def open_bank(folder: str, queries: str) -> dict[str, float]:
    """How long it takes to open the bank and to ask it for the first time, and what stays in memory."""
    import onnxruntime  # noqa: F401  loaded before the clock starts, as the libraries are in an app that has a model open
    import usearch.index  # noqa: F401

    asked = np.load(queries)
    before = resident_bytes()
    started = time.perf_counter()
    bank = Bank(Path(folder))
    opened = time.perf_counter()
    bank.nearest(asked[:1], K)
    first = time.perf_counter()
    after = resident_bytes()
    for query in asked:
        bank.nearest(query[None], K)
    return {
        "open_ms": 1e3 * (opened - started),
        "first_query_ms": 1e3 * (first - opened),
        "resident_bytes": after - before,
        "resident_after_queries_bytes": resident_bytes() - before,
    }


def time_queries(folder: str, queries: str, keys: str, threads: str, *peer_dims: str) -> dict[str, Any]:
    """p50 and p99 of one query at a time, of ours and of FAISS.

    The engines take turns of `TURN` queries; then of one, each `cold`: after other work has filled the caches.
    """
    asked, bank = np.load(queries), Bank(Path(folder))
    exact = replace(bank._snapshot, graph=None)
    engines: dict[str, Callable[[Float], object]] = {"exact": lambda q: nearest_entries(exact, q, K, floor=-1.0)}
    if bank.stats().graph_entries:
        engines["graph"] = lambda q: bank.nearest(q, K)
    own = dict.fromkeys(engines, asked)
    for dim in map(int, peer_dims):
        name = f"faiss_flat_{dim}"
        engines[name], own[name] = _faiss(np.load(keys, "r"), asked, dim, int(threads))
    times: dict[str, list[float]] = {name: [] for name in engines}
    cold: dict[str, list[float]] = {name: [] for name in engines}
    for start in range(0, len(asked), TURN):
        for name, engine in engines.items():
            engine(own[name][start][None])  # warms up
            for query in own[name][start : start + TURN]:
                if sum(times[name]) < SECONDS:
                    times[name].append(_seconds(engine, query[None]))
    other = np.ones(OTHER_BYTES, np.uint8)
    for i in range(COLD_QUERIES):
        for name, engine in engines.items():
            other.max()
            cold[name].append(_seconds(engine, own[name][i % len(asked)][None]))
    return {name: {**_summary(times[name]), "cold": _summary(cold[name])} for name in engines}


def _seconds(engine: Callable[[Float], object], query: Float) -> float:
    started = time.perf_counter()
    engine(query)
    return time.perf_counter() - started


def _faiss(keys: Float, queries: Float, dim: int, threads: int) -> tuple[Callable[[Float], object], Float]:
    """A flat index over the keys, or over random ones of another width, and queries of its width."""
    import faiss

    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatIP(dim)
    rng = np.random.default_rng(0)
    for start in range(0, len(keys), PEER_ROWS):
        block = np.array(keys[start : start + PEER_ROWS])
        index.add(block if dim == keys.shape[1] else rng.standard_normal((len(block), dim), np.float32))
    if dim != keys.shape[1]:
        queries = rng.standard_normal((len(queries), dim), np.float32)
    elif not np.allclose(index.search(queries[:8], K)[0], -np.sort(-queries[:8] @ keys.T, axis=1)[:, :K], atol=1e-5):
        raise AssertionError("FAISS does not find the nearest")
    return lambda query: index.search(query, K), queries


def _summary(seconds: list[float]) -> dict[str, Any]:
    ms = 1e3 * np.array(seconds)
    return {"p50_ms": float(np.median(ms)), "p99_ms": float(np.quantile(ms, 0.99)), "queries": len(ms)}


if __name__ == "__main__":
    result = open_bank(*sys.argv[2:]) if sys.argv[1] == "open" else time_queries(*sys.argv[2:])
    print(json.dumps(result))
