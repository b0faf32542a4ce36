"""What the memory finds and how fast, from a thousand entries to a million, beside FAISS.

    python -m tinyalign_edge.bench.recall [--sizes 1000 10000 100000 1000000] [--bank BANK] [--out runs/recall]

Keys are synthetic with the spectrum of real ones (`bench/synthetic_keys.py`); `--bank` adds a real bank, a tenth of
whose entries ask for the rest. Sizes that are finished are not repeated. Writes `bench/results/recall.json`; run it
on an idle machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from tinyalign_edge.bench.recall_worker import K
from tinyalign_edge.bench.record import record
from tinyalign_edge.bench.synthetic_keys import real_keys, stored_spectrum, synthetic_keys
from tinyalign_edge.config import read_json, write_json
from tinyalign_edge.memory import Bank, Record, verified, write_bank
from tinyalign_edge.memory.lookup import nearest_entries
from tinyalign_edge.progress import progress

Float = npt.NDArray[np.float32]
SIZES = (1000, 10_000, 100_000, 1_000_000)
QUERIES, DIM, TOKENS = 1000, 128, 24
NEAR = 0.005  # in similarity below the true fourth
RELEASED_DIM, RELEASED_BYTES = 2560, 22_528  # of the paper's released code: its keys, and an entry
MAX_PEER_BYTES = 2 << 30  # of one FAISS index
THREADS = (1, 2)
ADDS = 20
BLOCK = 1 << 17


def main() -> None:
    """Measure what is missing, print and record everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SIZES))
    parser.add_argument("--bank", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/recall"))
    given = parser.parse_args()
    parts = [part(f"{size}", given.out, size=size) for size in given.sizes]
    if given.bank:
        parts.append(part("real", given.out, bank=given.bank))
    Console().print(table(parts))
    sizes = f" --sizes {' '.join(map(str, given.sizes))}" + (" --bank BANK" if given.bank else "")
    result = {"spectrum": asdict(stored_spectrum()), "k": K, "near": NEAR, "parts": parts}
    print(record("recall", "python -m tinyalign_edge.bench.recall" + sizes, result))


def part(name: str, out: Path, *, size: int = 0, bank: Path | None = None) -> dict[str, Any]:
    """Everything about one bank; read back where it has been measured."""
    done = out / f"{name}.json"
    if not done.exists():
        work = out / f"{name}.work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        if bank:
            keys = real_keys(Bank(bank))
            asks = np.arange(len(keys)) % 10 == 0
            queries, keys = keys[asks], keys[~asks]
        else:
            keys = synthetic_keys(size + QUERIES, DIM, stored_spectrum(), seed=size)
            queries, keys = keys[:QUERIES], keys[QUERIES:]
        write_json(done, {"name": name, **measure(work, np.ascontiguousarray(keys), queries)})
        shutil.rmtree(work)
    return dict(read_json(done))


def measure(work: Path, keys: Float, queries: Float) -> dict[str, Any]:
    """Build a bank of `keys` (E, D), check what it finds for `queries` (Q, D), and time it."""
    folder = work / "bank"
    np.save(work / "keys.npy", keys)
    np.save(work / "queries.npy", queries)
    started = time.perf_counter()
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 32_000, (len(keys), TOKENS)).tolist()
    records = [Record(f"a picture of thing {i}", source=f"image-{i}.jpg") for i in range(len(keys))]
    write_bank(folder, keys, records, fingerprint="synthetic", vocab_size=32_000, token_ids=ids)
    written = time.perf_counter()
    del ids, records
    bank = Bank(folder)
    with progress(f"Graph of {len(keys)}", len(keys)) as advance:
        built = time.perf_counter()
        graph_entries = bank.rebuild(advance)
        build_seconds = time.perf_counter() - built
    result: dict[str, Any] = {"entries": len(keys), "write_s": written - started}
    result["graph_s"] = build_seconds if graph_entries else 0.0
    result |= {"quality": quality(bank, keys, queries), "stats": asdict(bank.stats())}
    time.sleep(verified.SETTLED_NS / 1e9 + 0.5)
    result["unverified"] = _worker(1, "open", folder, work / "queries.npy")
    result["verified"] = _worker(1, "open", folder, work / "queries.npy")
    dims = [keys.shape[1], RELEASED_DIM] if importlib.util.find_spec("faiss") else []
    dims = [dim for dim in dims if 4 * dim * len(keys) <= MAX_PEER_BYTES]
    for threads in THREADS:
        given = (folder, work / "queries.npy", work / "keys.npy", threads, *dims)
        result[f"threads_{threads}"] = _worker(threads, "time", *given)
    return result | _changes(bank, queries)


def quality(bank: Bank, keys: Float, queries: Float) -> dict[str, Any]:
    """What is found beside the exact neighbours by the float32 keys, by the graph if there is one and without."""
    true_rows, true_scores = _exact(keys, queries)
    snapshot = replace(bank._snapshot, graph=None)
    result: dict[str, Any] = {"exact": None, **({"graph": None} if bank.stats().graph_entries else {})}
    for name in result:
        of = snapshot if name == "exact" else bank._snapshot
        found = nearest_entries(of, queries, K, floor=-1.0)
        scores = np.einsum("qkd,qd->qk", keys[found.rows], queries)
        if not np.allclose(found.similarity, scores, atol=0.02) or np.any(found.rows < 0):
            raise AssertionError(f"{name}: the similarities are not those of the entries")
        result[name] = {
            "recall": float((found.rows[:, :, None] == true_rows[:, None]).any(axis=2).mean()),
            "near": float((scores >= true_scores[:, -1:] - NEAR).mean()),
        }
    return result


