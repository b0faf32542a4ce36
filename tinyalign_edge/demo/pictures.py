"""Two pictures of a demo's outcome: answers on a contact sheet, and losses and accuracies as charts."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from tinyalign_edge.evaluate import normalize

RIGHT, WRONG, QUIET = "#1a7f37", "#cf222e", "#57606a"
ARM_COLOURS = ("#8c959f", "#0969da", "#bf5b04", "#8250df", "#1a7f37", "#cf222e")
COLUMNS = 5


@dataclass(frozen=True)
class SheetRow:
    """One picture with its question, the model's answer, the reference, and the captions it remembered."""

    image: Path
    question: str
    answer: str
    reference: str
    memories: tuple[str, ...] = ()

    @property
    def right(self) -> bool:
        """Whether the answer counts as right in the evaluation too."""
        return normalize(self.answer) == normalize(self.reference)


def contact_sheet(path: Path, rows: Sequence[SheetRow]) -> None:
    """Write a PNG of `rows`, five a line: framed green where the answer is right, red where it is wrong."""
    lines = -(-len(rows) // COLUMNS)
    figure = Figure(figsize=(2.9 * COLUMNS, 4.3 * lines), dpi=110, facecolor="white")
    for number, row in enumerate(rows):
        line, column = divmod(number, COLUMNS)
        left, bottom = (column + 0.06) / COLUMNS, 1 - (line + 0.575) / lines
        axes = figure.add_axes((left, bottom, 0.88 / COLUMNS, 0.55 / lines))
        _cell(axes, row)
    _save(figure, path)


def _cell(axes: Axes, row: SheetRow) -> None:
    """The picture in its frame, and under it what was asked, answered and remembered."""
    colour = RIGHT if row.right else WRONG
    with Image.open(row.image) as image:
        axes.imshow(image.convert("RGB"), interpolation="lanczos")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=3)
    verdict = f"✓ {row.answer}" if row.right else f"✗ {row.answer or '(nothing)'} (is: {row.reference})"
    memories = [textwrap.fill(f"· {text}", 46, subsequent_indent="  ", max_lines=2) for text in row.memories[:4]]
    under: dict[str, Any] = {"transform": axes.transAxes, "va": "top", "ha": "left"}
    axes.text(0, -0.04, textwrap.fill(row.question, 34, max_lines=2), fontsize=9.5, **under)
    axes.text(0, -0.20, verdict, fontsize=9.5, weight="bold", color=colour, **under)
    axes.text(0, -0.31, "\n".join(memories), fontsize=7, color=QUIET, linespacing=1.15, **under)


def training_curves(
    path: Path,
    curves: Mapping[str, Sequence[tuple[int, float]]],
    *,
    accuracies: Mapping[str, float] | None = None,
) -> None:
    """Write a PNG of held-out loss against steps, a line an arm, beside bars of accuracy (0 to 1) if given.

    `curves` maps an arm's name to its (step, loss) points; an arm has one colour in both charts.
    """
    figure = Figure(figsize=(11.5 if accuracies else 7, 4.2), dpi=130, layout="constrained", facecolor="white")
    names = [*curves, *(name for name in accuracies or {} if name not in curves)]
    colours = {name: ARM_COLOURS[i % len(ARM_COLOURS)] for i, name in enumerate(names)}
    charts = figure.subplots(1, 2, width_ratios=(3, 2)) if accuracies else [figure.subplots()]
    _lines(charts[0], curves, colours)
    if accuracies:
        _bars(charts[1], accuracies, colours)
    _save(figure, path)


def _lines(axes: Axes, curves: Mapping[str, Sequence[tuple[int, float]]], colours: Mapping[str, str]) -> None:
    for name, points in curves.items():
        steps, losses = zip(*points, strict=True)
        axes.plot(steps, losses, label=name, color=colours[name], marker="o", markersize=4, linewidth=2)
    axes.set(xlabel="training steps", ylabel="held-out loss (nats per answer token)", ylim=(0, None))
    axes.set_title("Loss on held-out pictures", loc="left", weight="bold")
    axes.legend(frameon=False)
    _quiet_frame(axes)


def _bars(axes: Axes, accuracies: Mapping[str, float], colours: Mapping[str, str]) -> None:
    names = [*accuracies][::-1]  # barh draws upwards
    bars = axes.barh(names, [100 * accuracies[name] for name in names], color=[colours[name] for name in names])
    axes.bar_label(bars, fmt="%.1f %%", padding=4)
    axes.set(xlabel="exact match (%)", xlim=(0, 112), xticks=range(0, 101, 20))
    axes.set_title("Accuracy on held-out pictures", loc="left", weight="bold")
    _quiet_frame(axes)


def _quiet_frame(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure).print_png(str(path))
