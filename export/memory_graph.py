"""The memory connector as a graph: see `MemoryBlock` for its inputs and outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from tinyalign_edge.export.graph import Graph
from tinyalign_edge.export.plan import Plan
from tinyalign_edge.export.product import Floats, product
from tinyalign_edge.train.connector import MemoryConnector

FILE = "memory_connector.onnx"


def export_memory_connector(connector: MemoryConnector, folder: Path, *, plan: Plan) -> None:
    """Write the graph into `folder`."""
    width = connector.rank.shape[1]
    graph = Graph("memory_connector")
    hybrid = connector.kind == "hybrid"
    latent_dim = connector.expand.in_features if connector.expand else 0
    values = graph.input("values", np.float32, ("T", width) if hybrid else ("M", latent_dim or width))
    latents = graph.input("latents", np.float32, ("P", latent_dim)) if hybrid else values
    rank = graph.input("rank", np.int64, ("M",))
    similarity = graph.input("similarity", np.float32, ("M",))
    if connector.expand is not None:
        weight, bias = _array(connector.expand.weight), _array(connector.expand.bias)
        expanded = product(graph, latents, weight, bias, name="expand", plan=plan, level=True)
        values = _in_order(graph, expanded, values) if hybrid else expanded
    ranked = graph.op("Gather", graph.constant("rank_vectors", _array(connector.rank)), rank)  # (M, D)
    column = graph.op("Unsqueeze", similarity, graph.constant("last", np.array([1])))  # (M, 1)
    told = graph.op("Mul", column, graph.constant("similarity_vector", _array(connector.similarity)))
    values = graph.op("Add", graph.op("Add", values, ranked), told)
    scale, shift = (graph.constant(f"norm.{n}", _array(getattr(connector.norm, n))) for n in ("weight", "bias"))
    normed = graph.op("LayerNormalization", values, scale, shift, epsilon=connector.norm.eps)
    hidden = product(graph, normed, _array(connector.up.weight), _array(connector.up.bias), name="up", plan=plan)
    hidden = graph.op("Gelu", hidden)
    residual = product(
        graph, hidden, _array(connector.down.weight), _array(connector.down.bias), name="down", plan=plan, level=True
    )
    if connector.gate is None:
        graph.op("Add", values, residual, output="memory_tokens")
    else:
        _gate(graph, connector, normed, graph.op("Add", values, residual))
    graph.output("memory_tokens", np.float32, ("M", width))
    graph.save(folder / FILE)


def _in_order(graph: Graph, latents: str, text: str) -> str:
    """Rows (P, D) and (T, D) in the order in which they are read."""
    order = graph.input("order", np.int64, ("M",))
    return graph.op("Gather", graph.op("Concat", latents, text, axis=0), order)


def _gate(graph: Graph, connector: MemoryConnector, normed: str, tokens: str) -> None:
    """`nothing + gate * (tokens - nothing)`; the gate, one number a token, stays in float32."""
    assert connector.gate is not None
    assert connector.nothing is not None
    closing = graph.op("MatMul", normed, graph.constant("gate.weight", _array(connector.gate.weight).T))  # (M, 1)
    share = graph.op("Sigmoid", graph.op("Add", closing, graph.constant("gate.bias", _array(connector.gate.bias))))
    nothing = graph.constant("nothing", _array(connector.nothing))
    passed = graph.op("Mul", share, graph.op("Sub", tokens, nothing))
    graph.op("Add", nothing, passed, output="memory_tokens")


def _array(tensor: Tensor) -> Floats:
    array: Floats = tensor.detach().numpy()
    return array
