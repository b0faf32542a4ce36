"""Every family's graph against torch, on tiny models that show its features; without a feature it must differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.test_decoder import divergence, onnx_logits, random_ids, relative_error, torch_logits
from tinyalign_edge.bench.tiny import FUSED, build
from tinyalign_edge.bundle import Precision
from tinyalign_edge.errors import InputError, UnsupportedError
from tinyalign_edge.export.decoder import export_decoder
from tinyalign_edge.export.families import FAMILIES, Architecture, read_architecture
from tinyalign_edge.export.rotary import read_rotary
from tinyalign_edge.export.weights import StateDict
from tinyalign_edge.runtime.decoder import Decoder

Weights = dict[str, NDArray[Any]]
Mutation = Callable[[Architecture, Weights, dict[str, Any]], tuple[Architecture, Weights]]
IDS = random_ids(64)


def export(arch: Any, weights: Any, folder: Path, precision: Precision = "fp32") -> Decoder:
    return Decoder(folder, export_decoder(arch, weights, folder, precision=precision), threads=1)


def test_every_family_has_a_tiny_model() -> None:
    assert {tiny.model_type for tiny in FUSED.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", FUSED)
def test_fp32_computes_what_torch_computes_in_prefill_chunks_and_steps(name: str, tmp_path: Path) -> None:
    model = build(FUSED[name])
    decoder, wanted = export(model.config, StateDict(model), tmp_path), torch_logits(model, IDS)
    for chunks in ([64], [20, 1, 11, 32], [32] + [1] * 32):
        assert relative_error(onnx_logits(decoder, IDS, chunks), wanted) < 1e-4


@pytest.mark.parametrize("name", FUSED)
def test_int8_stays_close_to_torch(name: str, tmp_path: Path) -> None:
    model = build(FUSED[name])
    logits = onnx_logits(export(model.config, StateDict(model), tmp_path, "int8"), IDS, [64])
    wanted = torch_logits(model, IDS)
    assert divergence(logits, wanted) < 0.03
    assert (logits.argmax(-1) == wanted.argmax(-1)).mean() >= 0.8


def with_(**changes: Any) -> Mutation:
    """The architecture with other fields."""
    return lambda arch, weights, _: (replace(arch, **changes), weights)


def without(*parts: str) -> Mutation:
    """No weight whose name has one of the parts."""
    return lambda arch, weights, _: (arch, {k: v for k, v in weights.items() if not any(part in k for part in parts)})


def renamed(**changes: Any) -> Mutation:
    return lambda arch, weights, _: (replace(arch, names=replace(arch.names, **changes)), weights)


def layers(**changes: Any) -> Mutation:
    """Every layer with other fields."""
    return lambda arch, weights, _: (replace(arch, layers=tuple(replace(x, **changes) for x in arch.layers)), weights)


def rotary(**changes: Any) -> Mutation:
    """The first rotary embedding read from a configuration with other settings."""

    def change(arch: Architecture, weights: Weights, config: dict[str, Any]) -> tuple[Architecture, Weights]:
        first = read_rotary(config | changes, arch.head_dim)
        return replace(arch, rotary=(first, *arch.rotary[1:])), weights

    return change


def both(*mutations: Mutation) -> Mutation:
    def change(arch: Architecture, weights: Weights, config: dict[str, Any]) -> tuple[Architecture, Weights]:
        for mutation in mutations:
            arch, weights = mutation(arch, weights, config)
        return arch, weights

    return change


def own_mlp_norm(arch: Architecture, weights: Weights, _: Any) -> tuple[Architecture, Weights]:
    """Phi's one norm a second time, under another name."""
    copies = {k.replace("input_layernorm", "copy"): v for k, v in weights.items() if "input_layernorm" in k}
    return replace(arch, names=replace(arch.names, mlp_norm="copy")), weights | copies


def unit_amplitude(arch: Architecture, weights: Weights, _: Any) -> tuple[Architecture, Weights]:
    return replace(arch, rotary=tuple(replace(one, amplitude=1.0) for one in arch.rotary)), weights


def swapped_up(arch: Architecture, weights: Weights, _: Any) -> tuple[Architecture, Weights]:
    halves = {k: np.concatenate(np.split(v, 2)[::-1]) for k, v in weights.items() if "gate_up_proj" in k}
    return arch, weights | halves


