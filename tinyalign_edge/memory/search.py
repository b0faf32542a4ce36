"""Exact nearest neighbours over int8 keys, with numpy alone.

A float32 pass over blocks of keys finds every row that can be among the best; those are ranked in float64 and rounded
to float32, so that equal keys have equal similarities wherever they lie, and ties come in row order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tinyalign_edge.errors import InputError

BLOCK_ROWS = 4096  # turned into float32 at once: they stay in the processor's cache
BATCH_SCORES = 1 << 24  # of several queries, held at once
GROUP = 64  # rows whose maximum stands for them when the best are looked for
UNIT = 1e-3  # how far from 1 the length of a unit key may be

Float = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Neighbours:
    """For each query the rows of its neighbours, most similar first; row -1 and similarity -1 where there is none."""

    rows: Rows  # (Q, K); of a bank: ids
    similarity: Float  # (Q, K), cosine


def quantize_keys(keys: Float) -> tuple[npt.NDArray[np.int8], Float]:
    """Unit keys (E, key_dim) float32 to int8 rows and a float32 scale a row.

    Raises:
        InputError: a key is zero or not finite, or of another length.
    """
    lengths = np.sqrt(np.einsum("ij,ij->i", keys, keys))  # (E,)
    if not np.all(np.abs(lengths - 1) <= UNIT):
        raise InputError("keys: one is zero or not finite, or not of length 1; look for a damaged picture or encoder")
    scales = (np.abs(keys).max(axis=1) / 127).astype(np.float32)  # (E,)
    return np.round(keys / scales[:, None]).astype(np.int8), scales


def nearest(
    keys: npt.NDArray[np.int8],
    scales: Float,
    queries: Float,
    k: int,
    *,
    floor: float = -1.0,
    advance: Callable[[int], None] = lambda _: None,
) -> Neighbours:
    """The `k` rows of `keys` (E, key_dim) most similar to each of `queries` (Q, key_dim), at or above `floor`.

    Args:
        advance: called with the number of queries that were looked up, again and again.

    Raises:
        InputError: a query is zero or not finite.
    """
    found = no_neighbours(len(queries), k)
    units = unit_rows(queries)
    batch = max(1, BATCH_SCORES // max(1, len(keys)))
    for start in range(0, len(units) if k and len(keys) else 0, batch):
        scores = _scores(keys, scales, units[start : start + batch])  # (q, E)
        for i, own in enumerate(scores, start):
            fill(found, i, *rank(keys, scales, _promising(own, k, keys.shape[1]), units[i], k, floor))
        advance(len(scores))
    return found


def unit_rows(queries: Float) -> Float:
    """`queries` (Q, key_dim) with every row of length 1.

    Raises:
        InputError: one is zero or not finite.
    """
    wide = queries.astype(np.float64)
    lengths = np.sqrt(np.einsum("ij,ij->i", wide, wide))  # (Q,)
    if not ((lengths > 0) & (lengths < np.inf)).all():
        raise InputError("keys: one is zero or not finite; look for a damaged picture or encoder")
    return np.asarray(queries / lengths[:, None], np.float32)


def no_neighbours(queries: int, k: int) -> Neighbours:
    """Empty places for `k` neighbours of each query."""
    return Neighbours(np.full((queries, k), -1, np.int64), np.full((queries, k), -1.0, np.float32))


def fill(found: Neighbours, query: int, rows: Rows, similarity: Float) -> None:
    """Write the neighbours of one query into its places."""
    found.rows[query, : len(rows)] = rows
    found.similarity[query, : len(rows)] = similarity


def similarities(keys: npt.NDArray[np.int8], scales: Float, rows: Rows, unit: Float) -> Float:
    """The cosines of some `rows` of `keys` (E, key_dim) with a query of length 1."""
    exact: npt.NDArray[np.float64] = (keys[rows].astype(np.float64) @ unit.astype(np.float64)) * scales[rows]
    return np.asarray(exact, np.float32)


def rank(
    keys: npt.NDArray[np.int8], scales: Float, rows: Rows, unit: Float, k: int, floor: float
) -> tuple[Rows, Float]:
    """The `k` best of some rising `rows` and their similarities."""
    scores = similarities(keys, scales, rows, unit)
    best = np.argsort(-scores, kind="stable")[:k]
    best = best[scores[best] >= floor]
    return rows[best], scores[best]


def _scores(keys: npt.NDArray[np.int8], scales: Float, units: Float) -> Float:
    scores = np.empty((len(units), len(keys)), np.float32)
    for start in range(0, len(keys), BLOCK_ROWS):
        block = keys[start : start + BLOCK_ROWS].astype(np.float32)
        np.matmul(units, block.T, out=scores[:, start : start + BLOCK_ROWS])
    scores *= scales
    return scores


def _promising(scores: Float, k: int, key_dim: int) -> Rows:
    """The rows that can be among the best `k`, given what float32 may have lost in a sum of `key_dim` products."""
    count = len(scores) // GROUP
    sample = scores[: count * GROUP].reshape(GROUP, count).max(axis=0) if count >= k else scores
    least = np.partition(sample, -k)[-k] if len(sample) >= k else np.float32(-2)
    return np.flatnonzero(scores >= least - (key_dim + 2) * np.finfo(np.float32).eps)
