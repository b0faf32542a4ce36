"""What the parts say together: means and deviations over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from tinyalign_edge.bench.study.plan import (
    BY_PICTURE,
    DATASETS,
    DROPPED,
    FEW,
    NOTHING_TOLD,
    SHARES,
    SHORT,
    SHORT_SETTINGS,
    TAUGHT,
    Kind,
    Part,
    Run,
)
from tinyalign_edge.bench.study.seeds import Figure, Spread
from tinyalign_edge.bench.study.store import Results
from tinyalign_edge.bench.teach import SHOTS

Summary = dict[str, Any]

COMPARED = ("baseline", "memory")
BESIDE = {  # arms of the data set with `SHORT_SETTINGS` that have the main ones' steps
    "baseline": "baseline",
    "baseline_apart": "baseline-apart",
    "memory": "memory",
    "memory_by_picture": f"memory{BY_PICTURE}",
    **{f"{arm}_dropout": f"{arm}{DROPPED}" for arm in COMPARED},
    "shuffled_memory": "shuffled",
    "shuffled_by_picture": f"shuffled{BY_PICTURE}",
}
SHORTER = {
    **{arm: f"{arm}{SHORT}" for arm in COMPARED},
    "shuffled_memory": f"shuffled{SHORT}",
    **{arm.replace("-", "_"): arm for arm in NOTHING_TOLD},
}
GROUPS = {"beside": BESIDE, "short": SHORTER}


def summarise(done: Results) -> Summary:
    """Per data set what the seeds say together of every figure; null where there is none."""
    return {name: _spread(figures(done, name)) for name in DATASETS}


def _spread(part: dict[str, Any]) -> Summary:
    return {key: value.spread if isinstance(value, Figure) else _spread(value) for key, value in part.items()}


def find(done: Results, run: Run, kind: Kind, *keys: str) -> Any:
    """A figure of a part, by the keys that lead to it; None where the part is missing or has no such figure."""
    value: Any = done.get(Part(run, kind).name)
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def score_of(done: Results, run: Run, kind: Kind, *keys: str, questions: str = "open") -> float | None:
    """The exact match of a part's open questions, or of its yes/no questions where there are no others."""
    for group in (questions, "yes_no"):
        value = find(done, run, kind, *keys, group, "exact_match")
        if value is not None:
            return float(value)
    return None


def curve(done: Results, run: Run) -> list[tuple[int, float]]:
    """Steps and held-out losses of a training; empty where it is missing."""
    points = find(done, run, "scores", "curve") or []
    return [(point["step"], point["held_out_loss"]) for point in points]


def last_loss(done: Results, run: Run) -> float | None:
    """The held-out loss at the end of a training."""
    points = curve(done, run)
    return points[-1][1] if points else None


def lowest_loss(done: Results, run: Run) -> float | None:
    """The lowest held-out loss of a training, wherever that is."""
    return min((loss for _, loss in curve(done, run)), default=None)


def loss_before_copying(done: Results, run: Run) -> float | None:
    """The held-out loss where the copy term's own steps begin, after as many steps as the baseline has."""
    steps = find(done, run, "scores", "settings", "training", "steps")
    return dict(curve(done, run)).get(steps)


def steps_ratio(
    done: Results, name: str, seed: int, arm: str = "memory", *, baseline_arm: str = "baseline"
) -> float | None:
    """The share of a baseline's steps after which an arm first has a held-out loss at or below the baseline's last;
    infinite where it never has, None where a part is missing."""
    baseline, other = curve(done, Run(name, baseline_arm, seed=seed)), curve(done, Run(name, arm, seed=seed))
    if not baseline or not other:
        return None
    steps, last = baseline[-1]
    return next((step / steps for step, loss in other if loss <= last), math.inf)


def over_seeds(figure: Callable[[int], float | None]) -> Spread:
    """What the seeds say together of a figure."""
    return Figure.of(figure).spread


def missing(done: Results, parts: Iterable[Part]) -> list[str]:
    """The names of the parts that have no result."""
    return [part.name for part in parts if part.name not in done]


