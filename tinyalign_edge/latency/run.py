"""Run the benchmark: every setting in processes of its own, in turn."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tinyalign_edge import errors
from tinyalign_edge.bundle import MANIFEST, open_bundle
from tinyalign_edge.config import from_json, to_json
from tinyalign_edge.errors import InputError, TinyAlignError
from tinyalign_edge.files import file_sha256
from tinyalign_edge.latency.energy import find_meter
from tinyalign_edge.latency.host import commit, host, versions
from tinyalign_edge.latency.measure import Facts, Setting
from tinyalign_edge.latency.rows import DISK, ENERGY, PROCESS, STAGES, Result, Row, disk_rows
from tinyalign_edge.latency.throttle import read_throttle, throttling
from tinyalign_edge.latency.work import HEIGHT, WIDTH, Work, picture
from tinyalign_edge.progress import progress
from tinyalign_edge.runtime.sessions import MAX_THREADS

BLOCKS = 5  # processes of a setting, at most
USUAL_THREADS = (1, 2, 4)
ORDER = (*STAGES, *PROCESS, ENERGY, *DISK)

RowKey = tuple[str, bool | None, int | None, str, int | None]


@dataclass(frozen=True)
class Checked:
    """A setting whose answers are right."""

    setting: Setting
    facts: Facts


def bench(
    folders: Sequence[Path], *, threads: Sequence[int] = (), work: Work | None = None, profile: bool = False
) -> Result:
    """Measure bundles with and without their memories.

    Each combination of bundle, memory and threads is measured by itself, in a process that holds nothing else, since
    sessions in one process disturb each other. All are checked first; then they take turns, `BLOCKS` times, so that
    a machine that becomes slower does so for all of them.

    Args:
        folders: the bundles.
        threads: of one operator; none: 1, 2 and 4 as far as there are cores.
        work: the sizes of what is measured; None: the usual ones.
        profile: also find the most expensive graph nodes, with the most threads.

    Raises:
        InputError: a bundle or an option is wrong, or the work does not fit into a bundle's context.
        BundleError: a bundle is damaged.
        GateError: this machine computes something else than the exporter's; nothing was timed.
    """
    work = work or Work()
    settings, disk = _settings(folders, threads)
    moments = [read_throttle()]
    checked = []
    with progress("Checking answers", len(settings)) as advance:
        for setting in settings:
            checked.append(Checked(setting, from_json(Facts, ask_child("check", setting, work), "facts")))
            advance()
    rows: dict[RowKey, Row] = {}
    shares = divided(work.repetitions, min(BLOCKS, work.repetitions))
    with progress("Timing", sum(_steps(work, share) for share in shares) * len(checked)) as advance:
        for share in shares:
            for one in checked:
                for row in time_once(one, work, share, advance):
                    _merge(rows, row)
                moments.append(read_throttle())
    meter = find_meter()
    return Result(
        host=host() | {"throttling": throttling(moments), "energy_source": meter.source if meter else None},
        commit=commit(),
        versions=versions(),
        measured_at=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        work={**to_json(work), "processes": len(shares), "picture": f"{WIDTH} x {HEIGHT} JPEG, {len(picture())} bytes"},
        bundles=_about(checked),
        rows=(*_sorted(rows.values()), *disk),
        nodes=tuple(_profile(checked, work)) if profile else (),
    )


def time_once(checked: Checked, work: Work, repetitions: int, advance: Callable[[], None]) -> list[Row]:
    """Measure a setting in a new process."""
    given = {"expected": checked.facts.answer, "repetitions": repetitions}
    return [Row.from_json(row) for row in ask_child("measure", checked.setting, work, advance=advance, **given)]


def ask_child(
    do: str, setting: Setting, work: Work, *, advance: Callable[[], None] = lambda: None, **given: Any
) -> Any:
    """Have a new process do something; it ends with this call.

    Raises:
        TinyAlignError: what the process raised, of the same kind; or it died.
    """
    request = {"do": do, "setting": to_json(setting), "work": to_json(work), **given}
    command = [sys.executable, "-m", "tinyalign_edge.latency.child"]
    last: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory(prefix="tinyalign-bench-") as scratch,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child,
    ):
        try:
            assert child.stdin is not None and child.stdout is not None
            with suppress(BrokenPipeError):  # it died at once: its code says so below
                child.stdin.write(json.dumps({**request, "scratch": scratch}))
                child.stdin.close()
            for line in child.stdout:
                last = json.loads(line)
                if "advance" in last:
                    advance()
        except BaseException:
            child.kill()
            raise
    if "error" in last:
        raise getattr(errors, last["kind"])(last["error"])
    if "result" not in last:
        killed = child.returncode < 0
        raise TinyAlignError(
            f"{setting.folder} with {setting.threads} threads: the process ended with code {child.returncode}; "
            f"{'is there enough memory?' if killed else 'it printed why above'}"
        )
    return last["result"]


def divided(count: int, parts: int) -> list[int]:
    """`count` as so many numbers that differ by at most one."""
    return [count // parts + (part < count % parts) for part in range(parts)]


def _settings(folders: Sequence[Path], threads: Sequence[int]) -> tuple[list[Setting], list[Row]]:
    """What is measured, in order, and the bytes of the bundles."""
    counts = tuple(threads) or tuple(count for count in USUAL_THREADS if count <= (os.cpu_count() or 1))
    if len(set(counts)) < len(counts) or not all(1 <= count <= MAX_THREADS for count in counts):
        raise InputError(f"--threads {','.join(map(str, counts))}: must be different numbers from 1 to {MAX_THREADS}")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError("a bundle is named twice; name each once")
    names = Counter(folder.resolve().name for folder in folders)
    settings, disk = [], []
    for folder in folders:
        manifest = open_bundle(folder)
        label = folder.resolve().name
        label = label if names[label] == 1 else folder.as_posix()
        arms = (False,) if manifest.memory.kind == "none" else (True, False)
        settings += [Setting(str(folder), label, memory, count) for memory in arms for count in counts]
        disk += disk_rows(label, folder, manifest)
    return settings, disk


def _steps(work: Work, repetitions: int) -> int:
    return 1 + repetitions * (1 + len(work.contexts))


def _merge(rows: dict[RowKey, Row], row: Row) -> None:
    """Add the samples of `row` to those of the same quantity."""
    before = rows.get(row.key)
    rows[row.key] = row if before is None else replace(before, samples=before.samples + row.samples)


def _sorted(rows: Iterable[Row]) -> list[Row]:
    """Settings in the order in which they came, the stages of each in their own."""
    found = list(rows)
    settings = list(dict.fromkeys((row.bundle, row.memory, row.threads) for row in found))
    return sorted(
        found, key=lambda row: (settings.index((row.bundle, row.memory, row.threads)), ORDER.index(row.stage))
    )


def _about(checked: Sequence[Checked]) -> dict[str, dict[str, Any]]:
    """Of every bundle: its digest, and the tokens that its language model read with all of its memory."""
    about: dict[str, dict[str, Any]] = {}
    for setting, facts in ((one.setting, one.facts) for one in checked):
        tokens = {name: getattr(facts, name) for name in ("visual_tokens", "memory_tokens", "prompt_tokens")}
        digest = file_sha256(Path(setting.folder) / MANIFEST)
        about.setdefault(setting.label, {"manifest_sha256": digest, **tokens})
    return about


def _profile(checked: Sequence[Checked], work: Work) -> list[dict[str, Any]]:
    """The most expensive nodes of every bundle."""
    found = []
    last = {one.setting.label: one for one in sorted(checked, key=lambda o: (o.setting.memory, o.setting.threads))}
    with progress("Profiling", len(last)) as advance:
        for label, one in last.items():
            tokens = one.facts.visual_tokens + one.facts.memory_tokens + one.facts.prompt_tokens
            found += [{"bundle": label, **node} for node in ask_child("profile", one.setting, work, tokens=tokens)]
            advance()
    return found
