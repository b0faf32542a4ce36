"""Families without a graph of their own: traced by torch, they keep the contract of the written graphs."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3TextConfig

from tests.towers import save_lm, train_tiny
from tinyalign_edge.bench.models.compare import divergence, onnx_logits, relative_error, torch_logits
from tinyalign_edge.bench.models.tiny import FUSED, TRACED, Tiny, build, random_ids
from tinyalign_edge.bundle import Precision
from tinyalign_edge.errors import UnsupportedError
from tinyalign_edge.export.language import check_language, export_language
from tinyalign_edge.export.plan import Plan
from tinyalign_edge.export.processor import own_plan
from tinyalign_edge.export.run import ExportOptions, export
from tinyalign_edge.runtime.decoder import Decoder
from tinyalign_edge.runtime.model import load

IDS = random_ids(64)


def decoder(name: str, folder: Path, precision: Precision = "fp32") -> Decoder:
    return Decoder(folder, export_language(build(TRACED[name]), folder, plan=own_plan(precision)), threads=1)


def stored_types(folder: Path) -> set[int]:
    """The types of the matrices that products of the decoder's graph take."""
    graph = onnx.load(folder / "decoder.onnx", load_external_data=False).graph
    weights = {weight.name: weight for weight in graph.initializer if len(weight.dims) == 2}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm", "DynamicQuantizeMatMul")]
    return {weights[node.input[1]].data_type for node in products if node.input[1] in weights}


@pytest.mark.parametrize("name", TRACED)
def test_fp32_computes_what_torch_computes_in_prefill_chunks_and_steps(name: str, tmp_path: Path) -> None:
    traced, wanted = decoder(name, tmp_path), torch_logits(build(TRACED[name]), IDS)
    assert traced.block.graph == "traced"
    for chunks in ([64], [20, 1, 11, 32], [32] + [1] * 32):
        assert relative_error(onnx_logits(traced, IDS, chunks), wanted) < 1e-4


def test_a_scaled_embedding_is_traced_too(tmp_path: Path) -> None:
    """Gemma 3 with an option that has no written graph, but the one option that changes nothing here."""
    model = build(Tiny("gemma3_text", "", {**FUSED["gemma3_text"].settings, "layer_types": ["full_attention"] * 2}))
    model.config.hidden_activation = "gelu_python_tanh"
    traced = Decoder(tmp_path, export_language(model, tmp_path, plan=Plan("fp32")), threads=1)
    assert traced.block.graph == "traced"
    assert relative_error(onnx_logits(traced, IDS, [40, 24]), torch_logits(model, IDS)) < 1e-4


def test_int8_products_stay_close_and_take_a_quarter_of_the_bytes(tmp_path: Path) -> None:
    sizes = {}
    for precision in ("fp32", "int8"):
        folder = tmp_path / precision
        folder.mkdir()
        logits = onnx_logits(decoder("olmo2", folder, precision), IDS, [64])  # type: ignore[arg-type]
        sizes[precision] = sum(file.stat().st_size for file in folder.iterdir())
    wanted = torch_logits(build(TRACED["olmo2"]), IDS)
    assert 0 < divergence(logits, wanted) < 0.015
    assert (logits.argmax(-1) == wanted.argmax(-1)).mean() >= 0.9
    assert sizes["int8"] < 0.6 * sizes["fp32"]  # the nodes of so small a model are a good part of it


@pytest.mark.parametrize("name", ["opt", "gpt2"])
def test_products_that_torch_writes_in_another_way_become_int8_too(name: str, tmp_path: Path) -> None:
    decoder(name, tmp_path)
    assert stored_types(tmp_path) == {onnx.TensorProto.FLOAT}
    logits = onnx_logits(decoder(name, tmp_path, "int8"), IDS, [64])
    assert stored_types(tmp_path) == {onnx.TensorProto.INT8}
    assert 0 < divergence(logits, torch_logits(build(TRACED[name]), IDS)) < 0.015


