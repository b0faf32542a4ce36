"""The exported encoder against torch: tiny random checkpoints of every kind, whose weights show what is left out."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest

pytest.importorskip("torch")

import torch

from tinyalign_edge.bench.models.encoders import compare, onnx_outputs, relative_error, untrained
from tinyalign_edge.bench.models.tiny_encoders import ENCODERS, SIDE, save_encoder
from tinyalign_edge.errors import UnsupportedError
from tinyalign_edge.export import encoder, fuse
from tinyalign_edge.export.plan import Plan
from tinyalign_edge.export.quantize import quantize_graph
from tinyalign_edge.train.towers import image_settings, load_vision, patch_features

pytestmark = pytest.mark.filterwarnings("ignore")
RESIZABLE = ("siglip", "clip", "dinov2", "dinov2 with registers", "vit", "mobilenet_v2", "convnext")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of every kind; do not change them."""
    root = tmp_path_factory.mktemp("encoders")
    made = {name: root / str(place) for place, name in enumerate(ENCODERS)}
    for name, folder in made.items():
        save_encoder(name, folder)
    return made


@pytest.mark.parametrize("name", ENCODERS)
def test_every_kind_equals_torch_with_its_attention_fused_and_in_int8(folders: dict[str, Path], name: str) -> None:
    row = compare(name, folders[name])
    assert row.fp32_error < 1e-4
    assert row.fp32_key_error < 1e-4
    assert row.int8_cosine >= 0.999
    assert row.attentions == ENCODERS[name].attentions


@pytest.mark.parametrize(("name", "side"), [*((name, SIDE + 8) for name in RESIZABLE), ("clip", SIDE - 16)])
def test_another_image_size_equals_torch_too(folders: dict[str, Path], name: str, side: int) -> None:
    row = compare(name, folders[name], side=side)
    assert row.fp32_error < 1e-4
    assert row.fp32_key_error < 1e-4
    assert row.attentions == ENCODERS[name].attentions


@pytest.mark.parametrize("name", ["siglip", "clip", "dinov2", "vit"])
def test_the_fused_graph_equals_the_traced_one(
    folders: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = load_vision(str(folders[name]))
    model = untrained(tower)
    pictures = np.random.default_rng(0).standard_normal((2, 3, SIDE, SIDE), np.float32)
    fused = encoder.trace_encoder(tower, model)
    monkeypatch.setattr(encoder, "fuse", lambda _: None)
    traced = encoder.trace_encoder(tower, model)
    assert any(node.op_type == "Softmax" for node in traced.graph.node)
    assert not any(node.op_type == "Softmax" for node in fused.graph.node)
    assert products(fused) == [name for name in products(traced) if not name.endswith(("self_attn", "attention"))]
    for found, wanted in zip(onnx_outputs(fused, pictures), onnx_outputs(traced, pictures), strict=True):
        assert relative_error(found, wanted) < 1e-5


def products(model: onnx.ModelProto) -> list[str]:
    """Scopes of the matrix products, in order of the alphabet."""
    return sorted(node.name.rsplit("/", 1)[0] for node in model.graph.node if node.op_type == "MatMul")


def test_every_product_of_the_encoder_becomes_int8_under_its_own_name(folders: dict[str, Path]) -> None:
    tower = load_vision(str(folders["vit"]))
    graph = encoder.trace_encoder(tower, untrained(tower))
    quantized = quantize_graph(graph, Plan("int8")).graph
    int8 = {node.name: node for node in quantized.node if node.op_type == "DynamicQuantizeMatMul"}
    layers = {name for name in int8 if "/layer." in name}
    assert len(layers) == 6 * 2
    assert int8.keys() <= {node.name for node in graph.graph.node}
    assert all(len(int8[name].input) == 5 for name in layers)  # the bias is part of the product


def test_attention_of_another_form_is_left_alone(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph whose values are scaled, which the operator cannot say, keeps its own nodes and stays right."""
    tower = load_vision(str(folders["vit"]))
    model = untrained(tower)
    monkeypatch.setattr(encoder, "fuse", lambda _: None)
    graph = encoder.trace_encoder(tower, model)
    weighted = {node.input[1]: node for node in graph.graph.node if node.op_type == "MatMul"}
    for place, node in reversed(list(enumerate(graph.graph.node))):
        if node.op_type == "Transpose" and node.output[0] in weighted and node.name.endswith("attention/Transpose"):
            scaled = f"{node.output[0]}.scaled"
            weighted[node.output[0]].input[1] = scaled
            double = onnx.helper.make_node("Mul", [node.output[0], "two"], [scaled])
            graph.graph.node.insert(place + 1, double)
    graph.graph.initializer.append(onnx.numpy_helper.from_array(np.array(2.0, np.float32), "two"))
    pictures = np.random.default_rng(0).standard_normal((1, 3, SIDE, SIDE), np.float32)
    before = onnx_outputs(graph, pictures)
    fuse.fuse(graph)
    assert fuse.fused_attentions(graph) == 0
    assert all(np.array_equal(a, b) for a, b in zip(onnx_outputs(graph, pictures), before, strict=True))


@pytest.mark.parametrize("name", ["clip", "vit", "dinov2 with registers"])
def test_class_and_register_tokens_are_not_in_the_grid(folders: dict[str, Path], name: str) -> None:
    tower = load_vision(str(folders[name]))
    pictures = torch.randn(1, 3, SIDE, SIDE)
    with torch.inference_mode():
        hidden = tower.model(pixel_values=pictures).last_hidden_state
        grid = patch_features(tower.model, pictures)
    height, width, _ = tower.grid
    assert hidden.shape[1] > height * width
    assert torch.equal(grid[0, 0, 0], hidden[0, hidden.shape[1] - height * width])
    assert torch.equal(grid[0, -1, -1], hidden[0, -1])


def test_a_size_that_the_patches_do_not_divide_is_refused(folders: dict[str, Path]) -> None:
    folder = str(folders["dinov2"])
    with pytest.raises(UnsupportedError, match=r"50 x 50 pixels do not divide into patches of 8"):
        load_vision(folder, image=image_settings(folder, 50))


def test_an_encoder_that_cannot_take_another_size_is_refused(folders: dict[str, Path]) -> None:
    folder = str(folders["vit"])
    narrow = dataclasses.replace(image_settings(folder), height=0, width=0)
    with pytest.raises(UnsupportedError, match="cannot encode a picture of 0 x 0"):
        load_vision(folder, image=narrow)
