"""Is this bundle whole, and does this machine compute what the exporter saw?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tinyalign_edge.bundle import MANIFEST
from tinyalign_edge.errors import GateError
from tinyalign_edge.files import file_sha256
from tinyalign_edge.runtime.model import load
from tinyalign_edge.runtime.probe import MIN_COSINE, run_probe


@dataclass(frozen=True)
class Verified:
    """A bundle that passed. `manifest_sha256` is what others can pass as `--expect-sha256`."""

    manifest_sha256: str
    files: int
    bytes: int
    memory_entries: int
    probe_key_cosine: float | None  # None where the bundle has no retrieval key
    probe_logits_cosine: float


def verify(path: Path, *, expect_sha256: str | None = None) -> Verified:
    """Check hashes, schema and shapes, open every graph, and run the stored probe on this machine.

    Raises:
        InputError: not a bundle.
        BundleError: damaged, hostile, too new, or not the one expected.
        GateError: this machine computes something else than the exporter's.
    """
    with load(path, expect_sha256=expect_sha256) as model:
        if model.memory:
            model.memory.bank.verify()
        probe = run_probe(model)
        entries = len(model.memory) if model.memory else 0
        manifest = model.manifest
    if not probe.passed:
        safe = "on a processor like this one" if manifest.target in ("portable", "avx2") else "with '--target portable'"
        raise GateError(
            f"{path}: this machine does not compute what the exporter saw ({probe}, must be {MIN_COSINE}); the bundle "
            f"was made for the target {manifest.target!r}: export it again {safe}"
        )
    return Verified(
        manifest_sha256=file_sha256(path / MANIFEST),
        files=len(manifest.files),
        bytes=sum(entry.bytes for entry in manifest.files.values()),
        memory_entries=entries,
        probe_key_cosine=probe.key_cosine,
        probe_logits_cosine=probe.logits_cosine,
    )
