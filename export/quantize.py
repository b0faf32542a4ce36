"""A float32 encoder graph to int8.

Matrix products with constant weights become `DynamicQuantizeMatMul`: int8 weights with one scale an output channel,
activations quantised as they come. Convolutions keep float32 arithmetic and get int8 weights, which onnxruntime
unpacks once when it loads the graph: with activations in int8 too (static ranges, calibrated), MobileNetV2's visual
tokens fell far below the gate. Grouped convolutions stay float32: they hold few bytes.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.onnx_ml_pb2 import GraphProto, NodeProto, TensorProto

from tinyalign_edge.export.fuse import fold_biases
from tinyalign_edge.export.graph import MICROSOFT
from tinyalign_edge.export.product import quantize_rows

KEY_SCOPE = "/key/"  # the retrieval key stays float32: it is compared with keys that torch made


def quantize_encoder(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of the encoder graph with int8 weights."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[NodeProto] = []
    for node in graph.node:
        weight = weights.get(node.input[1]) if len(node.input) > 1 else None
        if weight is None or node.name.startswith(KEY_SCOPE) or weight.data_type != TensorProto.FLOAT:
            nodes.append(node)
        elif node.op_type == "MatMul" and len(weight.dims) == 2:
            nodes.append(_quantize_product(graph, node, weight))
        elif node.op_type == "Conv" and _groups(node) == 1:
            nodes += _quantize_convolution(graph, node, weight)
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    fold_biases(graph)
    _drop_unused(graph)
    if not any(opset.domain == MICROSOFT for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    return model


def _quantize_product(graph: GraphProto, node: NodeProto, weight: TensorProto) -> NodeProto:
    levels, scales = quantize_rows(np.ascontiguousarray(numpy_helper.to_array(weight).T))  # (N, K), (N,)
    names = f"{node.name}.levels", f"{node.name}.scales"
    graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(levels.T), names[0]))
    graph.initializer.append(numpy_helper.from_array(scales, names[1]))
    return helper.make_node(
        "DynamicQuantizeMatMul", [node.input[0], *names], list(node.output), name=node.name, domain=MICROSOFT
    )


def _quantize_convolution(graph: GraphProto, node: NodeProto, weight: TensorProto) -> list[NodeProto]:
    array = numpy_helper.to_array(weight)  # (out channels, in channels, height, width)
    levels, scales = quantize_rows(array.reshape(len(array), -1))
    names = f"{node.name}.levels", f"{node.name}.scales", f"{node.name}.weight"
    graph.initializer.append(numpy_helper.from_array(levels.reshape(array.shape), names[0]))
    graph.initializer.append(numpy_helper.from_array(scales, names[1]))
    unpack = helper.make_node("DequantizeLinear", names[:2], [names[2]], name=f"{node.name}.unpack", axis=0)
    convolution = NodeProto()
    convolution.CopyFrom(node)
    convolution.input[1] = names[2]
    return [unpack, convolution]


def _groups(node: NodeProto) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)


def _drop_unused(graph: GraphProto) -> None:
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
