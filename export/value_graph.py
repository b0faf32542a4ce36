"""The value encoder as a graph: see `MemoryBlock.value_file` for its inputs and outputs.

It stays in float32: it runs once an addition, and what it makes lies beside what torch made.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor, nn

from tinyalign_edge.export.graph import Graph
from tinyalign_edge.export.product import Floats
from tinyalign_edge.train.connector import PictureEncoder, ValueEncoder

FILE = "value_encoder.onnx"


def export_value_encoder(encoder: ValueEncoder | PictureEncoder, folder: Path, *, visual_tokens: int) -> None:
    """Write the graph into `folder`."""
    latents, dim = encoder.query.shape
    graph = Graph("value_encoder")
    seen = _seen(graph, encoder, visual_tokens)
    query, gate = graph.constant("query", _array(encoder.query)[None]), graph.constant("gate", _array(encoder.gate))
    if isinstance(encoder, PictureEncoder):
        graph.op("Mul", _attention(graph, encoder.attention, query, seen), gate, output="latents")
    else:
        words, start = _words(graph, encoder)
        context = graph.op("Concat", seen, words, axis=1)  # (1, N + T, dim)
        read = _attention(graph, encoder.attention, graph.op("Add", start, query), context)
        graph.op("Add", start, graph.op("Mul", read, gate), output="latents")
    graph.output("latents", np.float32, (1, latents, dim))
    graph.save(folder / FILE)


def _seen(graph: Graph, encoder: ValueEncoder | PictureEncoder, visual_tokens: int) -> str:
    """The picture, (1, N, dim)."""
    norm, linear = _parts(encoder)
    features = graph.input("features", np.float32, (1, visual_tokens, norm.normalized_shape[0]))
    scale, shift = (graph.constant(f"norm.{name}", _array(getattr(norm, name))) for name in ("weight", "bias"))
    normed = graph.op("LayerNormalization", features, scale, shift, epsilon=norm.eps)
    return _linear(graph, normed, linear.weight, linear.bias, "see")


def _words(graph: Graph, encoder: ValueEncoder) -> tuple[str, str]:
    """The compressed text, (1, T, dim), and the first L of it, zeros where it is shorter, (1, L, dim)."""
    latents, dim = encoder.query.shape
    text = graph.input("text", np.float32, (1, "T", encoder.mean.shape[0]))
    words = graph.op("Sub", text, graph.constant("mean", _array(encoder.mean)))
    words = graph.op("MatMul", words, graph.constant("compress", _array(encoder.compress).T))
    filled = graph.op("Concat", words, graph.constant("no_words", np.zeros((1, latents, dim), np.float32)), axis=1)
    bounds = (graph.constant(name, np.array([at])) for name, at in (("first", 0), ("end", latents), ("rows", 1)))
    return words, graph.op("Slice", filled, *bounds)


def _parts(encoder: ValueEncoder | PictureEncoder) -> tuple[nn.LayerNorm, nn.Linear]:
    norm, linear = encoder.see
    assert isinstance(norm, nn.LayerNorm)
    assert isinstance(linear, nn.Linear)
    return norm, linear


def _attention(graph: Graph, attention: nn.MultiheadAttention, asked: str, context: str) -> str:
    """Attention of `asked` (1, L, dim) over `context` (1, N + T, dim): (1, L, dim)."""
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    sources = (asked, context, context)
    q, k, v = (
        _heads(graph, _linear(graph, source, weight, bias, name), attention.num_heads, name, transposed=name == "k")
        for name, source, weight, bias in zip("qkv", sources, weights, biases, strict=True)
    )  # (1, H, L, d), (1, H, d, N + T), (1, H, N + T, d)
    scale = graph.constant("scale", np.array(attention.head_dim**-0.5, np.float32))
    shares = graph.op("Softmax", graph.op("Mul", graph.op("MatMul", q, k), scale), axis=-1)
    mixed = graph.op("Transpose", graph.op("MatMul", shares, v), perm=(0, 2, 1, 3))
    joined = graph.op("Reshape", mixed, graph.constant("joined", np.array([0, 0, -1])))
    return _linear(graph, joined, attention.out_proj.weight, attention.out_proj.bias, "out")


def _heads(graph: Graph, x: str, heads: int, name: str, *, transposed: bool) -> str:
    apart = graph.op("Reshape", x, graph.constant(f"{name}.heads", np.array([0, 0, heads, -1])))
    return graph.op("Transpose", apart, perm=(0, 2, 3, 1) if transposed else (0, 2, 1, 3))


def _linear(graph: Graph, x: str, weight: Tensor, bias: Tensor, name: str) -> str:
    product = graph.op("MatMul", x, graph.constant(f"{name}.weight", _array(weight).T))
    return graph.op("Add", product, graph.constant(f"{name}.bias", _array(bias)))


def _array(tensor: Tensor) -> Floats:
    array: Floats = tensor.detach().numpy()
    return array
