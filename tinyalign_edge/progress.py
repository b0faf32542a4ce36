"""Progress bars with the time left, on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(label: str, total: int | None, *, least: int = 0) -> Iterator[Callable[..., None]]:
    """Show one bar; the block calls `advance(steps=1, note=None, total=None)`.

    The note is a short figure such as a loss; `total` may be given with the first step when it is not known before.
    Work of fewer than `least` steps is done before a bar could be read, and shows none.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<26}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    shown = total is None or total >= least
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4, disable=not shown) as bars:
        task = bars.add_task(label, total=total, note="")

        def advance(steps: int = 1, note: str | None = None, total: int | None = None) -> None:
            if total is not None:
                bars.update(task, total=total)
            if note is not None:
                bars.update(task, note=note)
            bars.update(task, advance=steps)

        yield advance
