"""In which order entries are worth their bytes: those first that stand for most of the others.

An entry is worth what it adds to the similarity of all entries to the nearest one that is kept (the facility-location
objective; the greedy choice is within 1 - 1/e of the best one: Nemhauser, Wolsey and Fisher, 1978). The key space is
cut into cells of at most `CELL` entries and each is ordered alone, so that a million keys need the memory of one cell
and some numbers an entry, and time proportional to their number.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CELL = 512
BLOCK = 1 << 14  # keys in float32 at once
DUPLICATE = 0.999  # similarity from which on two pictures are the same one, as in training

Float = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Keys:
    """E keys as a bank stores them; the arrays may be maps of a file."""

    rows: npt.NDArray[np.int8]  # (E, key_dim)
    scales: Float  # (E,)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, numbers: Integers) -> Float:
        """Unit keys (n, key_dim) of some entries."""
        keys = self.rows[numbers].astype(np.float32) * self.scales[numbers, None]
        return np.asarray(keys / np.linalg.norm(keys, axis=1, keepdims=True), np.float32)

    def project(self, numbers: Integers, direction: Float) -> Float:
        """Inner products (n,) with `direction` (key_dim,)."""
        blocks = [self.take(numbers[i : i + BLOCK]) @ direction for i in range(0, len(numbers), BLOCK)]
        return np.concatenate(blocks)


def by_worth(
    keys: Keys, contents: Integers, costs: Integers, advance: Callable[[int], None] = lambda _: None
) -> Integers:
    """The numbers of the entries, those first that add most similarity a byte.

    Of entries with the same content whose keys are near-duplicates only the first is there.

    Args:
        keys: E of them.
        contents: (E,), equal where the model reads the same.
        costs: (E,), bytes.
        advance: told how many entries have been looked at.
    """
    worth = np.full(len(keys), -1.0, np.float32)
    for cell in _cells(keys):
        similarity = keys.take(cell)
        similarity = similarity @ similarity.T
        for place, gain in _greedy(np.maximum(similarity, 0), contents[cell], costs[cell]):
            worth[cell[place]] = gain / costs[cell[place]]
        advance(len(cell))
    kept = np.flatnonzero(worth >= 0)
    return kept[np.argsort(-worth[kept], kind="stable")]


def _cells(keys: Keys) -> Iterator[Integers]:
    """Cut along the line between two distant keys, again and again, where keys are sparse near the middle."""
    waiting = [np.arange(len(keys))]
    while waiting:
        cell = waiting.pop()
        if len(cell) <= CELL:
            yield cell
            continue
        one = keys.take(cell[:1])[0]
        other = keys.take(cell[[int(keys.project(cell, one).argmin())]])[0]
        far = keys.take(cell[[int(keys.project(cell, other).argmin())]])[0]
        place = keys.project(cell, far - other)
        order = np.argsort(place, kind="stable")
        quarter = len(cell) // 4
        gaps = np.diff(place[order[quarter : len(cell) - quarter]])
        at = quarter + 1 + int(gaps.argmax()) if gaps.max() > 0 else len(cell) // 2
        waiting += [np.sort(order_part) for order_part in (cell[order[at:]], cell[order[:at]])]


def _greedy(similarity: Float, contents: Integers, costs: Integers) -> Iterator[tuple[int, float]]:
    """Places in the order in which they are chosen, and what each adds, without near-duplicates of the same content.

    What an entry adds only falls as others are chosen, so an old figure is a bound, and few are worked out again
    (Minoux, 1978).
    """
    nearest = np.zeros(len(similarity), np.float32)  # to what has been chosen
    heap = [(-gain / cost, i, 0) for i, (gain, cost) in enumerate(zip(similarity.sum(axis=0), costs, strict=True))]
    heapq.heapify(heap)
    chosen = list[int]()
    while heap:
        bound, i, known_at = heapq.heappop(heap)
        if known_at < len(chosen):
            gain = float(np.maximum(similarity[i] - nearest, 0).sum())
            heapq.heappush(heap, (-gain / costs[i], i, len(chosen)))
            continue
        same = similarity[i, chosen] >= DUPLICATE
        if same.any() and contents[i] in contents[np.array(chosen)[same]]:
            continue
        yield i, -bound * float(costs[i])
        chosen.append(i)
        np.maximum(nearest, similarity[i], out=nearest)
