"""The row of a terminal that shows how far some work is."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

LABEL_COLUMNS, BAR_COLUMNS = 26, 24  # where there is room
LEAST_BAR_COLUMNS = 4


class Row(ProgressColumn):
    """Label, bar, count, note, time gone, time left; where they do not fit, the bar gives way first, then the label."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console
        self.count, self.gone, self.left = MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()

    def render(self, task: Task) -> Table | Text:
        """The row, as wide as the console at most."""
        figures = self._figures(task)
        label = Text(task.description)
        room = self.console.width - figures.cell_len - 2  # a space on either side of the bar
        if room <= LEAST_BAR_COLUMNS:
            return figures
        bar_columns = min(BAR_COLUMNS, max(LEAST_BAR_COLUMNS, room - label.cell_len))
        label_columns = min(max(LABEL_COLUMNS, label.cell_len), room - bar_columns)
        label.truncate(label_columns, overflow="ellipsis", pad=True)
        row = Table.grid(padding=(0, 1))
        for _ in range(3):
            row.add_column(no_wrap=True)
        row.add_row(label, BarColumn(bar_columns).render(task), figures)
        return row

    def _figures(self, task: Task) -> Text:
        parts = [self.count.render(task), Text(task.fields["note"]), self.gone.render(task)]
        if task.total is not None:
            parts += [Text("left"), self.left.render(task)]
        return Text(" ").join(part for part in parts if part)
