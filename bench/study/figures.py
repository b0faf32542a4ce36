"""The figures of `docs/study.md`, drawn from whatever parts there are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tinyalign_edge.bench.study.plan import (
    ARMS,
    DATASETS,
    MAIN,
    MAIN_ARMS,
    SEEDS,
    SHARES,
    SHORT,
    SHORT_SETTINGS,
    Run,
    short,
    short_settings,
)
from tinyalign_edge.bench.study.store import Results
from tinyalign_edge.bench.study.summary import COMPARED, Summary, curve, find

COLOURS = {"baseline": "tab:gray", "memory": "tab:blue", "shuffled": "tab:red", "full_bank": "tab:cyan"}
LABELS = {"baseline": "no memory", "memory": "memory", "shuffled": "other pictures' memory",
          "full_bank": "memory, bank of all data"}  # fmt: skip
BAR = 0.19  # inches, of one bar with its name
LOSSES = (0.25, 0.5, 0.7, 1.0, 1.5, 2.0, 4.0)  # of the baseline's last; what lies above is before memory is read
KINDS = {"score": "open questions", "score_yes_no": "yes/no"}  # where `summary.json` has them


def draw(folder: Path, done: Results, summary: Summary) -> list[Path]:
    """Write the PNGs for which there is something to draw; returns their paths."""
    drawn = []
    for name, make in (("loss", _losses), ("share", _shares), ("ablations", _ablations)):
        figure = Figure(figsize=(10, 4), dpi=100, layout="constrained")
        if make(figure, done, summary):
            drawn.append(folder / f"study-{name}.png")
            figure.savefig(drawn[-1])
    return drawn


def _losses(figure: Figure, done: Results, summary: Summary) -> bool:
    """Held-out loss against steps, a line a seed, as a share of what that seed's baseline ends at: of the same rows."""
    names = [name for name in DATASETS if curve(done, Run(name, "baseline"))]
    for axes, name in zip(_panels(figure, names, sharey=True), names, strict=True):
        for arm in ("baseline", "memory", "shuffled"):
            for seed in SEEDS:
                points, ends = curve(done, Run(name, arm, seed=seed)), curve(done, Run(name, "baseline", seed=seed))
                if points and ends:
                    steps, losses = np.asarray(points[1:]).T
                    axes.plot(steps, losses / ends[-1][1], color=COLOURS[arm], lw=1.3, label=LABELS[arm])
        axes.axhline(1, color="black", lw=0.8, ls=":")
        axes.set(title=name, xlabel="steps", yscale="log", ylim=(LOSSES[0] / 1.1, LOSSES[-1]))
        axes.set_yticks(LOSSES, [f"{tick:g}" for tick in LOSSES])
        axes.minorticks_off()
    _finish(figure, "held-out loss / the baseline's last")
    return bool(names)


def _shares(figure: Figure, done: Results, summary: Summary) -> bool:
    """Score against the share of the training pictures, of open questions above those of yes and no."""
    names = [name for name in DATASETS if summary[name]["score"]["baseline"]["100"]["seeds"]]
    rows = [key for key in KINDS if any(summary[name][key]["baseline"]["100"]["seeds"] for name in names)]
    if rows:
        figure.set_size_inches(10, 3.2 * len(rows) + 0.6)
    for key, axes in zip(
        rows, figure.subplots(len(rows), max(1, len(names)), squeeze=False) if rows else (), strict=True
    ):
        for one, name in zip(axes, names, strict=True):
            part = summary[name]
            if not part[key]["baseline"]["100"]["seeds"] or (key == "score" and part[key] == part["score_yes_no"]):
                one.set_axis_off()  # has no such questions
                continue
            _share(one, part[key])
            one.set_title(f"{name}, {KINDS[key]}", fontsize="medium")
            one.set(xlabel="training pictures, %", xticks=SHARES)
    _finish(figure, "exact match, %")
    return bool(names)


def _share(axes: Axes, score: Summary) -> None:
    for arm in ("baseline", "memory", "full_bank"):
        known = [(share, score[arm][str(share)]) for share in SHARES if score[arm].get(str(share), {}).get("seeds")]
        if known:
            shares, found = zip(*known, strict=True)
            means = [100 * figures["mean"] for figures in found]
            spread = [100 * (figures["std"] or 0) for figures in found]
            style = "--" if arm == "full_bank" else "-"
            axes.errorbar(shares, means, spread, color=COLOURS[arm], label=LABELS[arm], capsize=3, ls=style, marker=".")
    copied, whole = score["copy_neighbour"]["mean"], score["baseline"]["100"]["mean"]
    if copied is not None:
        axes.axhline(100 * copied, color="tab:green", lw=0.9, ls=":", label="copy the nearest answer (all data)")
    if whole is not None:
        axes.axhline(100 * whole, color="black", lw=0.8, ls=":", label="no memory (all data)")


def _ablations(figure: Figure, done: Results, summary: Summary) -> bool:
    """Test loss of every ablation, beside baseline and memory."""
    names = [name for name in MAIN if len(_ablated(done, name)) > 2]
    if names:
        figure.set_size_inches(10, 1.2 + BAR * max(len(_ablated(done, name)) for name in names))
    for axes, name in zip(_panels(figure, names), names, strict=True):
        found = _ablated(done, name)
        places = range(len(found))
        colours = [COLOURS.get(arm.removesuffix(SHORT), "tab:olive") for arm, _ in found]
        axes.barh(places, [loss for _, loss in found], color=colours)
        axes.set_yticks(places, [arm for arm, _ in found])
        axes.invert_yaxis()
        own = f": {short_settings(name)}" if name in SHORT_SETTINGS else ""
        axes.set(title=f"{name}{own}", xlabel="loss of the test questions, nats a token")
    return bool(names)


def _ablated(done: Results, name: str) -> list[tuple[str, float]]:
    others = (arm for arm in ARMS if not ARMS[arm].whole and arm.removesuffix(SHORT) not in MAIN_ARMS)
    shown = (*(short(name, arm) for arm in COMPARED), *others)
    losses = [(arm, find(done, Run(name, arm), "scores", "loss")) for arm in shown]
    return sorted([(arm, loss) for arm, loss in losses if loss is not None], key=lambda pair: pair[1])


def _panels(figure: Figure, names: Sequence[str], *, sharey: bool = False) -> list[Axes]:
    return list(np.atleast_1d(figure.subplots(1, len(names), sharey=sharey))) if names else []


def _finish(figure: Figure, label: str) -> None:
    shown: dict[str, Any] = {}
    for axes in figure.axes:
        axes.grid(alpha=0.25)
        for handle, text in zip(*axes.get_legend_handles_labels(), strict=True):
            shown.setdefault(text, handle)
    if figure.axes:
        figure.axes[0].set_ylabel(label)
        figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=min(3, len(shown)), frameon=False)
