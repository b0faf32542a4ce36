"""Every family's graph against torch, on tiny models that show its features; without a feature it must differ."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from tinyalign_edge.bench.models.compare import onnx_logits, relative_error, torch_logits
from tinyalign_edge.bench.models.left_out import LEFT_OUT
from tinyalign_edge.bench.models.taught import sentence, teach
from tinyalign_edge.bench.models.tiny import FUSED, build, random_ids
from tinyalign_edge.bench.models.tuned import tune
from tinyalign_edge.bundle import Precision
from tinyalign_edge.errors import InputError, UnsupportedError
from tinyalign_edge.export.decoder import export_decoder
from tinyalign_edge.export.families import FAMILIES, read_architecture
from tinyalign_edge.export.plan import Plan
from tinyalign_edge.export.processor import own_plan
from tinyalign_edge.export.search import MAX_GROWTH
from tinyalign_edge.export.weights import StateDict
from tinyalign_edge.runtime.decoder import Decoder

IDS = random_ids(64)


def export(arch: Any, weights: Any, folder: Path, precision: Precision = "fp32") -> Decoder:
    return Decoder(folder, export_decoder(arch, weights, folder, plan=own_plan(precision)), threads=1)


def test_every_family_has_a_tiny_model() -> None:
    assert {tiny.model_type for tiny in FUSED.values()} == set(FAMILIES)


def test_the_page_of_models_has_every_family() -> None:
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text("utf-8")
    assert [family for family in FAMILIES if f"| `{family}` |" not in page] == []


@pytest.mark.parametrize("name", FUSED)
def test_fp32_computes_what_torch_computes_in_prefill_chunks_and_steps(name: str, tmp_path: Path) -> None:
    model = build(FUSED[name])
    decoder, wanted = export(model.config, StateDict(model), tmp_path), torch_logits(model, IDS)
    for chunks in ([64], [20, 1, 11, 32], [32] + [1] * 32):
        assert relative_error(onnx_logits(decoder, IDS, chunks), wanted) < 1e-4


@pytest.mark.parametrize("name", [next(n for n in FUSED if FUSED[n].model_type == family) for family in FAMILIES])
def test_a_model_that_knows_its_language_passes_the_gate_in_int8(name: str) -> None:
    tuned = tune(teach(build(FUSED[name])), lambda seed: sentence(64, seed=seed))
    assert tuned.found.failures == ()
    assert tuned.given_back < tuned.matrices


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_search_helps_a_random_model_within_its_bytes(name: str) -> None:
    tuned = tune(build(FUSED[name]), lambda seed: random_ids(64, seed=seed))
    assert 0 < tuned.found.kl < 0.8 * tuned.plain.kl
    assert tuned.given_back > 0
    assert tuned.growth <= MAX_GROWTH - 1


@pytest.mark.parametrize(("name", "feature"), [(name, feature) for name in LEFT_OUT for feature in LEFT_OUT[name]])
def test_a_feature_left_out_shows(name: str, feature: str, tmp_path: Path) -> None:
    model = build(FUSED[name])
    config = model.config.to_dict()
    mutated = LEFT_OUT[name][feature](read_architecture(config), dict(StateDict(model)), config)
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


def test_rotary_tables_are_computed_when_the_graph_is_loaded_not_at_every_step(tmp_path: Path) -> None:
    model = build(FUSED["gemma3_text"])
    block = export_decoder(model.config, StateDict(model), tmp_path, plan=Plan("fp32"))
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(tmp_path / block.file, options, providers=["CPUExecutionProvider"])
    written, loaded = (
        {node.op_type for node in onnx.load(tmp_path / name, load_external_data=False).graph.node}
        for name in (block.file, "optimised.onnx")
    )
    assert {"Range", "Cos", "Sin"} <= written
    assert not {"Range", "Cos", "Sin"} & loaded


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
