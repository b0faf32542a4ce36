"""A decoder's logits, from torch and from the exported graphs, and how far apart they are."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from tinyalign_edge.export.distances import divergences, log_softmax
from tinyalign_edge.runtime.decoder import Decoder

Floats = NDArray[np.float32]


def torch_logits(model: PreTrainedModel, ids: list[int]) -> Floats:
    """Logits (T, V) of all positions, in one pass without a cache."""
    with torch.inference_mode():
        logits: Floats = model(torch.tensor([ids])).logits[0].numpy()
    return logits


def onnx_logits(decoder: Decoder, ids: list[int], chunks: list[int]) -> Floats:
    """Logits (T, V) of all ids, given to one cache in chunks of the given lengths."""
    cache = decoder.new_cache(len(ids))
    pieces = np.split(decoder.embed(ids), np.cumsum(chunks)[:-1])
    return np.concatenate([decoder.forward(cache, piece, num_logits=len(piece)) for piece in pieces])


def relative_error(actual: Floats, wanted: Floats) -> float:
    """The largest difference, relative to the largest wanted value."""
    return float(np.abs(actual - wanted).max() / np.abs(wanted).max())


def divergence(actual: Floats, wanted: Floats) -> float:
    """Mean KL(wanted || actual) over the positions, in nats."""
    return float(divergences(log_softmax(wanted), log_softmax(actual)).mean())
