"""Results and comparisons as text: for the terminal, Markdown, CSV, JSON and JSON lines."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tinyalign_edge.latency.compare import RULE, Comparison
from tinyalign_edge.latency.rows import DISK, Result, Row, Unit

Format = Literal["table", "md", "csv", "json", "jsonl"]
FORMATS: tuple[Format, ...] = ("table", "md", "csv", "json", "jsonl")
WIDTH = 96  # characters of a line at most
NAMES: dict[Unit, str] = {"ms": "ms", "bytes": "bytes", "mj": "mJ"}
NAME = 60  # characters of operator and name of a node that are shown


@dataclass(frozen=True)
class Sheet:
    """A table: the first column is text, the others are figures."""

    title: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


def result_text(result: Result, form: Format) -> str:
    """A result in one of `FORMATS`."""
    rows = [row.to_json() for row in result.rows]
    if form == "csv":
        return _csv(result.rows)
    return _written(form, result.to_json(), [result.head(), *rows], result_head(result), result_sheets(result))


def comparison_text(comparison: Comparison, form: Format) -> str:
    """A comparison in one of `FORMATS`."""
    changes = [change.to_json() for change in comparison.changes]
    whole = {"rule": RULE, "notes": list(comparison.notes), "changes": changes}
    if form == "csv":
        keys = list(dict.fromkeys(key for change in changes for key in change))
        return _table_csv(keys, ([change.get(key) for key in keys] for change in changes))
    notes = [RULE, *(f"they differ in {note}" for note in comparison.notes)]
    return _written(form, whole, [{**whole, "changes": len(changes)}, *changes], notes, comparison_sheets(comparison))


def result_head(result: Result) -> list[str]:
    """A few lines on what was measured where."""
    host, work = result.host, result.work
    kinds = ", ".join(f"{kind['count']} {kind['kind']}" for kind in host["core_kinds"]) or f"{host['cores']} cores"
    throttled = {True: "throttled", False: "not throttled", None: "throttling unknown"}[host["throttling"]["seen"]]
    heat = host["throttling"]["temperature_c"]
    heated = f", {heat['first']:.0f} to {heat['highest']:.0f} °C" if heat else ""
    emulated = ["EMULATED: these times say nothing of a real processor"] if host["emulated"] else []
    named = f"{host['device']}, " if host["device"] else ""
    return [
        *emulated,
        f"{named}{host['cpu']}, {host['machine']}, {kinds}; {', '.join(host['features'])}",
        f"governor {host['governor'] or 'unknown'}, {throttled}{heated}; "
        f"tinyalign-edge {result.versions['tinyalign-edge']} ({result.commit}), "
        f"onnxruntime {result.versions['onnxruntime']}",
        f"median ± half the distance of the quartiles, {work['repetitions']} repetitions in {work['processes']} "
        f"processes; picture: {work['picture']}; answers of {work['new_tokens']} tokens",
    ]


def result_sheets(result: Result) -> list[Sheet]:
    """A sheet for each bundle with and without memory, one for the disk, and one for the nodes."""
    sheets = []
    for bundle, memory in dict.fromkeys((row.bundle, row.memory) for row in result.rows if row.memory is not None):
        rows = [row for row in result.rows if (row.bundle, row.memory) == (bundle, memory)]
        about, threads = result.bundles[bundle], sorted({row.threads for row in rows if row.threads is not None})
        memory_tokens = f" + {about['memory_tokens']} memory" if memory else ""
        tokens = f"{about['visual_tokens']} visual{memory_tokens} + {about['prompt_tokens']} prompt tokens"
        found = {(row.threads, _stage(row)): _figure(row) for row in rows}
        lines = [(s, *(found.get((n, s), "") for n in threads)) for s in dict.fromkeys(_stage(row) for row in rows)]
        columns = ("", *map(_threads, threads))
        sheets.append(Sheet(f"{bundle}, {'with' if memory else 'without'} memory: {tokens}", columns, tuple(lines)))
    disk = {(row.bundle, row.stage): row for row in result.rows if row.stage in DISK}
    lines = [(name, *(_amount(disk[name, part].median, "bytes") for part in DISK)) for name in result.bundles]
    sheets.append(Sheet("on disk", ("", *(part.removeprefix("disk_") for part in DISK)), tuple(lines)))
    return sheets + _node_sheets(result.nodes)


def comparison_sheets(comparison: Comparison) -> list[Sheet]:
    """A sheet for each bundle, memory and number of threads."""
    groups: dict[str, list[tuple[str, ...]]] = {}
    for change in comparison.changes:
        parts = [change.bundle]
        if change.threads is not None:
            parts += ["with memory" if change.memory else "without memory", _threads(change.threads)]
        figures = _amount(change.a, change.unit), _amount(change.b, change.unit)
        stage = change.stage if change.context is None else f"{change.stage} at {change.context}"
        ratio = "–" if change.ratio is None else f"{change.ratio:.3f}"
        groups.setdefault(", ".join(parts), []).append((stage, *figures, ratio, change.verdict))
    return [Sheet(title, ("", "A", "B", "B / A", ""), tuple(lines)) for title, lines in groups.items()]


def _node_sheets(nodes: Sequence[dict[str, Any]]) -> list[Sheet]:
    groups: dict[str, list[tuple[str, ...]]] = {}
    for node in nodes:
        title = f"{node['bundle']}, most expensive nodes of {node['stage']}, {_threads(node['threads'])}"
        operator, _, name = node["name"].partition(" ")
        shown = f"{operator} {name if len(name) <= NAME else '…' + name[1 - NAME :]}"
        groups.setdefault(title, []).append((shown, f"{node['ms']:.3f}", f"{node['share']:.1%}"))
    return [Sheet(title, ("", "ms", "share"), tuple(lines)) for title, lines in groups.items()]


def _written(
    form: Format, whole: dict[str, Any], lines: Iterable[dict[str, Any]], head: Sequence[str], sheets: Sequence[Sheet]
) -> str:
    writers: dict[Format, Callable[[], str]] = {
        "table": lambda: _terminal(head, sheets),
        "md": lambda: markdown(head, sheets),
        "json": lambda: json.dumps(whole, indent=1, ensure_ascii=False),
        "jsonl": lambda: "\n".join(json.dumps(line, ensure_ascii=False) for line in lines),
    }
    return writers[form]()


def markdown(head: Sequence[str], sheets: Sequence[Sheet]) -> str:
    """Lines, then tables with their titles."""
    text = [f"- {line}" for line in head]
    for sheet in sheets:
        text += ["", f"**{sheet.title}**", "", f"| {' | '.join(sheet.columns)} |"]
        text += [f"|---|{'---:|' * (len(sheet.columns) - 1)}"]
        cells = ([cell.replace("|", "\\|") for cell in line] for line in sheet.lines)
        text += [f"| {' | '.join(line)} |" for line in cells]
    return "\n".join(text)


def _terminal(head: Sequence[str], sheets: Sequence[Sheet]) -> str:
    file = io.StringIO()
    console = Console(file=file, width=min(WIDTH, Console().width), highlight=False)
    for line in head:
        console.print(Text(line))
    for sheet in sheets:
        console.print()
        console.print(Text(sheet.title, style="bold"))
        table = Table(box=None, pad_edge=False)
        for place, column in enumerate(sheet.columns):
            table.add_column(Text(column), justify="right" if place else "left", overflow="fold")
        for cells in sheet.lines:
            table.add_row(*map(Text, cells))
        console.print(table)
    return file.getvalue().rstrip("\n")


def _csv(rows: Sequence[Row]) -> str:
    columns = ("bundle", "memory", "threads", "stage", "context", "unit", "median", "spread", "samples")
    return _table_csv(
        columns,
        (
            (
                r.bundle,
                r.memory,
                r.threads,
                r.stage,
                r.context,
                r.unit,
                r.median,
                r.spread,
                " ".join(map(str, r.samples)),
            )
            for r in rows
        ),
    )


def _table_csv(columns: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(["" if cell is None else cell for cell in line] for line in lines)
    return file.getvalue().rstrip("\n")


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def _stage(row: Row) -> str:
    return row.stage if row.context is None else f"{row.stage} at {row.context}"


def _figure(row: Row) -> str:
    if row.unit == "bytes":
        return _amount(row.median, row.unit)
    digits = _digits(row.median)
    return f"{row.median:.{digits}f} ± {row.spread:.{digits}f} {NAMES[row.unit]}"


def _amount(value: float, unit: Unit) -> str:
    if unit == "bytes":
        return f"{value / 1e6:.1f} MB" if value >= 1_000_000 else f"{value / 1e3:.1f} kB"
    return f"{value:.{_digits(value)}f} {NAMES[unit]}"


def _digits(value: float) -> int:
    """After the point, so that four digits or so are shown."""
    return 1 if value >= 100 else 2 if value >= 10 else 3
