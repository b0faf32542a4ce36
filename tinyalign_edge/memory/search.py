"""Exact nearest neighbours over int8 keys: USearch finds candidates, a float32 pass ranks them.

USearch compares int8 rows; the ranking uses the dequantised keys, orders ties by row, and applies the floor,
which USearch ignores in Python.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnxruntime  # noqa: F401  before usearch: importing onnxruntime 1.32 after it ends in SIGSEGV
from usearch.compiled import MetricKind
from usearch.index import search

from tinyalign_edge.errors import InputError

CANDIDATES = 32  # ranked again for each query, beyond k

Float = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Neighbours:
    """For each query the rows of its neighbours, most similar first; row -1 and similarity -1 where there is none."""

    rows: npt.NDArray[np.int64]  # (Q, K); of a bank: ids
    similarity: Float  # (Q, K), cosine


def quantize_keys(keys: Float) -> tuple[npt.NDArray[np.int8], Float]:
    """Unit keys (E, key_dim) float32 to int8 rows and a float32 scale a row.

    Raises:
        InputError: a key is zero or not finite.
    """
    scales = (np.abs(keys).max(axis=1, initial=0.0) / 127).astype(np.float32)  # (E,)
    if not np.all(np.isfinite(scales)) or not np.all(scales > 0):
        raise InputError("keys: one is zero or not finite; look for a damaged picture or encoder")
    return np.round(keys / scales[:, None]).astype(np.int8), scales


def nearest(keys: npt.NDArray[np.int8], scales: Float, queries: Float, k: int, *, floor: float = -1.0) -> Neighbours:
    """The `k` rows of `keys` (E, key_dim) most similar to each of `queries` (Q, key_dim), at or above `floor`."""
    count = min(k + CANDIDATES, len(keys))
    rows = np.full((len(queries), k), -1, np.int64)
    similarity = np.full((len(queries), k), -1.0, np.float32)
    if count == 0 or k == 0 or len(queries) == 0:
        return Neighbours(rows, similarity)
    quantised, _ = quantize_keys(queries)
    found = search(keys, quantised, count, MetricKind.Cos, exact=True)
    candidates = np.asarray(found.keys).reshape(len(queries), count).astype(np.int64)
    for i, query in enumerate(queries):
        unit = query / np.linalg.norm(query)
        own = np.sort(candidates[i])  # so that equal similarities come in row order
        scores = (keys[own].astype(np.float32) @ unit) * scales[own]
        best = np.argsort(-scores, kind="stable")[:k]
        best = best[scores[best] >= floor]
        rows[i, : len(best)] = own[best]
        similarity[i, : len(best)] = scores[best]
    return Neighbours(rows, similarity)
