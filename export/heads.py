"""Padding of attention heads to a size that the fused operator takes; the model computes the same."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tinyalign_edge.export.families import Architecture

Floats = NDArray[np.float32]


def pad_heads(arch: Architecture, rows: Floats) -> Floats:
    """Append zeros to the three parts of every head: (heads * head_dim, ...) to (heads * padded head_dim, ...).

    A head is two halves that turn into each other with the position, and the rest that stays.
    """
    turning, padded = arch.rotary_half, arch.padded_rotary_half
    heads = rows.reshape(-1, arch.head_dim, *rows.shape[1:])
    parts = np.split(heads, [turning, 2 * turning], axis=1)
    sizes = (padded, padded, arch.padded_head_dim - 2 * padded)
    return np.concatenate([_pad(part, size) for part, size in zip(parts, sizes, strict=True)], axis=1).reshape(
        -1, *rows.shape[1:]
    )


def pad_head_norm(arch: Architecture, weight: Floats) -> tuple[Floats, float]:
    """Weight (padded head_dim,) and epsilon of a root-mean-square norm over a padded head.

    Zeros lower the mean of squares by the share s of real dimensions: epsilon is multiplied by s and the weight by
    the root of s, so that both cancel.
    """
    share = arch.head_dim / arch.padded_head_dim
    return pad_heads(arch, weight) * np.float32(share**0.5), arch.norm_epsilon * share


def _pad(part: Floats, size: int) -> Floats:
    return np.pad(part, [(0, 0), (0, size - part.shape[1]), *[(0, 0)] * (part.ndim - 2)])
