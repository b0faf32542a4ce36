"""The losses of a run as a picture."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure

LINES = {"train_loss": ("training", "tab:gray"), "held_out_loss": ("held out", "tab:blue")}


def draw_curves(metrics: Path, picture: Path) -> None:
    """Write a PNG of training and held-out loss against steps, from the lines of `metrics.jsonl`."""
    points = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]
    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    axes = figure.subplots()
    for name, (label, colour) in LINES.items():
        known = [(point["step"], point[name]) for point in points if point.get(name) is not None]
        if known:
            axes.plot(*zip(*known, strict=True), label=label, color=colour, marker=".")
    axes.set(xlabel="steps", ylabel="loss (nats an answer token)", ylim=(0, None))
    axes.grid(alpha=0.25)
    if axes.lines:
        axes.legend(frameon=False)
    figure.savefig(picture)
