"""The losses of a run as a picture."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

LINES = {"train_loss": ("training", "tab:gray"), "held_out_loss": ("held out", "tab:blue")}

Points = list[tuple[int, float]]  # steps and losses


def read_evaluations(metrics: Path) -> list[dict[str, Any]]:
    """The lines of a finished run's `metrics.jsonl`."""
    return [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]


def losses_in(evaluations: list[dict[str, Any]], name: str, *, until: float = math.inf) -> Points:
    """One of the losses where it is known and finite, up to a step."""
    known = (point for point in evaluations if point.get(name) is not None and math.isfinite(point[name]))
    return [(point["step"], point[name]) for point in known if point["step"] <= until]


def lowest(points: Points) -> tuple[int, float]:
    """The first point with the lowest loss."""
    return min(points, key=lambda point: point[1])


def draw_curves(metrics: Path, picture: Path) -> None:
    """Write a PNG of training and held-out loss against steps, the lowest held-out loss marked."""
    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    axes = figure.subplots()
    evaluations = read_evaluations(metrics)
    for name, (label, colour) in LINES.items():
        points = losses_in(evaluations, name)
        if points:
            axes.plot(*zip(*points, strict=True), label=label, color=colour, marker=".")
        if points and name == "held_out_loss":
            step, loss = lowest(points)
            label = f"lowest: {loss:.3f} after step {step}"
            axes.plot(step, loss, label=label, color=colour, marker="o", linestyle="")
    axes.set(xlabel="steps", ylabel="loss (nats an answer token)", ylim=(0, None))
    axes.grid(alpha=0.25)
    if axes.lines:
        axes.legend(frameon=False)
    figure.savefig(picture)
