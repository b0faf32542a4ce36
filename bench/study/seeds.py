"""A figure of every seed, and what they say together."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tinyalign_edge.bench.study.plan import SEEDS

Spread = dict[str, float | int | None]  # mean, sample standard deviation, seeds; never, where it is above zero


@dataclass(frozen=True)
class Figure:
    """A figure by the seeds for which it is known; `math.inf` where what it counts to never happened."""

    by_seed: dict[int, float]

    @classmethod
    def of(cls, figure: Callable[[int], float | None]) -> Figure:
        """The figure of every seed; None where it is missing."""
        return cls({seed: float(value) for seed in SEEDS if (value := figure(seed)) is not None})

    @property
    def never(self) -> int:
        """For how many seeds it never happened."""
        return sum(map(math.isinf, self.by_seed.values()))

    @property
    def mean(self) -> float | None:
        """Over the seeds for which it is known; infinite where it never happened for one of them."""
        return float(np.mean(list(self.by_seed.values()))) if self.by_seed else None

    @property
    def spread(self) -> Spread:
        """What `summary.json` holds: without mean and deviation where for some seed it never happened."""
        seeds = len(self.by_seed)
        if self.never:
            return {"mean": None, "std": None, "seeds": seeds, "never": self.never}
        std = float(np.std(list(self.by_seed.values()), ddof=1)) if seeds > 1 else None
        return {"mean": self.mean, "std": std, "seeds": seeds}

    def against(self, other: Figure, how: Callable[[float, float], float]) -> Figure:
        """Compared seed by seed, where both are known."""
        both = [seed for seed in self.by_seed if seed in other.by_seed]
        return Figure({seed: how(self.by_seed[seed], other.by_seed[seed]) for seed in both})
