"""What a bank holds, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from tinyalign_edge.memory.record import thumbnail_bytes
from tinyalign_edge.memory.snapshot import Snapshot

COLUMNS = ("keys", "key_scales", "token_ids", "latents", "value_scales", "value_offsets")


@dataclass(frozen=True)
class BankStats:
    """Counts and sizes.

    `entry_bytes` is the mean of key, value and their scales; records and the graph are counted apart. `graph_entries`
    are those that a search finds by the graph, 0 where there is none that can be used; the others are all compared.
    """

    entries: int
    kind: str
    key_dim: int
    generation: int
    segments: int
    journal_entries: int
    entry_bytes: float
    record_bytes: int  # without thumbnails
    thumbnail_bytes: int
    graph_entries: int
    graph_bytes: int
    total_bytes: int


def stats_of(snapshot: Snapshot) -> BankStats:
    """Count what one generation holds."""
    manifest, tables = snapshot.manifest, snapshot.tables
    thumbnails = sum(thumbnail_bytes(table.record(row)) for table in tables for row in range(len(table)))
    files = (*manifest.segments, manifest.journal, manifest.graph)
    return BankStats(
        entries=manifest.count,
        kind=manifest.spec.kind,
        key_dim=manifest.spec.key_dim,
        generation=manifest.generation,
        segments=len(manifest.segments),
        journal_entries=len(snapshot.journal),
        entry_bytes=sum(getattr(table, name).nbytes for table in tables for name in COLUMNS) / max(1, manifest.count),
        record_bytes=sum(table.records.nbytes for table in tables) - thumbnails,
        thumbnail_bytes=thumbnails,
        graph_entries=snapshot.graph.count if snapshot.graph else 0,
        graph_bytes=manifest.graph.bytes if manifest.graph else 0,
        total_bytes=sum(file.bytes for file in files if file),
    )
