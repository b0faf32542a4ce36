"""Does an engine compute the model? Its next-token distributions, or features, beside torch's in float32.

Needs numpy only, since it runs in every engine's environment.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tinyalign_edge.export.distances import divergences, log_softmax

Floats = NDArray[np.float32]

REFERENCE = "reference.npy"
PROMPT_TOKENS = 32
STEPS = 16

# What is refused is an engine that computes another model: distributions that have nothing to do with each other are
# about 9 nats apart (the variance of the random models' logits), unrelated features have cosines near 0. How much is
# lost to rounding is reported, not judged: 4 bits lose much of a deep model whose weights are random.
MAX_KL = {"fp32": 1e-4, "bf16": 0.1, "int8": 0.1, "q8_0": 0.1, "int4": 1.5, "q4_0": 1.5}
MIN_COSINE = {"fp32": 0.9999, "bf16": 0.99, "int8": 0.97}


def check_ids(vocab_size: int) -> NDArray[np.int64]:
    """The fixed text of the check: (PROMPT_TOKENS + STEPS,) token ids."""
    return np.random.default_rng(0).integers(3, vocab_size, PROMPT_TOKENS + STEPS)


def checked_positions() -> slice:
    """Positions whose logits are compared: the prompt's last, then one a step."""
    return slice(PROMPT_TOKENS - 1, PROMPT_TOKENS + STEPS)


def compare_logits(found: Floats, expected: Floats) -> dict[str, float]:
    """Mean Kullback-Leibler divergence in nats of `found` (T, V) from `expected`, and the share of equal argmax."""
    p, q = log_softmax(expected), log_softmax(found)
    return {"kl": float(divergences(p, q).mean()), "top1": float((p.argmax(-1) == q.argmax(-1)).mean())}


def compare_features(found: Floats, expected: Floats) -> dict[str, float]:
    """Mean cosine of the features (..., C) of each place."""
    lengths = np.linalg.norm(found, axis=-1) * np.linalg.norm(expected, axis=-1)
    return {"cosine": float(((found * expected).sum(axis=-1) / lengths).mean())}


def passes(precision: str, figures: dict[str, float]) -> bool:
    """Whether figures of `compare_logits` or `compare_features` are those of the same model."""
    if "cosine" in figures:
        return figures["cosine"] >= MIN_COSINE[precision]
    return figures["kl"] <= MAX_KL[precision]


def fixed_image(height: int, width: int) -> Floats:
    """The one picture that encoders are given: (1, 3, height, width)."""
    return np.random.default_rng(0).standard_normal((1, 3, height, width), np.float32)


def folder_bytes(folder: Path, *suffixes: str) -> int:
    """Size of the files in `folder` whose names end so."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.name.endswith(suffixes))