def _exact(keys: Float, queries: Float) -> tuple[npt.NDArray[np.int64], Float]:
    """The rows and similarities of the true nearest, block by block."""
    rows = np.zeros((len(queries), 0), np.int64)
    scores = np.zeros((len(queries), 0), np.float32)
    for start in range(0, len(keys), BLOCK):
        own = queries @ keys[start : start + BLOCK].T
        best = np.argpartition(-own, min(K, own.shape[1] - 1), axis=1)[:, :K]
        rows = np.concatenate([rows, best + start], axis=1)
        scores = np.concatenate([scores, np.take_along_axis(own, best, axis=1)], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :K]
        rows, scores = np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)
    return rows, scores


def _changes(bank: Bank, queries: Float) -> dict[str, float]:
    """Time to add one entry, and to forget one that was sealed, by its id and by its source."""
    taken, tokens = [], np.arange(TOKENS)
    for i in range(min(ADDS, len(queries))):
        started = time.perf_counter()
        bank.add(queries[i], Record("new", source="new"), value=tokens)
        taken.append(time.perf_counter() - started)
    started = time.perf_counter()
    bank.forget(id=1)
    by_id = time.perf_counter() - started
    started = time.perf_counter()
    bank.forget(source="image-2.jpg")
    by_source = time.perf_counter() - started
    return {"add_ms": 1e3 * float(np.median(taken)), "forget_id_s": by_id, "forget_source_s": by_source}


def _worker(threads: int, command: str, folder: Path, *arguments: object) -> dict[str, Any]:
    """Run `recall_worker` in a process of its own."""
    settings = {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "OPENBLAS")}
    settings["TINYALIGN_CACHE"] = str(folder.parent / "cache")
    call = [sys.executable, "-m", "tinyalign_edge.bench.recall_worker", command, *map(str, (folder, *arguments))]
    done = subprocess.run(call, env=os.environ | settings, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def table(parts: list[dict[str, Any]]) -> Table:
    """A column for each bank; times of a query are p50/p99 on so many threads, cold: after other work."""
    shown = Table(box=None, pad_edge=False)
    shown.add_column("entries")
    for each in parts:
        name = "real, " if each["name"] == "real" else ""
        shown.add_column(f"{name}{each['entries']:,}", justify="right")
    for label, value in _lines(parts[0]["stats"]["key_dim"]).items():
        shown.add_row(label, *(_show(value, each) for each in parts))
    return shown


def _lines(dim: int) -> dict[str, Callable[[dict[str, Any]], str]]:
    engines = {"graph": "graph", "exact": "exact"}
    engines |= {f"FAISS {width}": f"faiss_flat_{width}" for width in (dim, RELEASED_DIM)}
    lines: dict[str, Callable[[dict[str, Any]], str]] = {
        "recall@4": lambda p: f"{_ours(p, p['quality'])['recall']:.1%}",
        f"within {NEAR} of 4th": lambda p: f"{_ours(p, p['quality'])['near']:.2%}",
    }
    for threads in THREADS:
        lines |= {f"{name} x{threads}, ms": partial(_times, threads, key) for name, key in engines.items()}
    lines |= {f"{name} cold, ms": partial(_cold, key) for name, key in engines.items()}
    return lines | {
        "open, verified, ms": lambda p: f"{p['verified']['open_ms']:.1f}",
        "open, unverified, ms": lambda p: f"{p['unverified']['open_ms']:.1f}",
        "first query, ms": lambda p: f"{p['verified']['first_query_ms']:.1f}",
        "resident, MB": lambda p: f"{p['verified']['resident_after_queries_bytes'] / 1e6:.1f}",
        "key and value, bytes": lambda p: f"{p['stats']['entry_bytes']:.0f}",
        "times smaller": lambda p: f"{RELEASED_BYTES / p['stats']['entry_bytes']:.0f}",
        "graph bytes an entry": lambda p: f"{p['stats']['graph_bytes'] / p['entries']:.0f}",
        "files, MB": lambda p: f"{p['stats']['total_bytes'] / 1e6:.1f}",
        "write, s": lambda p: f"{p['write_s']:.1f}",
        "build the graph, s": lambda p: f"{p['graph_s']:.1f}",
        "add one, ms": lambda p: f"{p['add_ms']:.1f}",
        "forget id/source, s": lambda p: f"{p['forget_id_s']:.2f}/{p['forget_source_s']:.2f}",
    }


def _times(threads: int, engine: str, part: dict[str, Any]) -> str:
    return "{p50_ms:.2g}/{p99_ms:.2g}".format(**part[f"threads_{threads}"][engine])


def _cold(engine: str, part: dict[str, Any]) -> str:
    return "{p50_ms:.2g}/{p99_ms:.2g}".format(**part["threads_1"][engine]["cold"])


def _ours(part: dict[str, Any], of: dict[str, Any]) -> dict[str, Any]:
    """What a search uses: the graph where there is one."""
    return dict(of["graph" if part["stats"]["graph_entries"] else "exact"])


def _show(value: Any, part: dict[str, Any]) -> str:
    try:
        return str(value(part))
    except KeyError:  # not measured at this size
        return "-"


if __name__ == "__main__":
    main()
