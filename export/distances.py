"""How far apart two models' outputs are: distributions in nats, vectors by their angle."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]


def log_softmax(logits: Floats) -> Floats:
    """Log probabilities of logits (A, V), in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def divergences(log_p: Floats, log_q: Floats) -> Floats:
    """KL(p || q) of each row (A,), in nats; the arguments are log probabilities (A, V)."""
    return np.asarray((np.exp(log_p) * (log_p - log_q)).sum(axis=1))


def row_cosines(a: Floats, b: Floats) -> Floats:
    """Cosine of each row of `a` with that of `b`: (N, D) twice to (N,); 1 where both are zero, as they are equal."""
    with np.errstate(invalid="ignore"):  # 0 / 0, where at least one is zero
        cosines = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return np.where(a.any(axis=1) | b.any(axis=1), cosines, 1.0)
