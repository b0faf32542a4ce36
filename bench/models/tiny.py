"""Tiny random language models of every family, with weights so large and settings so tight that each feature shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 96
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {"type": "longrope", "short_factor": [1.0 + 0.5 * i for i in range(12)], "long_factor": [9.0] * 12}

GRANITE = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.5, "logits_scaling": 2.0}
EXAONE4 = {"sliding_window": 16, "sliding_window_pattern": 2}


@dataclass(frozen=True)
class Tiny:
    """A model type, what its settings show, and the settings (beside `COMMON`)."""

    model_type: str
    shows: str
    settings: dict[str, Any]


FUSED: dict[str, Tiny] = {
    "llama": Tiny("llama", "grouped heads, tied embedding", TIED),
    "llama-heads-24": Tiny(
        "llama", "head size 24, one key-value head a head", {"head_dim": 24, "num_key_value_heads": 4}
    ),
    "llama-heads-8": Tiny("llama", "head size 8, untied embedding", {"head_dim": 8, **UNTIED}),
    "llama-biases": Tiny("llama", "biases in attention and MLP", {"attention_bias": True, "mlp_bias": True, **TIED}),
    "llama-epsilon": Tiny("llama", "large epsilon of the norms", {"rms_norm_eps": 0.5, **TIED}),
    "llama-rope-llama3": Tiny("llama", "Llama 3's rope scaling", {"rope_scaling": LLAMA3, "rope_theta": 500.0, **TIED}),
    "llama-rope-yarn": Tiny("llama", "YaRN", {"rope_scaling": YARN, "rope_theta": 500.0, **TIED}),
    "mistral": Tiny("mistral", "a window in all layers, head size 24, untied", {"sliding_window": 24, "head_dim": 24}),
    "qwen2": Tiny(
        "qwen2",
        "biases of query, key and value; a window in some layers",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1, **TIED},
    ),
    "qwen3": Tiny("qwen3", "norms of queries and keys, head size 24", {"head_dim": 24, "rms_norm_eps": 0.1, **TIED}),
    "smollm3": Tiny(
        "smollm3",
        "layers without positions, and a window there",
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 16},
    ),
    "phi": Tiny(
        "phi",
        "parallel blocks under one LayerNorm, partial rotary (16 of 40, padded), biases, that of lm_head too",
        {"hidden_size": 80, "num_attention_heads": 2, "partial_rotary_factor": 0.4},
    ),
    "phi3": Tiny(
        "phi3",
        "fused matrices, partial rotary (24 of 32, padded), LongRoPE's short factors, a window",
        {
            "hidden_size": 128,
            "partial_rotary_factor": 0.75,
            "rope_scaling": LONGROPE,
            "original_max_position_embeddings": 100,
            "sliding_window": 24,
        },
    ),
    "gemma2": Tiny(
        "gemma2",
        "both soft caps, a window in every other layer, four norms with offset, scaled input, scale of queries",
        {
            "head_dim": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 2.0,
            "query_pre_attn_scalar": 5,
            "sliding_window": 16,
        },
    ),
    "gemma3_text": Tiny(
        "gemma3_text",
        "two rotary embeddings (one scaled), windows, norms of queries and keys, scaled embedding",
        {
            "head_dim": 24,
            "query_pre_attn_scalar": 5,
            "sliding_window": 16,
            "sliding_window_pattern": 2,
            "rope_local_base_freq": 20.0,
            "rope_theta": 500.0,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            "final_logit_softcapping": 4.0,
        },
    ),
    "gpt_neox": Tiny(
        "gpt_neox",
        "parallel blocks under two LayerNorms, interleaved matrix, partial rotary (8 of 32, padded)",
        {"hidden_size": 128},
    ),
    "gpt_neox-sequential": Tiny(
        "gpt_neox", "blocks one after the other, tanh GELU", {"use_parallel_residual": False, "hidden_act": "gelu_new"}
    ),
}
TRACED: dict[str, Tiny] = {
    "olmo2": Tiny("olmo2", "norms of whole queries and keys, norms after the sublayers only", {}),
    "granite": Tiny("granite", "multipliers of embeddings, residuals, attention and logits", GRANITE),
    "starcoder2": Tiny("starcoder2", "a window in all layers, LayerNorm, biases", {"sliding_window": 16}),
    "exaone4": Tiny("exaone4", "a window in some layers, no positions in the others", EXAONE4),
    "opt": Tiny("opt", "learnt positions, ReLU", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "gpt2": Tiny("gpt2", "learnt positions, transposed matrices", {}),
}


def build(tiny: Tiny) -> PreTrainedModel:
    """The model, with weights that are the same at every call.

    Its attention is the plain one: transformers' default for Gemma 2 leaves the soft cap out.
    """
    config = AutoConfig.for_model(tiny.model_type, **(COMMON | tiny.settings))
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(mean=float("norm" in name), std=0.2)
    return model


def random_ids(count: int, *, seed: int = 1) -> list[int]:
    """Token ids, the same at every call with the same seed."""
    ids: list[int] = np.random.default_rng(seed).integers(0, VOCABULARY, count).tolist()
    return ids