def test_logits_are_those_of_the_last_positions_and_the_buffers_are_filled_in_place(tmp_path: Path) -> None:
    traced = decoder("olmo2", tmp_path)
    cache = traced.new_cache(16)
    logits = traced.forward(cache, traced.embed(IDS[:5]), num_logits=2)
    assert relative_error(logits, torch_logits(build(TRACED["olmo2"]), IDS[:5])[-2:]) < 1e-4
    before = cache.buffer.copy()
    traced.forward(cache, traced.embed([7]))
    assert np.array_equal(cache.buffer[..., :5, :], before[..., :5, :])
    assert cache.buffer[..., 5, :].any()
    assert not cache.buffer[..., 6:, :].any()


def test_a_second_trace_writes_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for _ in range(2):
        decoder("granite", tmp_path, "int8")
        contents.append({file.name: file.read_bytes() for file in tmp_path.iterdir()})
    assert contents[0] == contents[1]


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = build(TRACED["olmo2"])
    model.set_attn_implementation("sdpa")
    export_language(model, tmp_path, plan=Plan("fp32"))
    assert model.config._attn_implementation == "sdpa"
    assert not any(module.training for module in model.modules())  # no dropout from here on


def test_what_will_be_traced_is_told_once_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    check_language(build(FUSED["llama"]))
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        check_language(build(TRACED["olmo2"]))
    (message,) = caplog.messages
    assert "model_type 'olmo2' is not supported" in message
    assert "slower" in message


def test_an_option_that_no_graph_is_written_for_is_traced(tmp_path: Path) -> None:
    model = build(Tiny("phi", "", {**FUSED["phi"].settings, "qk_layernorm": True}))
    traced = Decoder(tmp_path, export_language(model, tmp_path, plan=Plan("fp32")), threads=1)
    assert traced.block.graph == "traced"
    assert relative_error(onnx_logits(traced, IDS, [40, 24]), torch_logits(model, IDS)) < 1e-4


@pytest.mark.parametrize(
    ("tiny", "message"),
    [
        (Tiny("mamba", "", {}), "'mamba': its forward takes no past_key_values"),
        (Tiny("bloom", "", {}), "'bloom': its forward takes no position_ids"),
        (Tiny("cohere", "", {}), "'cohere': its trace holds for one size only"),
        pytest.param(
            Tiny("gemma3_text", "", {"use_bidirectional_attention": True}),
            "its trace computes something else",
            marks=pytest.mark.skipif(
                not hasattr(Gemma3TextConfig(), "use_bidirectional_attention"), reason="transformers 4.57 brought it"
            ),
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_what_cannot_be_traced_is_refused_in_one_line(tiny: Tiny, message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=message) as error:
        export_language(build(tiny), tmp_path, plan=Plan("fp32"))
    assert "\n" not in str(error.value)


def test_a_checkpoint_with_such_a_model_exports_and_passes_the_gate(world: Path, towers: Path, tmp_path: Path) -> None:
    shutil.copytree(towers / "vit", tmp_path / "vit")
    save_lm(tmp_path / "lm", "olmo2", steps=0)
    checkpoint = train_tiny(world, tmp_path, tmp_path / "checkpoint", eval_every=4)
    manifest = export(checkpoint, tmp_path / "bundle", ExportOptions(precision="fp32"))
    assert manifest.decoder.graph == "traced"
    assert manifest.gate is not None and manifest.gate.passed
    with load(tmp_path / "bundle") as model:
        assert model.manifest.decoder.graph == "traced"


def test_a_model_too_large_for_a_traced_graph_is_refused_before_anything_is_traced() -> None:
    with torch.device("meta"):
        large = AutoModelForCausalLM.from_config(AutoConfig.for_model("olmo2", hidden_size=4096, num_hidden_layers=8))
    with pytest.raises(UnsupportedError, match=r"GiB of float32 weights, a traced graph holds 2 GiB"):
        check_language(large)
