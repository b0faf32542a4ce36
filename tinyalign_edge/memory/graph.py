"""The graph of a large bank: a USearch index over the keys, by which a search looks at few of them.

It is a cache. USearch trusts what it maps, so nothing reaches it but bytes that are the manifest's; and what it finds
is ranked again, since it sees the query rounded to int8.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyalign_edge.errors import BundleError, UnsupportedError
from tinyalign_edge.files import FileEntry, check_files, inside
from tinyalign_edge.folders import sync
from tinyalign_edge.memory.layout import BankSpec, GraphEntry
from tinyalign_edge.memory.search import Float
from tinyalign_edge.memory.table import Table
from tinyalign_edge.memory.verified import VerifiedFiles

LINKS, BUILD_WIDTH = 16, 128  # of a node; candidates kept while building
MIN_WIDTH, WIDTH = 24, 0.32  # candidates kept while searching, times the root of the entries: 99 % are near enough
BATCH = 4096  # entries added between two steps of progress


class Graph:
    """An open graph, of the `count` entries there were up to the id `last_id`. Safe to use from several threads."""

    def __init__(self, index: Any, entry: GraphEntry) -> None:
        self.count, self.last_id = entry.count, entry.last_id
        self._index, self._lock = index, threading.Lock()
        self._width = max(MIN_WIDTH, round(WIDTH * math.sqrt(self.count)))

    def candidates(self, unit: Float, count: int) -> npt.NDArray[np.uint64]:
        """The rising ids of about the `count` entries most similar to `unit` (key_dim,)."""
        query = np.rint(unit * (127 / np.abs(unit).max())).astype(np.int8)
        with self._lock:
            self._index.expansion_search = max(self._width, count)
            found = self._index.search(query, count, threads=1)
        return np.sort(np.asarray(found.keys, np.uint64))


def open_graph(folder: Path, entry: GraphEntry, spec: BankSpec, verified: VerifiedFiles) -> Graph | None:
    """Map a graph, once its bytes are the manifest's; None where it is missing or damaged, or USearch is."""
    try:
        path = inside(folder, entry.file)
        if not verified.holds(path, entry):
            check_files(folder, {entry.file: FileEntry(entry.bytes, entry.sha256)})
            verified.add(path, entry)
        index = _new_index(spec, enable_key_lookups=False)
        expected = {
            "kind_metric": index.metric_kind,
            "kind_scalar": index.dtype,
            "dimensions": spec.key_dim,
            "count_present": entry.count,
            "count_deleted": 0,
        }
        found = index.metadata(path)
        if not found or not found.items() >= expected.items():  # before `view` makes room for as many as it says
            return None
        index.view(path)
    except (BundleError, UnsupportedError, OSError, RuntimeError, ValueError):
        return None
    return Graph(index, entry) if len(index) == entry.count else None


def build_index(tables: Sequence[Table], spec: BankSpec, advance: Callable[[int], object]) -> Any:
    """A USearch index of all keys of `tables`, in memory; `advance` is told of entries done.

    On one core: with several, USearch leaves nodes that no search reaches. So equal keys give equal bytes, too.

    Raises:
        UnsupportedError: USearch is not there.
    """
    index = _new_index(spec, connectivity=LINKS, expansion_add=BUILD_WIDTH)
    for table in tables:
        for start in range(0, len(table), BATCH):
            ids = np.array(table.ids[start : start + BATCH], np.uint64)
            index.add(ids, np.array(table.keys[start : start + BATCH]), threads=1)
            advance(len(ids))
    return index


def write_graph(path: Path, index: Any, last_id: int) -> GraphEntry:
    """Write an index to the new file `path`, down to the disk."""
    data = index.save()  # as bytes: onto a full disk USearch may write less and say nothing
    with path.open("xb") as file:
        file.write(data)
    sync(path)
    return GraphEntry(path.name, len(data), hashlib.sha256(data).hexdigest(), len(index), last_id)


def _new_index(spec: BankSpec, **options: Any) -> Any:
    try:
        import onnxruntime  # noqa: F401  before usearch: importing onnxruntime 1.32 after it ends in SIGSEGV
        from usearch.compiled import MetricKind
        from usearch.index import Index
    except ImportError:
        raise UnsupportedError("memory: USearch does not load here, the search stays exact; install usearch") from None

    return Index(ndim=spec.key_dim, metric=MetricKind.Cos, dtype="i8", **options)
