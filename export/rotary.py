"""Rotary position embeddings: how fast each pair of dimensions of a head turns from position to position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tinyalign_edge.errors import InputError, UnsupportedError

CPU = torch.device("cpu")
READ = (
    "hidden_size",
    "num_attention_heads",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "rope_theta",
    "rope_scaling",
)


@dataclass(frozen=True, eq=False)
class Rotary:
    """Position p turns pair i by `p * frequencies[i]`; cosines and sines are multiplied by `amplitude`."""

    frequencies: NDArray[np.float32]  # (half of the dimensions that turn,) radians a position
    amplitude: float


def read_rotary(config: Mapping[str, Any], head_dim: int) -> Rotary:
    """The rotary embedding of a configuration, its scaling and partial rotation included.

    The figures come from transformers' own functions, those for sequences up to `longest_position`.

    Raises:
        UnsupportedError: a scaling that transformers does not know; the message lists those it does.
        InputError: a figure that the scaling needs is missing.
    """
    kind = _kind(config)
    if kind not in ROPE_INIT_FUNCTIONS:
        known = ", ".join(map(repr, ROPE_INIT_FUNCTIONS))
        raise UnsupportedError(f"rope_scaling type {kind!r} is not supported; known: {known}")
    read: dict[str, Any] = {key: config[key] for key in READ if config.get(key) is not None}
    try:
        frequencies, amplitude = ROPE_INIT_FUNCTIONS[kind](PretrainedConfig(**read, head_dim=head_dim), CPU)
    except KeyError as missing:
        raise InputError(f"rope_scaling of type {kind!r} lacks {missing}; add it to config.json") from None
    return Rotary(frequencies.numpy(), float(amplitude))


def longest_position(config: Mapping[str, Any]) -> int:
    """How many positions the model takes with one set of frequencies.

    "longrope" models have a second set for sequences longer than they were pretrained on. What lies in the cache was
    turned by the first, so they end where it does.
    """
    longest: int = config["max_position_embeddings"]
    if _kind(config) != "longrope":
        return longest
    return min(longest, config.get("original_max_position_embeddings") or longest)


def _kind(config: Mapping[str, Any]) -> str:
    scaling = config.get("rope_scaling") or {}
    return str(scaling.get("rope_type", scaling.get("type", "default")))
