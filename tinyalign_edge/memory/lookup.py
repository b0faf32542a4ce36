"""Nearest neighbours in a whole bank: by its graph where it has one, exactly where it has none or not yet."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tinyalign_edge.errors import InputError
from tinyalign_edge.memory.graph import Graph
from tinyalign_edge.memory.search import Float, Neighbours, Rows, fill, nearest, no_neighbours, similarities, unit_rows
from tinyalign_edge.memory.snapshot import Part, Snapshot
from tinyalign_edge.memory.table import Array

CANDIDATES = 12  # of the graph, ranked again for each query, beyond k


def nearest_entries(snapshot: Snapshot, queries: Float, k: int, *, floor: float) -> Neighbours:
    """The ids of the `k` entries most similar to each of `queries` (Q, key_dim), at or above `floor`.

    Of equally similar ones the least ids come first.

    Raises:
        InputError: a query is zero, not finite or of another shape, or `k` is below 0.
    """
    key_dim = snapshot.manifest.spec.key_dim
    if queries.ndim != 2 or queries.shape[1] != key_dim:
        raise InputError(f"keys: of the shape {queries.shape}, this bank is asked by (queries, {key_dim})")
    if k < 0:
        raise InputError(f"k {k}: must be at least 0")
    units = unit_rows(queries)
    known, new = snapshot.parts
    if snapshot.graph is None or not known:
        return _exactly(new, units, k, floor)
    found = _by_graph(snapshot.graph, known, units, k, floor)
    return _best([found, _exactly(new, units, k, floor)], k) if new else found


def _by_graph(graph: Graph, parts: Sequence[Part], units: Float, k: int, floor: float) -> Neighbours:
    found = no_neighbours(len(units), k)
    for i, unit in enumerate(units):
        try:
            candidates = graph.candidates(unit, k + CANDIDATES)
        except Exception:  # whatever USearch makes of a graph that is not as it writes them
            candidates = np.zeros(0, np.uint64)
        ids, scores = _scored(parts, candidates, unit)
        order = np.argsort(-scores, kind="stable")
        more_equals = len(order) > k > 0 and scores[order[k - 1]] == scores[order[-1]]  # than candidates
        if more_equals or not len(order):
            exact = _exactly(parts, unit[None], k, floor)
            found.rows[i], found.similarity[i] = exact.rows[0], exact.similarity[0]
            continue
        best = order[:k]
        best = best[scores[best] >= floor]
        fill(found, i, ids[best], scores[best])
    return found


def _scored(parts: Sequence[Part], candidates: Array, unit: Float) -> tuple[Rows, Float]:
    """Those of the rising ids `candidates` that there are, and their similarities."""
    ids, scores = list[Rows](), list[Float]()
    for part in parts:
        rows = np.searchsorted(part.ids, candidates)
        rows = rows[part.ids[np.minimum(rows, len(part.ids) - 1)] == candidates]
        ids.append(part.ids[rows].astype(np.int64))
        scores.append(similarities(part.keys, part.scales, rows, unit))
    return np.concatenate(ids), np.concatenate(scores)


def _exactly(parts: Sequence[Part], units: Float, k: int, floor: float) -> Neighbours:
    found = list[Neighbours]()
    for part in parts:
        own = nearest(part.keys, part.scales, units, k, floor=floor)
        ids = np.where(own.rows >= 0, part.ids[own.rows].astype(np.int64), -1)
        found.append(Neighbours(ids, own.similarity))
    return _best(found, k) if found else no_neighbours(len(units), k)


def _best(found: Sequence[Neighbours], k: int) -> Neighbours:
    """The `k` best of all, each of which is ordered; of equals those that come first."""
    if len(found) == 1:
        return found[0]
    ids = np.concatenate([each.rows for each in found], axis=1)
    scores = np.concatenate([each.similarity for each in found], axis=1)
    order = np.argsort(np.where(ids < 0, np.inf, -scores), axis=1, kind="stable")[:, :k]
    return Neighbours(np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1))
