"""What was hoped for, and whether the summary shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from operator import sub, truediv
from typing import Any

from tinyalign_edge.bench.study.plan import MAIN, TAUGHT
from tinyalign_edge.bench.study.summary import Summary


@dataclass(frozen=True)
class Goal:
    """A demand on a figure; `figure` is None where a part that it needs is missing."""

    dataset: str
    text: str
    figure: float | None
    bound: float
    below: bool  # at most the bound, or at least

    @property
    def met(self) -> bool | None:
        """None: not known yet."""
        if self.figure is None:
            return None
        return self.figure <= self.bound if self.below else self.figure >= self.bound


def goals(summary: Summary) -> list[Goal]:
    """The goals on the means over seeds."""
    return [goal for name in MAIN for goal in _of(name, summary[name])]


def _of(name: str, part: Summary) -> Iterator[Goal]:
    def compared(how: Callable[[float, float], float], figure: str, other: str) -> float | None:
        pair = [_mean(part, path) for path in (figure, other)]
        return None if None in pair else how(*pair)

    loss, score, closed = "final_loss.{}", "score.{}", "score_yes_no.{}"
    baseline = score.format("baseline.100")
    yield Goal(name, "loss with memory / loss without", compared(truediv, "final_loss.memory", loss.format("baseline")),
               0.85, True)  # fmt: skip
    yield Goal(name, "steps to the baseline's loss / its steps", _mean(part, "steps_to_baseline_loss_ratio"), 0.5, True)
    yield Goal(name, "score with memory and 40 % of the data, minus the baseline's with all",
               compared(sub, score.format("memory.40"), baseline), 0.0, False)  # fmt: skip
    yield Goal(name, "score with shuffled memory, minus the baseline's",
               compared(sub, score.format("shuffled_memory"), baseline), 0.0, True)  # fmt: skip
    if name == TAUGHT:
        yield Goal(name, "five taught examples a class / the nearest neighbour's ceiling",
                   compared(truediv, "teach.5", "teach_ceiling.5"), 0.7, False)  # fmt: skip
        yield Goal(name, "trained classes after teaching, minus before",
                   compared(sub, "seen.after", "seen.before"), -0.01, False)  # fmt: skip
    for arm in ("baseline", "memory"):
        for kind, path in (("open", score), ("yes/no", closed)):
            yield Goal(name, f"int8 minus float32, {kind} questions, arm {arm}",
                       compared(sub, path.format(f"int8.{arm}"), path.format(f"{arm}.100")), -0.01, False)  # fmt: skip


def _mean(part: Summary, path: str) -> Any:
    return reduce(lambda value, key: value[key], path.split("."), part)["mean"]
