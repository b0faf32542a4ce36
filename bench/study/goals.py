"""What was hoped for, and whether the figures show it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from operator import sub, truediv
from typing import Any

from tinyalign_edge.bench.study.plan import MAIN, SEEDS, TAUGHT
from tinyalign_edge.bench.study.seeds import Figure
from tinyalign_edge.bench.study.store import Results
from tinyalign_edge.bench.study.summary import figures
from tinyalign_edge.bench.teach import SHOTS

INT8_LOSS = -0.01  # a point


@dataclass(frozen=True)
class Goal:
    """A demand on the mean over the seeds, or on every one of them."""

    dataset: str
    text: str
    figure: Figure
    bound: float
    below: bool  # at most the bound, or at least
    every: bool = False

    @property
    def measured(self) -> float | None:
        """The mean, or the worst seed's; infinite where something never happened, None where nothing is known."""
        known = self.figure.by_seed.values()
        if not self.every or not known:
            return self.figure.mean
        return max(known) if self.below else min(known)

    @property
    def met(self) -> bool | None:
        """None: not known yet, as long as the seeds that are missing can change it."""
        measured = self.measured
        if measured is None:
            return None
        held = measured <= self.bound if self.below else measured >= self.bound
        final = not held and (self.every or math.isinf(measured))
        return held if final or len(self.figure.by_seed) == len(SEEDS) else None


def goals(done: Results) -> list[Goal]:
    """The goals, each on a figure that is compared seed by seed."""
    return [goal for name in MAIN for goal in _of(name, figures(done, name))]


def _of(name: str, part: dict[str, Any]) -> Iterator[Goal]:
    def compared(how: Callable[[float, float], float], figure: str, other: str) -> Figure:
        return _at(part, figure).against(_at(part, other), how)

    yield Goal(name, "held-out loss with memory / without",
               compared(truediv, "final_loss.memory", "final_loss.baseline"), 0.85, True)  # fmt: skip
    yield Goal(name, "steps to the baseline's loss / its steps", _at(part, "steps_to_baseline_loss_ratio"), 0.5, True)
    yield Goal(name, "held-out loss with shuffled memory / the baseline's",
               compared(truediv, "final_loss.shuffled_memory", "final_loss.baseline"), 1.0, False)  # fmt: skip
    for key, kind in (("score", ""), ("score_yes_no", ": yes/no questions")):
        yield Goal(name, f"score with memory and 40 % of the data, minus the baseline's with all{kind}",
                   compared(sub, f"{key}.memory.40", f"{key}.baseline.100"), 0.0, False)  # fmt: skip
        yield Goal(name, f"score with shuffled memory, minus the baseline's{kind}",
                   compared(sub, f"{key}.shuffled_memory", f"{key}.baseline.100"), 0.0, True)  # fmt: skip
    int8 = {
        f"{kind} questions, arm {arm}": (f"{score}.int8.{arm}", f"{score}.int8_in_torch.{arm}")
        for arm in ("baseline", "memory")
        for kind, score in (("open", "score"), ("yes/no", "score_yes_no"))
    }
    if name == TAUGHT:
        yield Goal(name, "five taught examples a class / the nearest neighbour's ceiling",
                   compared(truediv, "teach.5", "teach_ceiling.5"), 0.7, False)  # fmt: skip
        yield Goal(name, "trained classes after teaching, minus before",
                   compared(sub, "seen.after", "seen.before"), -0.01, False)  # fmt: skip
        for figure, how in (("teach", "free"), ("teach_choices", "among choices")):
            int8 |= {
                f"{shots} taught examples a class, {how}": (f"{figure}.int8.{shots}", f"{figure}.{shots}")
                for shots in SHOTS[1:]
            }
        int8["trained classes after teaching"] = ("seen.int8.after", "seen.after")
    for what, pair in int8.items():
        yield Goal(name, f"int8 minus float32, worst seed: {what}", compared(sub, *pair), INT8_LOSS, False, every=True)


def _at(part: dict[str, Any], path: str) -> Figure:
    found: Any = reduce(lambda value, key: value[key], path.split("."), part)
    assert isinstance(found, Figure)
    return found
