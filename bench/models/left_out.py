"""Features of the tiny models, each left out of the graph: what is written then must differ from torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyalign_edge.export.families import Architecture
from tinyalign_edge.export.rotary import read_rotary

Weights = dict[str, NDArray[Any]]
Mutation = Callable[[Architecture, Weights, dict[str, Any]], tuple[Architecture, Weights]]


def _with(**changes: Any) -> Mutation:
    """The architecture with other fields."""
    return lambda arch, weights, _: (replace(arch, **changes), weights)


def _without(*parts: str) -> Mutation:
    """No weight whose name has one of the parts."""
    return lambda arch, weights, _: (arch, {k: v for k, v in weights.items() if not any(part in k for part in parts)})


def _renamed(**changes: Any) -> Mutation:
    return lambda arch, weights, _: (replace(arch, names=replace(arch.names, **changes)), weights)


def _layers(**changes: Any) -> Mutation:
    """Every layer with other fields."""
    return lambda arch, weights, _: (replace(arch, layers=tuple(replace(x, **changes) for x in arch.layers)), weights)


def _rotary(**changes: Any) -> Mutation:
    """The first rotary embedding read from a configuration with other settings."""

    def change(arch: Architecture, weights: Weights, config: dict[str, Any]) -> tuple[Architecture, Weights]:
        first = read_rotary(config | changes, arch.head_dim)
        return replace(arch, rotary=(first, *arch.rotary[1:])), weights

    return change


def _both(*mutations: Mutation) -> Mutation:
    def change(arch: Architecture, weights: Weights, config: dict[str, Any]) -> tuple[Architecture, Weights]:
        for mutation in mutations:
            arch, weights = mutation(arch, weights, config)
        return arch, weights

    return change


def _own_mlp_norm(arch: Architecture, weights: Weights, _: Any) -> tuple[Architecture, Weights]:
    """Phi's one norm a second time, under another name."""
    copies = {k.replace("input_layernorm", "copy"): v for k, v in weights.items() if "input_layernorm" in k}
    return replace(arch, names=replace(arch.names, mlp_norm="copy")), weights | copies


def _unit_amplitude(arch: Architecture, weights: Weights, _: Any) -> tuple[Architecture, Weights]:
    return replace(arch, rotary=tuple(replace(one, amplitude=1.0) for one in arch.rotary)), weights


def _swapped_up(arch: Architecture, weights: Weights, _: Any) -> tuple[Architecture, Weights]:
    halves = {k: np.concatenate(np.split(v, 2)[::-1]) for k, v in weights.items() if "gate_up_proj" in k}
    return arch, weights | halves


NO_QK_NORM = _both(_renamed(q_norm="", k_norm=""), _without("q_norm", "k_norm"))
NO_OUT_NORMS = _both(
    _renamed(attention_out_norm="", down_norm=""), _without("post_attention_layernorm", "post_feedforward_layernorm")
)
LEFT_OUT: dict[str, dict[str, Mutation]] = {
    "llama": {"one rotary speed": _rotary(rope_theta=1.0)},
    "llama-heads-24": {"scale of the padded head": _with(attention_scale=32**-0.5)},
    "llama-biases": {"no attention biases": _without("attn.q_proj.bias", "o_proj.bias"), "no bias": _without(".bias")},
    "llama-epsilon": {"another epsilon": _with(norm_epsilon=1e-6)},
    "llama-rope-llama3": {"no rope scaling": _rotary(rope_scaling=None)},
    "llama-rope-yarn": {"no rope scaling": _rotary(rope_scaling=None), "no amplitude": _unit_amplitude},
    "mistral": {"no window": _layers(window=0), "a window one too wide": _layers(window=25), "tied": _with(tied=True)},
    "qwen2": {"no window": _layers(window=0), "windows everywhere": _layers(window=16), "no bias": _without(".bias")},
    "qwen3": {"no q/k norm": NO_QK_NORM, "epsilon": _with(norm_epsilon=1e-6)},
    "smollm3": {"no window": _layers(window=0), "positions everywhere": _layers(rotary=0)},
    "phi": {
        "sequential": _both(_own_mlp_norm, _with(parallel=False)),
        "full rotary": _rotary(partial_rotary_factor=1.0),
        "no lm_head bias": _without("lm_head.bias"),
        "no bias": _without("proj.bias", "dense.bias", "fc1.bias", "fc2.bias"),
        "rms norm": _both(_with(norm="rms"), _without("layernorm.bias")),
        "no gelu": _with(activation="silu"),
    },
    "phi3": {
        "full rotary": _rotary(partial_rotary_factor=1.0, rope_scaling=None),
        "no rope scaling": _rotary(rope_scaling=None),
        "no amplitude": _unit_amplitude,
        "no window": _layers(window=0),
        "up before gate": _swapped_up,
    },
    "gemma2": {
        "no attention cap": _with(attention_cap=0.0),
        "no logits cap": _with(logits_cap=0.0),
        "no window": _layers(window=0),
        "windows everywhere": _layers(window=16),
        "no offset": _with(norm_offset=0.0),
        "no norms after": NO_OUT_NORMS,
        "no input scale": _with(input_scale=1.0),
        "scale of the head": _with(attention_scale=24**-0.5),
        "silu": _with(activation="silu"),
    },
    "gemma3_text": {
        "one rotary": _layers(rotary=0),
        "no rope scaling": _rotary(rope_scaling=None),
        "no window": _layers(window=0),
        "no q/k norm": NO_QK_NORM,
        "no offset": _with(norm_offset=0.0),
        "no norms after": NO_OUT_NORMS,
        "no embedding scale": _with(embedding_scale=1.0),
        "no logits cap": _with(logits_cap=0.0),
    },
    "gpt_neox": {
        "sequential": _with(parallel=False),
        "one norm": _both(_renamed(mlp_norm=""), _without("post_attention_layernorm")),
        "not interleaved": _with(interleaved_qkv=False),
        "full rotary": _rotary(partial_rotary_factor=1.0),
        "no bias": _without("dense.bias", "query_key_value.bias"),
    },
    "gpt_neox-sequential": {"parallel": _with(parallel=True), "silu": _with(activation="silu")},
}