NO_QK_NORM = both(renamed(q_norm="", k_norm=""), without("q_norm", "k_norm"))
NO_OUT_NORMS = both(
    renamed(attention_out_norm="", down_norm=""), without("post_attention_layernorm", "post_feedforward_layernorm")
)
MUTATIONS: dict[str, dict[str, Mutation]] = {
    "llama": {"one rotary speed": rotary(rope_theta=1.0)},
    "llama-heads-24": {"scale of the padded head": with_(attention_scale=32**-0.5)},
    "llama-biases": {"no attention biases": without("attn.q_proj.bias", "o_proj.bias"), "no bias": without(".bias")},
    "llama-epsilon": {"another epsilon": with_(norm_epsilon=1e-6)},
    "llama-rope-llama3": {"no rope scaling": rotary(rope_scaling=None)},
    "llama-rope-yarn": {"no rope scaling": rotary(rope_scaling=None), "no amplitude": unit_amplitude},
    "mistral": {"no window": layers(window=0), "a window one too wide": layers(window=25), "tied": with_(tied=True)},
    "qwen2": {"no window": layers(window=0), "windows everywhere": layers(window=16), "no bias": without(".bias")},
    "qwen3": {"no q/k norm": NO_QK_NORM, "epsilon": with_(norm_epsilon=1e-6)},
    "smollm3": {"no window": layers(window=0), "positions everywhere": layers(rotary=0)},
    "phi": {
        "sequential": both(own_mlp_norm, with_(parallel=False)),
        "full rotary": rotary(partial_rotary_factor=1.0),
        "no lm_head bias": without("lm_head.bias"),
        "no bias": without("proj.bias", "dense.bias", "fc1.bias", "fc2.bias"),
        "rms norm": both(with_(norm="rms"), without("layernorm.bias")),
        "no gelu": with_(activation="silu"),
    },
    "phi3": {
        "full rotary": rotary(partial_rotary_factor=1.0, rope_scaling=None),
        "no rope scaling": rotary(rope_scaling=None),
        "no amplitude": unit_amplitude,
        "no window": layers(window=0),
        "up before gate": swapped_up,
    },
    "gemma2": {
        "no attention cap": with_(attention_cap=0.0),
        "no logits cap": with_(logits_cap=0.0),
        "no window": layers(window=0),
        "windows everywhere": layers(window=16),
        "no offset": with_(norm_offset=0.0),
        "no norms after": NO_OUT_NORMS,
        "no input scale": with_(input_scale=1.0),
        "scale of the head": with_(attention_scale=24**-0.5),
        "silu": with_(activation="silu"),
    },
    "gemma3_text": {
        "one rotary": layers(rotary=0),
        "no rope scaling": rotary(rope_scaling=None),
        "no window": layers(window=0),
        "no q/k norm": NO_QK_NORM,
        "no offset": with_(norm_offset=0.0),
        "no norms after": NO_OUT_NORMS,
        "no embedding scale": with_(embedding_scale=1.0),
        "no logits cap": with_(logits_cap=0.0),
    },
    "gpt_neox": {
        "sequential": with_(parallel=False),
        "one norm": both(renamed(mlp_norm=""), without("post_attention_layernorm")),
        "not interleaved": with_(interleaved_qkv=False),
        "full rotary": rotary(partial_rotary_factor=1.0),
        "no bias": without("dense.bias", "query_key_value.bias"),
    },
    "gpt_neox-sequential": {"parallel": with_(parallel=True), "silu": with_(activation="silu")},
}


@pytest.mark.parametrize(("name", "feature"), [(name, feature) for name in MUTATIONS for feature in MUTATIONS[name]])
def test_a_feature_left_out_shows(name: str, feature: str, tmp_path: Path) -> None:
    model = build(FUSED[name])
    config = model.config.to_dict()
    mutated = MUTATIONS[name][feature](read_architecture(config), dict(StateDict(model)), config)
    error = relative_error(onnx_logits(export(*mutated, tmp_path), IDS, [64]), torch_logits(model, IDS))
    assert error > 1e-2


@pytest.mark.parametrize(("name", "other"), [("gpt_neox", "gelu_tanh"), ("gpt_neox-sequential", "gelu")])
def test_the_two_kinds_of_gelu_are_told_apart(name: str, other: str, tmp_path: Path) -> None:
    model = build(FUSED[name])
    right = read_architecture(model.config)
    wanted, weights = torch_logits(model, IDS), StateDict(model)
    errors = [
        relative_error(onnx_logits(export(arch, weights, tmp_path), IDS, [64]), wanted)
        for arch in (right, replace(right, activation=other))
    ]
    assert 20 * errors[0] < errors[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_checkpoint_in_half_precision_exports_as_its_float32_copy(dtype: torch.dtype, tmp_path: Path) -> None:
    half, whole = build(FUSED["llama"]).to(dtype), build(FUSED["llama"])
    whole.load_state_dict(half.state_dict())
    decoder = export(half.config, StateDict(half), tmp_path)
    assert relative_error(onnx_logits(decoder, IDS, [64]), torch_logits(whole, IDS)) < 1e-4


def test_weights_are_converted_one_at_a_time_and_not_kept() -> None:
    weights = StateDict(build(FUSED["llama"]).to(torch.bfloat16))
    name = "model.embed_tokens.weight"
    assert name in weights and weights[name].dtype == np.float32
    assert weights[name] is not weights[name]


def test_longrope_ends_where_its_short_factors_do(tmp_path: Path) -> None:
    model = build(FUSED["phi3"])
    assert model.config.max_position_embeddings == 128
    assert export(model.config, StateDict(model), tmp_path).block.max_positions == 100


def test_rotary_tables_are_not_in_the_files(tmp_path: Path) -> None:
    sizes = []
    for positions in (128, 1 << 16):
        model = build(FUSED["llama"])
        model.config.max_position_embeddings = positions
        export(model.config, StateDict(model), tmp_path)
        sizes.append(sum(file.stat().st_size for file in tmp_path.iterdir()))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("phi", {"qk_layernorm": True}, "phi: qk_layernorm = True is not supported"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("qwen3", {"layer_types": ["full_attention", "chunked_attention"]}, "layer type 'chunked_attention'"),
        ("llama", {"hidden_act": "mish"}, "hidden_act 'mish' is not supported; known: 'silu'"),
        ("llama", {"rope_scaling": {"rope_type": "spiral"}}, "rope_scaling type 'spiral' is not supported; known"),
    ],
)
def test_an_option_that_no_graph_is_written_for_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        read_architecture(build(FUSED[name]).config.to_dict() | changes)


def test_a_rope_scaling_without_its_figures_is_refused() -> None:
    config = build(FUSED["llama"]).config.to_dict() | {"rope_scaling": {"rope_type": "yarn"}}
    with pytest.raises(InputError, match="rope_scaling of type 'yarn' lacks 'factor'"):
        read_architecture(config)