def figures(done: Results, name: str) -> dict[str, Any]:
    """All figures of a data set, by seed: a tree of the keys of `summary.json` with a `Figure` at every end."""

    def value(arm: str, kind: Kind, *keys: str) -> Figure:
        return Figure.of(lambda seed: find(done, Run(name, arm, seed=seed), kind, *keys))

    def held_out(arm: str, loss: Callable[[Results, Run], float | None] = last_loss) -> Figure:
        return Figure.of(lambda seed: loss(done, Run(name, arm, seed=seed)))

    return {
        "final_loss": {
            **{arm: held_out(arm) for arm in COMPARED},
            "shuffled_memory": held_out("shuffled"),
            "memory_before_copying": held_out("memory", loss_before_copying),
        },
        "lowest_loss": {arm: held_out(arm, lowest_loss) for arm in COMPARED},
        "test_loss": {
            **{arm: value(arm, "scores", "loss") for arm in COMPARED},
            "shuffled_memory": value("shuffled", "scores", "loss"),
            "empty_bank": value("memory", "scores", "empty_bank", "loss"),
            "int8": {arm: value(arm, "int8", "loss") for arm in COMPARED},
            "int8_in_torch": {arm: value(arm, "int8", "fp32", "loss") for arm in COMPARED},
        },
        "steps_to_baseline_loss_ratio": Figure.of(lambda seed: steps_ratio(done, name, seed)),
        "score": _scores(done, name, "open"),
        "score_yes_no": _scores(done, name, "yes_no"),
        "emi": _told(value),
        **(_taught(value) if name == TAUGHT else {}),
        **({key: _compared(done, name, arms) for key, arms in GROUPS.items()} if name in SHORT_SETTINGS else {}),
    }


def _compared(done: Results, name: str, arms: dict[str, str]) -> dict[str, Any]:
    """Arms, by the names that their figures have, beside the one that is named "baseline"."""

    def figures(of: Callable[[Run], float | None], share: int = 100) -> dict[str, Figure]:
        def one(arm: str) -> Figure:
            return Figure.of(lambda seed: of(Run(name, arm, share, seed)))

        return {key: one(arm) for key, arm in arms.items()}

    def scores(kind: str) -> dict[str, dict[str, Figure]]:
        return {
            str(share): figures(lambda run: score_of(done, run, "scores", questions=kind), share)
            for share in (FEW, 100)
        }

    def empty(kind: str) -> Callable[[Run], float | None]:
        return lambda run: score_of(done, run, "scores", "empty_bank", questions=kind)

    def steps(arm: str) -> Figure:
        return Figure.of(lambda seed: steps_ratio(done, name, seed, arm, baseline_arm=arms["baseline"]))

    return {
        "final_loss": figures(partial(last_loss, done)),
        "test_loss": figures(lambda run: find(done, run, "scores", "loss")),
        "steps_to_baseline_loss_ratio": {key: steps(arm) for key, arm in arms.items()},
        "score": scores("open"),
        "score_yes_no": scores("yes_no"),
        "teach": figures(lambda run: find(done, run, "teach", "teach", str(SHOTS[-1]))),
        "teach_ceiling": figures(lambda run: find(done, run, "teach", "teach_ceiling", str(SHOTS[-1]))),
        "empty_bank": {kind: figures(empty(kind)) for kind in ("open", "yes_no")},
    }


def _told(value: Callable[..., Figure]) -> dict[str, Any]:
    def figures(*place: Any) -> dict[str, Figure]:
        return {
            "image": value("memory", *place, "image"),
            "memory": value("memory", *place, "memory"),
            "image_of_baseline": value("baseline", *place, "image"),
        }

    return {
        **figures("emi"),
        "shuffled": value("shuffled", "emi", "shuffled_memory"),
        "int8": figures("int8", "emi"),
        "int8_in_torch": figures("int8", "emi_in_torch"),
    }


def _taught(value: Callable[..., Figure]) -> dict[str, Any]:
    of = {"teach": SHOTS, "teach_choices": SHOTS, "teach_ceiling": SHOTS[1:], "seen": ("before", "after")}
    return {
        figure: {
            **{str(at): value("memory", "teach", figure, str(at)) for at in when},
            "int8": {str(at): value("memory", "int8", "teach", figure, str(at)) for at in when},
        }
        for figure, when in of.items()
    }


def _scores(done: Results, name: str, questions: str) -> dict[str, Any]:
    def one(arm: str, kind: Kind, *keys: str, share: int = 100) -> Figure:
        return Figure.of(lambda seed: score_of(done, Run(name, arm, share, seed), kind, *keys, questions=questions))

    return {
        **{arm: {str(share): one(arm, "scores", share=share) for share in SHARES} for arm in COMPARED},
        "full_bank": {str(share): one("memory", "full_bank", share=share) for share in SHARES if share < 100},
        "shuffled_memory": one("shuffled", "scores"),
        "copy_neighbour": one("memory", "copy"),
        "copy_neighbour_of_share": {str(share): one("memory", "copy", share=share) for share in SHARES},
        "empty_bank": one("memory", "scores", "empty_bank"),
        "int8": {arm: one(arm, "int8") for arm in COMPARED},
        "int8_in_torch": {arm: one(arm, "int8", "fp32") for arm in COMPARED},  # the questions that int8 was asked
    }
