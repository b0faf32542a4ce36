"""A stored question with its expected result: does this machine compute what the exporter saw?

The picture is a drawn pattern, the memory is left out (a device changes its own), so the probe depends on the
graphs and the processor alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tinyalign_edge.config import from_json, read_json, write_json
from tinyalign_edge.errors import BundleError
from tinyalign_edge.runtime.model import Model

PROBE_FILE = "probe.json"
QUESTION = "What is in the picture?"
SIDE = 96
TOP = 16
MIN_COSINE = 0.999


@dataclass(frozen=True)
class Probe:
    """The expected key of the pattern (empty where there is none), and the largest next-token logits."""

    question: str
    key: tuple[float, ...]
    token_ids: tuple[int, ...]
    logits: tuple[float, ...]


@dataclass(frozen=True)
class ProbeResult:
    """How close this machine comes: cosine of the key, if the bundle has one, and of the centred logits."""

    key_cosine: float | None
    logits_cosine: float

    @property
    def passed(self) -> bool:
        return all(c >= MIN_COSINE for c in (self.key_cosine, self.logits_cosine) if c is not None)

    def __str__(self) -> str:
        key = "" if self.key_cosine is None else f"of the key {self.key_cosine:.6f}, "
        return f"cosine {key}of the logits {self.logits_cosine:.6f}"


def pattern() -> npt.NDArray[np.uint8]:
    """The probe's picture (96, 96, 3): two gradients and a disc."""
    y, x = np.mgrid[:SIDE, :SIDE]
    disc = ((x - SIDE // 2) ** 2 + (y - SIDE // 2) ** 2 < (SIDE // 3) ** 2) * 255
    return np.stack([x * 255 // SIDE, y * 255 // SIDE, disc], axis=-1).astype(np.uint8)


def make_probe(model: Model) -> Probe:
    """Run the probe and keep what comes out."""
    key, logits = _run(model, QUESTION)
    top = np.argsort(-logits, kind="stable")[:TOP]
    return Probe(QUESTION, tuple(key.tolist()), tuple(top.tolist()), tuple(logits[top].tolist()))


def write_probe(folder: Path, probe: Probe) -> str:
    """Write `probe.json`; returns its name."""
    write_json(folder / PROBE_FILE, probe)
    return PROBE_FILE


def run_probe(model: Model) -> ProbeResult:
    """Run the stored probe of an open bundle on this machine."""
    path = model.folder / model.manifest.probe_file
    probe = from_json(Probe, read_json(path), str(path))
    key, logits = _run(model, probe.question)
    if not 2 <= len(probe.token_ids) == len(probe.logits) or len(probe.key) != model.manifest.vision.key_dim:
        raise BundleError(f"{path}: its lists do not fit each other or the key; export the bundle again")
    if not 0 <= min(probe.token_ids) <= max(probe.token_ids) < model.manifest.decoder.vocab_size:
        raise BundleError(f"{path}: a token id is outside the vocabulary; export the bundle again")
    expected = np.array(probe.logits) - np.mean(probe.logits)
    found = logits[list(probe.token_ids)]
    key_cosine = _cosine(key, np.array(probe.key)) if probe.key else None
    return ProbeResult(key_cosine, _cosine(found - found.mean(), expected))


def _run(model: Model, question: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    image = model.encode(pattern(), memories=())
    logits, _ = model.answer_logits(image, question, question)
    return np.zeros(0, np.float32) if image.key is None else image.key, logits[0]


def _cosine(a: npt.NDArray[np.floating], b: npt.NDArray[np.floating]) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
