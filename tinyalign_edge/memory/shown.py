"""Build a bank's graph and show how far it is, for commands that people wait for."""

from __future__ import annotations

from contextlib import suppress

from tinyalign_edge.errors import UnsupportedError
from tinyalign_edge.memory.bank import Bank
from tinyalign_edge.progress import progress


def build_graph(bank: Bank) -> int:
    """`Bank.rebuild` with a bar."""
    with progress("Building the graph", len(bank)) as advance:
        return bank.rebuild(advance)


def build_due_graph(bank: Bank) -> None:
    """Build the graph if it is due; where USearch does not load, the search stays exact."""
    if bank.graph_due:
        with suppress(UnsupportedError):
            build_graph(bank)
