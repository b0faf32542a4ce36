"""The copy term as a graph: see `MemoryBlock.copy_file` for its inputs and outputs.

It stays in float32: it is small, and it decides between words.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor, nn

from tinyalign_edge.export.graph import Graph
from tinyalign_edge.export.product import Floats
from tinyalign_edge.train.copying import LEAST, CopyHead

FILE = "copy.onnx"


def export_copy_head(head: CopyHead, folder: Path, *, vocab_size: int) -> None:
    """Write the graph into `folder`."""
    width = head.query.in_features
    graph = Graph("copy")
    logits = graph.input("logits", np.float32, ("A", vocab_size))
    states = _normed(graph, graph.input("states", np.float32, ("A", width)), head.norm, "states")
    texts = _normed(graph, graph.input("texts", np.float32, ("M", 2, width)), head.norm, "texts")
    token_ids = graph.input("token_ids", np.int64, ("M",))
    match = graph.input("match", np.float32, ("A", "M"))
    similarity = graph.input("similarity", np.float32, (1, "M"))
    texts = graph.op("Reshape", texts, graph.constant("side_by_side", np.array([0, -1])))
    queries, keys = (
        graph.op("LpNormalization", _linear(graph, x, linear, name), axis=-1, p=2)
        for x, linear, name in ((states, head.query, "query"), (texts, head.key, "key"))
    )
    cosines = graph.op("MatMul", queries, graph.op("Transpose", keys, perm=(1, 0)))
    scores = graph.op("Mul", cosines, _linear(graph, states, head.alike, "alike"))
    scores = graph.op("Add", scores, graph.op("Mul", match, _linear(graph, states, head.match, "match")))
    scores = graph.op("Add", scores, graph.op("Mul", similarity, _linear(graph, states, head.similar, "similar")))
    places = graph.op("Concat", _linear(graph, states, head.vocabulary, "vocabulary"), scores, axis=1)
    shares = graph.op("LogSoftmax", places, axis=1)  # (A, 1 + M)
    zero, one = (graph.constant(name, np.array([at])) for name, at in (("zero", 0), ("one", 1)))
    end = graph.constant("end", np.array([np.iinfo(np.int64).max]))
    own = graph.op("Add", graph.op("LogSoftmax", logits, axis=1), graph.op("Slice", shares, zero, one, one))
    pointed = graph.op("Exp", graph.op("Slice", shares, one, end, one))  # (A, M)
    nothing = graph.op("ConstantOfShape", graph.op("Shape", logits))
    indices = graph.op("Expand", token_ids, graph.op("Shape", pointed))
    copied = graph.op("ScatterElements", nothing, indices, pointed, axis=1, reduction="add")
    copied = graph.op("Log", graph.op("Add", copied, graph.constant("least", np.array(LEAST, np.float32))))
    apart = graph.op("Neg", graph.op("Abs", graph.op("Sub", own, copied)))  # log(e^a + e^b), stably
    more = graph.op("Log", graph.op("Add", graph.op("Exp", apart), graph.constant("whole", np.array(1, np.float32))))
    graph.op("Add", graph.op("Max", own, copied), more, output="log_probabilities")
    graph.output("log_probabilities", np.float32, ("A", vocab_size))
    graph.save(folder / FILE)


def _normed(graph: Graph, x: str, norm: nn.LayerNorm, name: str) -> str:
    scale, shift = (graph.constant(f"{name}.norm.{n}", _array(getattr(norm, n))) for n in ("weight", "bias"))
    return graph.op("LayerNormalization", x, scale, shift, axis=-1, epsilon=norm.eps)


def _linear(graph: Graph, x: str, linear: nn.Linear, name: str) -> str:
    product = graph.op("MatMul", x, graph.constant(f"{name}.weight", _array(linear.weight).T))
    return graph.op("Add", product, graph.constant(f"{name}.bias", _array(linear.bias)))


def _array(tensor: Tensor) -> Floats:
    array: Floats = tensor.detach().numpy()
    return array
