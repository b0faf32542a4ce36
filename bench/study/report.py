"""Gathers the parts in `bench/results/study/` and makes tables and figures of `docs/study.md` anew.

The text of `docs/study.md` is written by hand; what stands between `<!-- NAME -->` and `<!-- /NAME -->` is replaced.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tinyalign_edge.bench.record import RESULTS
from tinyalign_edge.bench.study.figures import draw
from tinyalign_edge.bench.study.plan import DATASETS, plan
from tinyalign_edge.bench.study.store import Results
from tinyalign_edge.bench.study.summary import Summary, missing, summarise
from tinyalign_edge.bench.study.tables import TABLES
from tinyalign_edge.config import write_json
from tinyalign_edge.errors import InputError
from tinyalign_edge.export.components import tool_versions
from tinyalign_edge.latency.host import host

COMMAND = "python -m tinyalign_edge.bench.study"
REPORT = "study.md"


@dataclass(frozen=True)
class Places:
    """Where the report goes."""

    results: Path = RESULTS / "study"
    docs: Path = RESULTS.parents[1] / "docs"


def write_report(done: Results, places: Places | None = None) -> Summary:
    """Write results, figures and tables from whatever parts there are; returns what `summary.json` holds."""
    places = places or Places()
    places.results.mkdir(parents=True, exist_ok=True)
    summary = summarise(done)
    about = {"command": COMMAND, "host": host(), "versions": tool_versions()}
    for name in DATASETS:
        parts = {part: result for part, result in done.items() if part.split(".")[0] == name}
        if parts:
            write_json(places.results / f"{name}.json", {**about, "parts": parts})
    write_json(places.results / "summary.json", {**summary, "missing_parts": missing(done, plan())})
    draw(places.docs, done, summary)
    report = places.docs / REPORT
    report.write_text(filled(report.read_text("utf-8"), done, summary), "utf-8")
    return summary


def filled(text: str, done: Results, summary: Summary) -> str:
    """The report with its tables made anew.

    Raises:
        InputError: it lacks the place of a table.
    """
    for name, make in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise InputError(f"{REPORT}: has no '{begin.strip()}' with '{end}' for the table of that name")
        text = f"{before}{begin}\n{make(done, summary)}\n\n{end}{after}"
    return text
