"""When a bank's graph is due, and how a new one takes its place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tinyalign_edge.folders import sync
from tinyalign_edge.memory.graph import write_graph
from tinyalign_edge.memory.manifest import write_manifest
from tinyalign_edge.memory.snapshot import Snapshot
from tinyalign_edge.memory.write import sweep

SWITCH_OVER = 8192  # entries from which a graph is worth its place (`bench/results/recall.json`)


def uncovered(snapshot: Snapshot) -> int:
    """How many entries every search compares one by one."""
    return snapshot.manifest.count - (snapshot.graph.count if snapshot.graph else 0)


def is_due(snapshot: Snapshot) -> bool:
    """Whether so many entries are outside the graph that a new one would make searches faster."""
    return uncovered(snapshot) >= SWITCH_OVER


def is_large(snapshot: Snapshot) -> bool:
    """Whether searches are faster with a graph than without."""
    return snapshot.manifest.count >= SWITCH_OVER


def install(folder: Path, snapshot: Snapshot, index: Any, last_id: int) -> bool:
    """Make `index`, which holds the keys up to `last_id`, the graph of the bank; its writer's lock is held.

    Returns:
        False, with nothing changed, where some of those entries have been forgotten since.
    """
    manifest = snapshot.manifest
    if sum(table.first_after(last_id) for table in snapshot.tables) != len(index):
        return False
    generation = manifest.generation + 1
    graph = write_graph(folder / f"graph-{generation}.usearch", index, last_id)
    sync(folder)
    manifest = replace(manifest, generation=generation, graph=graph)
    write_manifest(folder, manifest)
    sweep(folder, manifest)
    return True
