"""What was measured, row by row, and its JSON."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tinyalign_edge.bundle import MANIFEST, MEMORY_DIR, Manifest
from tinyalign_edge.config import read_json
from tinyalign_edge.errors import InputError

Unit = Literal["ms", "bytes", "mj"]
UNITS: tuple[Unit, ...] = ("ms", "bytes", "mj")

STAGES = (
    "load", "verify", "decode_image", "preprocess", "encode", "retrieve", "prefill", "first_token", "per_token",
    "second_question_first_token", "memory_add", "total",
)  # fmt: skip
PROCESS = ("process_at_import", "process_at_load", "process_peak")
DISK = ("disk_vision", "disk_language", "disk_memory", "disk_other", "disk_total")
ENERGY = "energy"


@dataclass(frozen=True)
class Row:
    """Samples of one quantity.

    Attributes:
        bundle: its label.
        memory: with or without; None where that does not matter.
        threads: of one operator; None where they do not matter.
        stage: one of `STAGES`, `PROCESS`, `DISK` or `ENERGY`.
        unit: of the samples.
        samples: in the order in which they were taken; at least one.
        context: of "per_token", the positions before the first of the measured tokens.
    """

    bundle: str
    memory: bool | None
    threads: int | None
    stage: str
    unit: Unit
    samples: tuple[float, ...]
    context: int | None = None

    @property
    def key(self) -> tuple[str, bool | None, int | None, str, int | None]:
        """What is measured."""
        return self.bundle, self.memory, self.threads, self.stage, self.context

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles; 0 for a single sample."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return (high - low) / 2

    def to_json(self) -> dict[str, Any]:
        """As `rows` of a result have it: the unit stands in the keys."""
        named = {"bundle": self.bundle, "memory": self.memory, "threads": self.threads, "stage": self.stage}
        named |= {} if self.context is None else {"context": self.context}
        whole = round if self.unit == "bytes" else float
        numbers = {
            "median": whole(self.median),
            "spread": whole(self.spread),
            "samples": list(map(whole, self.samples)),
        }
        return {**named, **{f"{name}_{self.unit}": value for name, value in numbers.items()}}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Row:
        """The inverse; KeyError, TypeError or ValueError where it is something else."""
        (unit,) = (unit for unit in UNITS if f"samples_{unit}" in data)
        samples = tuple(float(sample) for sample in data[f"samples_{unit}"])
        if not samples:
            raise ValueError("a row without samples")
        return cls(data["bundle"], data["memory"], data["threads"], data["stage"], unit, samples, data.get("context"))


@dataclass(frozen=True)
class Result:
    """A run of the benchmark.

    Attributes:
        host: as `latency.host.host` gives it, with `throttling`.
        commit: of this package.
        versions: of packages.
        measured_at: ISO 8601, UTC.
        work: what was asked for: tokens, repetitions, the picture.
        bundles: by label: digest of the manifest, and what the work became in this bundle.
        rows: of all bundles.
        nodes: with `--profile`, the most expensive graph nodes.
    """

    host: dict[str, Any]
    commit: str
    versions: dict[str, str]
    measured_at: str
    work: dict[str, Any]
    bundles: dict[str, dict[str, Any]]
    rows: tuple[Row, ...]
    nodes: tuple[dict[str, Any], ...] = field(default=())

    def head(self) -> dict[str, Any]:
        """All but the rows, as plain values."""
        about = {"host": self.host, "commit": self.commit, "versions": self.versions, "measured_at": self.measured_at}
        about |= {"work": self.work, "bundles": self.bundles}
        return about | ({"nodes": list(self.nodes)} if self.nodes else {})

    def to_json(self) -> dict[str, Any]:
        """What `--output json` prints."""
        return {**self.head(), "rows": [row.to_json() for row in self.rows]}


def read_result(path: Path) -> Result:
    """A stored result.

    Raises:
        InputError: the file cannot be read, or is something else.
    """
    data = read_json(path)
    try:
        rows = tuple(Row.from_json(row) for row in data["rows"])
        head = {name: data[name] for name in ("host", "commit", "versions", "measured_at", "work", "bundles")}
        if not rows or not all(isinstance(head[name], dict) for name in ("host", "versions", "work", "bundles")):
            raise ValueError("empty")
        return Result(**head, rows=rows, nodes=tuple(data.get("nodes", ())))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(f"{path}: not what 'tinyalign-edge bench --output json' prints; make it with that") from None


def disk_rows(label: str, folder: Path, manifest: Manifest) -> list[Row]:
    """Bytes of a bundle's parts on disk; a memory counts with its graphs."""
    decoder, memory = manifest.decoder, manifest.memory
    graphs = [name for name in (memory.file, memory.value_file, memory.copy_file) if name]
    parts = {
        "disk_vision": [manifest.vision.file],
        "disk_language": [decoder.file, decoder.embed_file, *decoder.data_files],
        "disk_memory": graphs,
    }
    sizes = {part: sum(manifest.files[name].bytes for name in set(names)) for part, names in parts.items()}
    every = sum(entry.bytes for entry in manifest.files.values()) + (folder / MANIFEST).stat().st_size
    sizes["disk_other"] = every - sum(sizes.values())
    bank = (file for file in (folder / MEMORY_DIR).rglob("*") if file.is_file())
    sizes["disk_memory"] += sum(file.stat().st_size for file in bank)
    sizes["disk_total"] = sum(sizes.values())
    return [Row(label, None, None, part, "bytes", (sizes[part],)) for part in DISK]
