"""Who is retrieved for whom during training: never the example itself, nor its near-duplicates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tinyalign_edge.memory.search import Neighbours, nearest, quantize_keys
from tinyalign_edge.progress import progress
from tinyalign_edge.train.keys import Keys
from tinyalign_edge.train.processes import is_first
from tinyalign_edge.train.settings import MemorySettings

EXTRA = 16  # looked up beyond k, to have k left when the example's own entries are dropped
FLOOR_PERCENTILE = 1.0


@dataclass(frozen=True)
class Retrieved:
    """Neighbours in the bank of the training examples (leave-one-out) and of the held-out ones, and the floor."""

    training: Neighbours
    held_out: Neighbours
    floor: float


def retrieve(pictures: Sequence[tuple[int, ...]], keys: Keys, settings: MemorySettings) -> Retrieved:
    """Look up the neighbours of every example among the keys of the entries.

    An entry that has a picture in common with the example's own is left out, as are near-duplicates.
    The floor is the similarity that 99 % of the training examples' nearest neighbours reach.

    Args:
        pictures: the numbers of every entry's pictures.
    """
    if settings.kind == "none":
        return Retrieved(_none(len(keys.queries)), _none(len(keys.held_out)), -1.0)
    quantised, scales = quantize_keys(keys.entries)
    with progress("Looking up neighbours", len(keys.queries), brief=True, shown=is_first()) as advance:
        found = nearest(quantised, scales, keys.queries, settings.k + EXTRA, advance=advance)
    table = _table(pictures)
    same = _share_a_picture(table[keys.own], table, found.rows)
    alike = found.similarity if keys.pictures is None else _picture_similarity(keys.pictures, keys.own, found.rows)
    drop = same | (alike >= settings.duplicate_similarity) | (found.rows < 0)
    training = _keep_first(found, ~drop, settings.k)
    best = training.similarity[training.rows[:, 0] >= 0, 0]
    floor = float(np.percentile(best, FLOOR_PERCENTILE)) if len(best) else -1.0
    training = _keep_first(training, (training.rows >= 0) & (training.similarity >= floor), settings.k)
    return Retrieved(training, nearest(quantised, scales, keys.held_out, settings.k, floor=floor), floor)


def of_others(
    near: Neighbours, seed: int, pictures: Sequence[tuple[int, ...]], entries: Sequence[tuple[int, ...]]
) -> Neighbours:
    """Give every example the neighbours of one with other pictures, drawn once: what retrieval is then worth is
    nothing. Entries with a picture of its own are left out of them; where no other example has other pictures, all are.

    Args:
        pictures, entries: the numbers of every example's pictures, and of every entry's.
    """
    mine, theirs = _table(pictures), _table(entries)
    drawn = np.random.default_rng(seed).permutation(len(near.rows))
    source, alike = np.arange(len(drawn)), np.ones(len(drawn), np.bool_)
    for further in range(1, len(drawn)):  # another question about the same picture is no other example
        if not alike.any():
            break
        next_one = np.empty_like(drawn)
        next_one[drawn] = np.roll(drawn, further)
        source = np.where(alike, next_one, source)
        alike = _share_a_picture(mine, mine, source[:, None])[:, 0]
    given = Neighbours(near.rows[source], near.similarity[source])
    keep = (given.rows >= 0) & ~alike[:, None] & ~_share_a_picture(mine, theirs, given.rows)
    return _keep_first(given, keep, given.rows.shape[1])


def _share_a_picture(
    mine: npt.NDArray[np.int64], theirs: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Whether examples, whose pictures are `mine` (Q, P), and the `rows` (Q, K) of `theirs` (E, P') have one in
    common."""
    shared = np.zeros(rows.shape, np.bool_)
    for numbers in mine.T:
        for others in theirs.T:
            shared |= (others[rows] == numbers[:, None]) & (numbers[:, None] >= 0)
    return shared


def _table(pictures: Sequence[tuple[int, ...]]) -> npt.NDArray[np.int64]:
    """The numbers of pictures as (E, most), -1 where there are fewer."""
    most = max(map(len, pictures), default=0)
    return np.array([[*numbers, *[-1] * (most - len(numbers))] for numbers in pictures], np.int64)


def _picture_similarity(
    pictures: npt.NDArray[np.float32], own: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Cosines (Q, K) of the pictures of entries `rows` (Q, K) with those of entries `own` (Q,)."""
    return np.stack([(pictures[column] * pictures[own]).sum(axis=1) for column in rows.T], axis=1)


def _keep_first(found: Neighbours, keep: npt.NDArray[np.bool_], k: int) -> Neighbours:
    """The first `k` neighbours of each row for which `keep` is true."""
    order = np.argsort(~keep, axis=1, kind="stable")[:, :k]
    kept = np.take_along_axis(keep, order, axis=1)
    rows = np.where(kept, np.take_along_axis(found.rows, order, axis=1), -1)
    similarity = np.where(kept, np.take_along_axis(found.similarity, order, axis=1), -1.0)
    return Neighbours(rows, similarity.astype(np.float32))


def _none(count: int) -> Neighbours:
    return Neighbours(np.full((count, 1), -1, np.int64), np.full((count, 1), -1.0, np.float32))
