"""How far long work is, on standard error: a bar with the time left on a terminal, plain lines in a log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Task

BRIEF_S = 3.0  # work that may be brief shows nothing until it has taken so long
EVERY_S = 10.0  # between two lines of a log
SPEED_OVER_S = 600.0  # the time left is told by the speed of so long a time: steps may take minutes


@contextmanager
def progress(
    label: str, total: int | None, *, brief: bool = False, shown: bool = True
) -> Iterator[Callable[..., None]]:
    """Show how far some work is; the block calls `advance(steps=1, note=None, total=None)`.

    A terminal shows a bar; a log gets a line every `EVERY_S` seconds and one at the end.
    The note is a short figure such as a loss; `total` may be given with the first step when it is not known before.
    Work that may be `brief` shows nothing unless it takes longer than `BRIEF_S`, nor does work not `shown` at all.
    """
    from rich.console import Console
    from rich.progress import Progress

    from tinyalign_edge.progress_bar import Row

    console = Console(stderr=True)
    on_terminal = console.is_jupyter or (console.is_interactive and console.file.isatty())
    bars = Progress(Row(console), console=console, refresh_per_second=4, speed_estimate_period=SPEED_OVER_S)
    number = bars.add_task(label, total=total, note="")
    task = bars.tasks[0]
    log = None if on_terminal else _Log(task, console.file)
    begun = False

    def begin() -> None:
        nonlocal begun
        if begun or not shown or (brief and (task.elapsed or 0.0) < BRIEF_S):
            return
        begun = True
        if on_terminal:
            bars.start()

    def advance(steps: int = 1, note: str | None = None, total: int | None = None) -> None:
        if total is not None:
            bars.update(number, total=total)
        if note is not None:
            bars.update(number, note=note)
        bars.update(number, advance=steps)
        begin()
        if begun and log:
            log.advance()

    begin()
    try:
        yield advance
    finally:
        if begun and on_terminal:
            bars.stop()
    if begun and log:
        log.end()


class _Log:
    """Lines about a task."""

    def __init__(self, task: Task, file: IO[str]) -> None:
        self.task, self.file = task, file
        self.told_s = task.get_time()

    def advance(self) -> None:
        """Write a line if it is time."""
        now = self.task.get_time()
        if self.task.finished or now - self.told_s < EVERY_S:
            return
        self.told_s = now
        left = self.task.time_remaining
        self._write(f"after {_clock(self.task.elapsed)}", "" if left is None else f"{_clock(left)} left")

    def end(self) -> None:
        """Write the last line."""
        self._write(f"done after {_clock(self.task.elapsed)}")

    def _write(self, *times: str) -> None:
        task = self.task
        count = f"{task.completed:.0f}" if task.total is None else f"{task.completed:.0f} of {task.total:.0f}"
        figures = ", ".join(filter(None, (count, task.fields["note"], *times)))
        print(f"{task.description}: {figures}", file=self.file, flush=True)


def _clock(seconds: float | None) -> timedelta:
    return timedelta(seconds=int(seconds or 0))
