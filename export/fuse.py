"""Fused operators in a traced encoder graph: attention, and biases of int8 products.

The rest is left to onnxruntime, which fuses activations when it loads a graph. Residual sums and norms stay apart:
`SkipLayerNormalization` is the slower kernel on CPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.onnx_ml_pb2 import GraphProto, NodeProto

from tinyalign_edge.export.graph import MICROSOFT

Shapes = dict[str, tuple[int, ...]]

HEADS_FORWARD = (0, 2, 1, 3)  # (B, S, H, D) to (B, H, S, D), and back
MAX_SHAPE_LENGTH = 8  # a longer constant is not a shape
KEYS_FORWARD = (0, 2, 3, 1)  # (B, S, H, D) to (B, H, D, S)


def fuse(model: onnx.ModelProto) -> None:
    """Put `MultiHeadAttention` into a folded graph of fixed shapes, in place.

    Matrix products stay the nodes they were, under their names. What does not look as expected is left as it is, so
    that the graph computes the same in any case.
    """
    shapes = _shapes(model)
    _fuse_attention(model.graph, shapes)
    if not any(opset.domain == MICROSOFT for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))


def fused_attentions(model: onnx.ModelProto) -> int:
    """How many attention blocks of the graph are one operator."""
    return sum(node.op_type == "MultiHeadAttention" for node in model.graph.node)


def _shapes(model: onnx.ModelProto) -> Shapes:
    """Shapes of the values whose every dimension is known."""
    outline = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    outline.graph.node.extend(model.graph.node)
    outline.graph.input.extend(model.graph.input)
    for tensor in model.graph.initializer:  # large ones by their shape alone
        if np.prod(tensor.dims) <= MAX_SHAPE_LENGTH:
            outline.graph.initializer.append(tensor)
        else:
            outline.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    graph = onnx.shape_inference.infer_shapes(outline).graph
    found = {}
    for value in (*graph.input, *graph.value_info, *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        if all(dim.dim_value > 0 for dim in dims):
            found[value.name] = tuple(dim.dim_value for dim in dims)
    return found


def fold_biases(graph: GraphProto) -> None:
    """Give each `DynamicQuantizeMatMul` the bias that is added to its result, in place: it costs nothing there."""
    index = _Index(graph, {})
    for add in [node for node in graph.node if node.op_type == "Add"]:
        for value, bias in (add.input, reversed(add.input)):
            product, constant = index.maker(value, "DynamicQuantizeMatMul"), index.constant(bias)
            if product is not None and constant is not None and constant.ndim == 1 and index.reads[value] == 1:
                product.input.extend(["", bias])
                product.output[0] = add.output[0]
                graph.node.remove(add)


@dataclass(frozen=True)
class _Heads:
    """A value split into heads: what it was before, (B, S, H * D), and by what it was multiplied."""

    source: str
    heads: int
    scale: float


class _Index:
    """Who makes and who reads each value of a graph, and the values that are constants."""

    def __init__(self, graph: GraphProto, shapes: Shapes) -> None:
        self.shapes = shapes
        self.makers = {name: node for node in graph.node for name in node.output}
        self.reads = Counter(name for node in graph.node for name in node.input)
        self.reads.update(output.name for output in graph.output)
        self.readers = {name: node for node in graph.node for name in node.input}  # the only one where `reads` is 1
        self._constants = {tensor.name: tensor for tensor in graph.initializer}

    def maker(self, name: str, kind: str) -> NodeProto | None:
        node = self.makers.get(name)
        return node if node is not None and node.op_type == kind else None

    def only_reader(self, node: NodeProto, kind: str) -> NodeProto | None:
        """The node of that kind that alone reads the first output of `node`."""
        reader = self.readers.get(node.output[0])
        alone = self.reads[node.output[0]] == 1
        return reader if reader is not None and alone and reader.op_type == kind else None

    def constant(self, name: str) -> NDArray[np.generic] | None:
        return numpy_helper.to_array(self._constants[name]) if name in self._constants else None

    def without_scale(self, name: str) -> tuple[str, float]:
        """A value without the multiplications by one number that it ends with, and their product."""
        product = self.maker(name, "Mul")
        for value, factor in (product.input, reversed(product.input)) if product else ():
            number = self.constant(factor)
            if number is not None and number.size == 1:
                inner, scale = self.without_scale(value)
                return inner, scale * float(number.item())  # type: ignore[arg-type]
        return name, 1.0

    def heads(self, name: str, order: Sequence[int]) -> _Heads | None:
        """The value that became `name` by Reshape to (B, S, H, D) and Transpose."""
        moved, scale = self.without_scale(name)
        transpose = self.maker(moved, "Transpose")
        reshape = self.maker(transpose.input[0], "Reshape") if transpose and _order(transpose) == tuple(order) else None
        shape = self.shapes.get(reshape.output[0], ()) if reshape else ()
        before = self.shapes.get(reshape.input[0], ()) if reshape else ()
        if reshape is None or len(shape) != 4 or before != (*shape[:2], shape[2] * shape[3]):
            return None
        return _Heads(reshape.input[0], shape[2], scale)


def _fuse_attention(graph: GraphProto, shapes: Shapes) -> None:
    index = _Index(graph, shapes)
    for softmax in [node for node in graph.node if node.op_type == "Softmax"]:
        scores, scale = index.without_scale(softmax.input[0])
        product, weighted = index.maker(scores, "MatMul"), index.only_reader(softmax, "MatMul")
        back = index.only_reader(weighted, "Transpose") if weighted else None
        merge = index.only_reader(back, "Reshape") if back and _order(back) == HEADS_FORWARD else None
        if product is None or weighted is None or merge is None or weighted.input[0] != softmax.output[0]:
            continue
        query = index.heads(product.input[0], HEADS_FORWARD)
        key, value = index.heads(product.input[1], KEYS_FORWARD), index.heads(weighted.input[1], HEADS_FORWARD)
        if query is None or key is None or value is None or not query.heads == key.heads == value.heads:
            continue
        if value.scale != 1:
            continue
        attention = helper.make_node(
            "MultiHeadAttention",
            [query.source, key.source, value.source],
            list(merge.output),
            name=softmax.name.removesuffix("Softmax") + "MultiHeadAttention",
            domain=MICROSOFT,
            num_heads=query.heads,
            scale=scale * query.scale * key.scale,
        )
        place = list(graph.node).index(merge)
        graph.node.remove(merge)
        graph.node.insert(place, attention)
    _drop_dead_nodes(graph)


def _drop_dead_nodes(graph: GraphProto) -> None:
    """Remove nodes and constants that no output needs."""
    needed = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    constants = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(reversed(kept))
    graph.initializer.extend(constants)


def _order(transpose: NodeProto) -> tuple[int, ...]:
    return next((tuple(a.ints) for a in transpose.attribute if a.name == "perm"), ())
