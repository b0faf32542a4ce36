"""A result as a picture: the stages as bars, and the time a token takes over its context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinyalign_edge.errors import InputError, MissingExtraError
from tinyalign_edge.folders import cause
from tinyalign_edge.latency.rows import STAGES, Result, Row

MARKERS = "os^Dv<>P"  # of bundles
LINES = ("-", "--")  # with and without memory


def check_plot(path: Path) -> None:
    """Refuse a picture that could not be written, before hours of work.

    Raises:
        MissingExtraError: matplotlib is not installed.
        InputError: `path` is not the name of a PNG in a folder that is there.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtraError("--plot needs matplotlib: pip install 'tinyalign-edge[plot]'") from None
    if path.suffix.lower() != ".png" or not path.parent.is_dir() or path.is_dir():
        raise InputError(f"--plot {path}: name a .png file in a folder that exists")


def draw(result: Result, path: Path) -> None:
    """Write a PNG; times on a logarithmic scale, for stages differ by orders of magnitude.

    Raises:
        InputError: `path` cannot be written.
    """
    from matplotlib.figure import Figure

    timed = [row for row in result.rows if row.unit == "ms"]
    settings = list(dict.fromkeys((row.bundle, row.memory, row.threads) for row in timed))
    stages = [stage for stage in STAGES if any(row.stage == stage for row in timed)]
    height = 1.2 + len(stages) * (0.2 + 0.07 * len(settings))
    figure = Figure(figsize=(11, max(5.0, height)), dpi=110, layout="constrained")
    mosaic = figure.subplot_mosaic(
        [["stages", "contexts"], ["stages", "names"]],
        width_ratios=(3, 2),
        height_ratios=(3, 0.6 + 0.25 * len(settings)),
    )
    colours = {setting: f"C{place % 10}" for place, setting in enumerate(settings)}
    _draw_stages(mosaic["stages"], timed, settings, stages, colours)
    _draw_contexts(mosaic["contexts"], timed, settings, colours)
    handles, names = mosaic["stages"].get_legend_handles_labels()
    mosaic["names"].axis("off")
    mosaic["names"].legend(handles, names, loc="upper left", frameon=False, fontsize="small")
    emulated = ", EMULATED" if result.host.get("emulated") else ""
    figure.suptitle(f"{result.host.get('device') or result.host['cpu']}{emulated}", fontsize="medium")
    try:
        figure.savefig(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({cause(error)}); choose another file") from None


def _draw_stages(axes: Any, rows: list[Row], settings: list[Any], stages: list[str], colours: dict[Any, str]) -> None:
    thickness = 0.8 / len(settings)
    for place, setting in enumerate(settings):
        own = {row.stage: row for row in rows if row.key[:3] == setting}  # of several contexts, the longest
        found = [(stages.index(stage) + place * thickness - 0.4, row) for stage, row in own.items()]
        axes.barh(
            [y + thickness / 2 for y, _ in found],
            [row.median for _, row in found],
            thickness,
            xerr=[[min(row.spread, 0.9 * row.median) for _, row in found], [row.spread for _, row in found]],
            color=colours[setting],
            error_kw={"elinewidth": 0.8},
            label=_name(setting),
        )
    axes.set(xscale="log", xlabel="ms", yticks=range(len(stages)), yticklabels=stages, ylim=(len(stages) - 0.5, -0.5))
    axes.grid(axis="x", alpha=0.25)


def _draw_contexts(axes: Any, rows: list[Row], settings: list[Any], colours: dict[Any, str]) -> None:
    bundles = list(dict.fromkeys(bundle for bundle, _, _ in settings))
    for setting in settings:
        found = sorted((row for row in rows if row.key[:3] == setting and row.context is not None), key=_context)
        axes.errorbar(
            [row.context for row in found],
            [row.median for row in found],
            yerr=[row.spread for row in found],
            color=colours[setting],
            marker=MARKERS[bundles.index(setting[0]) % len(MARKERS)],
            linestyle=LINES[not setting[1]],
        )
    highest = max((row.median for row in rows if row.context is not None), default=1.0)
    axes.set(xlabel="context (tokens)", ylabel="ms a token (per_token)", ylim=(0, 1.3 * highest))
    axes.grid(alpha=0.25)


def _context(row: Row) -> int:
    return row.context or 0


def _name(setting: tuple[str, bool | None, int | None]) -> str:
    bundle, memory, threads = setting
    return f"{bundle}, {'' if memory else 'no '}memory, {threads} thread{'s' * (threads != 1)}"
