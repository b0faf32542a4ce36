"""The recorded comparison as a table for a terminal, or as Markdown for the README.

python -m tinyalign_edge.bench.peers.table [--markdown] [FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyalign_edge.bench.peers.plan import ENCODER_ENGINES, GENAI, LANGUAGE_ENGINES, OURS
from tinyalign_edge.bench.record import RESULTS
from tinyalign_edge.config import read_json

COLUMNS = (("prefill", 64, 0), ("prefill", 256, 0), ("prefill", 768, 0), ("decode", 64, 256), ("decode", 64, 1024))
MODEL, THREADS = "smollm2-135m", 2  # the shape for which there are goals
ENCODER = "siglip-b16-224"


@dataclass(frozen=True)
class Goal:
    """A ratio of ours (int8) to another engine that is aimed for."""

    what: str
    phase: tuple[str, int, int]
    model: str
    engine: str
    precision: str
    least: float


GOALS = (
    Goal("prefill 256", COLUMNS[1], MODEL, GENAI, "int8", 5.0),
    Goal("prefill 256", COLUMNS[1], MODEL, "llama.cpp", "q8_0", 5.0),
    Goal("decode at 256", COLUMNS[3], MODEL, GENAI, "int8", 1.6),
    Goal("decode at 256", COLUMNS[3], MODEL, "llama.cpp", "q8_0", 2.0),
    Goal("encode", ("encode", 1, 0), ENCODER, "optimum", "fp32", 4.0),
)


def main() -> None:
    """Print the tables of a result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=RESULTS / "peers.json")
    parser.add_argument("--markdown", action="store_true")
    given = parser.parse_args()
    print_tables(given.file, markdown=given.markdown)


def print_tables(path: Path, *, markdown: bool = False) -> None:
    """Print one table a model and number of threads, then the ratios."""
    result = read_json(path)
    for title, table in tables(result):
        print(f"\n{'**' if markdown else ''}{title}{'**' if markdown else ''}\n")
        print(_markdown(table) if markdown else _plain(table))


def tables(result: dict[str, Any]) -> Iterator[tuple[str, list[list[str]]]]:
    """Title and lines of each table, the first line being its head."""
    rows = result["rows"]
    parts = dict.fromkeys((row["model"], row["threads"]) for row in rows)
    for model, threads in parts:
        here = [row for row in rows if (row["model"], row["threads"]) == (model, threads)]
        unit = "images a second" if here[0]["phase"] == "encode" else "tokens a second"
        yield f"{model}, {threads} thread{'s'[: threads - 1]}: {unit}, median (half the spread)", _speeds(here)
    if result["passes"]:
        yield "One pass over a few tokens with logits of all, context 256: ms", _passes(result["passes"])
    yield "Ratios, tinyalign-edge int8 to the other", _ratios(rows)


def _speeds(rows: list[dict[str, Any]]) -> list[list[str]]:
    encode = rows[0]["phase"] == "encode"
    columns = (("encode", 1, 0),) if encode else COLUMNS
    heads = ["encode"] if encode else ["pre 64", "pre 256", "pre 768", "dec @256", "dec @1024"]
    lines = [["engine", *heads, "MB", "RSS MB"]]
    for engine in ENCODER_ENGINES if encode else LANGUAGE_ENGINES:
        mine = [row for row in rows if (row["engine"], row["precision"]) == (engine.name, engine.precision)]
        if mine:
            found = {(row["phase"], row["tokens"], row["context"]): row for row in mine}
            cells = [_speed(found.get(column)) for column in columns]
            memory = mine[0]["peak_rss_bytes"]
            sizes = [f"{mine[0]['bytes'] / 1e6:.0f}", f"{memory / 1e6:.0f}" if memory else "–"]
            lines.append([engine.label, *cells, *sizes])
    return lines


def _speed(row: dict[str, Any] | None) -> str:
    """Median and half the distance between the quartiles, in per cent."""
    if row is None:
        return "–"
    low, high = np.percentile(row["samples"], [25, 75])
    median = row["median_per_s"]
    speed = f"{median:.{0 if median >= 100 else 1}f}"
    if len(row["samples"]) == 1:
        return f"{speed} once"
    return f"{speed} ±{50 * (high - low) / median:.0f}%"


def _passes(rows: list[dict[str, Any]]) -> list[list[str]]:
    counts = sorted({row["tokens"] for row in rows})
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        label = f"{row['engine']} {row['precision']}, {row['model']}, {row['threads']} thr."
        found.setdefault(label, {})[row["tokens"]] = row["median_ms"]
    lines = [[label, *(f"{times[n]:.1f}" if n in times else "–" for n in counts)] for label, times in found.items()]
    return [["tokens", *map(str, counts)], *lines]


def _ratios(rows: list[dict[str, Any]]) -> list[list[str]]:
    lines = [["what", "model, 2 threads", "other", "ratio", "goal", "reached"]]
    for goal in GOALS:
        ours, other = (
            _median(rows, goal, *who) for who in ((OURS, "int8"), (goal.engine, goal.precision))
        )  # tokens or images a second
        ratio = f"{ours / other:.2f}" if ours and other else "–"
        reached = "–" if ratio == "–" else "yes" if float(ratio) >= goal.least else "no"
        lines.append([goal.what, goal.model, f"{goal.engine} {goal.precision}", ratio, f"≥ {goal.least:g}", reached])
    return lines


def _median(rows: list[dict[str, Any]], goal: Goal, engine: str, precision: str) -> float | None:
    wanted = (engine, precision, goal.model, THREADS, *goal.phase)
    keys = ("engine", "precision", "model", "threads", "phase", "tokens", "context")
    return next((row["median_per_s"] for row in rows if tuple(row[key] for key in keys) == wanted), None)


def _plain(table: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in table)
    )


def _markdown(table: list[list[str]]) -> str:
    lines = [f"| {' | '.join(line)} |" for line in table]
    return "\n".join([lines[0], f"|---|{'---:|' * (len(table[0]) - 1)}", *lines[1:]])


if __name__ == "__main__":
    main()
