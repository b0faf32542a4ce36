"""Scales of an int8 cache of keys and values, from what a float32 cache holds after calibration texts.

The operator rounds a key or value x of channel c to `x / scale[c]`; beyond ±127 it is cut. A rotary embedding turns
two channels of a key into each other as the position grows, so that each may become as large as their common length:
that length, which no position changes, is what a turning channel's scale covers.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from tinyalign_edge.export.families import Architecture
from tinyalign_edge.export.plan import INT8_MAX
from tinyalign_edge.runtime.decoder import Decoder

Floats = NDArray[np.float32]

HEADROOM = 1.25  # the largest of a few hundred calibration tokens is not the largest there will be


def cache_scales(arch: Architecture, decoder: Decoder, texts: Iterable[Floats]) -> Floats:
    """Measure one scale a channel.

    Args:
        arch: of the model.
        decoder: its graph with a float32 cache.
        texts: embeddings (T, D) of whole inputs.

    Returns:
        (L, 2, kv_heads, head_dim) float32, keys before values, head_dim as the buffers have it; all above zero.
    """
    block = decoder.block
    peaks = np.zeros((block.layers, 2, block.kv_heads, block.head_dim), np.float32)
    for embeddings in texts:
        cache = decoder.new_cache(len(embeddings))
        decoder.forward(cache, embeddings)
        for layer, (kept, peak) in zip(arch.layers, zip(cache.buffer[:, :, 0], peaks, strict=True), strict=True):
            held = np.abs(kept)  # (2, kv_heads, T, head_dim)
            if layer.rotary is not None:
                half = arch.padded_rotary_half
                held[0, ..., :half] = np.hypot(held[0, ..., :half], held[0, ..., half : 2 * half])
                held[0, ..., half : 2 * half] = held[0, ..., :half]
            np.maximum(peak, held.max(axis=2), out=peak)
    return np.where(peaks > 0, HEADROOM * peaks / INT8_MAX, 1).astype(np.float32)
