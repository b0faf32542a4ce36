"""A Hugging Face configuration as the numbers from which a decoder's graph is written.

What differs between model families is read by one function a family: `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tinyalign_edge.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

T = TypeVar("T")
Doubles = NDArray[np.float64]

HEAD_MULTIPLE = 16  # GroupQueryAttention with rotary embedding takes no other head sizes
LAYER_PRODUCTS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Architecture:
    """What the graphs need to know of a language model, whatever its family."""

    layers: int
    width: int
    mlp_width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_epsilon: float
    tied: bool  # lm_head is the embedding table
    rotary_frequencies: NDArray[np.float32]  # (head_dim / 2,) radians a position

    @property
    def padded_head_dim(self) -> int:
        return -(-self.head_dim // HEAD_MULTIPLE) * HEAD_MULTIPLE


def product_names(arch: Architecture) -> tuple[str, ...]:
    """The matrix products of the graph in order, `layers.0.qkv_proj` to `lm_head`; their nodes are called so."""
    return (*(f"layers.{i}.{name}" for i in range(arch.layers) for name in LAYER_PRODUCTS), "lm_head")


def read_architecture(config: PretrainedConfig | Mapping[str, Any]) -> Architecture:
    """Read a Hugging Face configuration.

    Raises:
        UnsupportedError: an unknown family, activation or rotary scaling; the message lists the known ones.
    """
    settings = config if isinstance(config, Mapping) else config.to_dict()
    return _choose(FAMILIES, settings.get("model_type"), "model_type")(settings)


def _llama(config: Mapping[str, Any]) -> Architecture:
    if config["hidden_act"] != "silu":
        raise UnsupportedError(f"hidden_act {config['hidden_act']!r} is not supported; known: 'silu'")
    width, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or width // heads
    return Architecture(
        layers=config["num_hidden_layers"],
        width=width,
        mlp_width=config["intermediate_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        vocab_size=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        norm_epsilon=config["rms_norm_eps"],
        tied=config["tie_word_embeddings"],
        rotary_frequencies=_rotary_frequencies(head_dim, config["rope_theta"], config.get("rope_scaling") or {}),
    )


FAMILIES: dict[str, Callable[[Mapping[str, Any]], Architecture]] = {"llama": _llama}


def _rotary_frequencies(head_dim: int, theta: float, scaling: Mapping[str, Any]) -> NDArray[np.float32]:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    return _choose(ROTARY_SCALINGS, kind, "rope_scaling type")(frequencies, scaling).astype(np.float32)


def _llama3_scaling(frequencies: Doubles, scaling: Mapping[str, Any]) -> Doubles:
    """Slow rotations are slowed down further by `factor`, fast ones left, those between blended (Llama 3.1)."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    speeds: Doubles = kept + (1 - kept) / scaling["factor"]
    return frequencies * speeds


ROTARY_SCALINGS: dict[str, Callable[[Doubles, Mapping[str, Any]], Doubles]] = {
    "default": lambda frequencies, _: frequencies,
    "llama3": _llama3_scaling,
}


def _choose(table: Mapping[str, T], key: object, what: str) -> T:
    if key not in table:
        raise UnsupportedError(f"{what} {key!r} is not supported; known: {', '.join(map(repr, table))}")
    return table[str(key)]
