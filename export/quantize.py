"""A float32 graph that was traced, with its matrices in the formats of a plan.

Convolutions keep float32 arithmetic and get int8 weights, which onnxruntime unpacks once when it loads the graph: with
activations in int8 too (static ranges, calibrated), MobileNetV2's visual tokens fell far below the gate. Grouped
convolutions stay float32: they hold few bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.onnx_ml_pb2 import GraphProto, NodeProto, TensorProto

from tinyalign_edge.export.fuse import fold_biases
from tinyalign_edge.export.graph import MICROSOFT
from tinyalign_edge.export.matrices import Matrix, constants, find_matrices
from tinyalign_edge.export.plan import BLOCK, Plan
from tinyalign_edge.export.product import ACTIVATIONS_IN_INT8, WEIGHT_BITS, quantize_blocks, quantize_rows


def quantize_graph(model: onnx.ModelProto, plan: Plan) -> onnx.ModelProto:
    """A copy of the graph with its matrices as `plan` says."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    graph = model.graph
    matrices, tensors = find_matrices(model), constants(model)
    nodes: list[NodeProto] = []
    for node in graph.node:
        matrix = matrices.get(node.name)
        if matrix is None or plan.format(node.name) == "fp32":
            nodes.append(node)
        elif matrix.convolution:
            nodes += _quantize_convolution(graph, node, tensors[node.input[1]])
        else:
            nodes.append(_quantize_product(graph, node, matrix, tensors[node.input[1]], plan))
    del graph.node[:]
    graph.node.extend(nodes)
    fold_biases(graph)
    _drop_unused(graph)
    if not any(opset.domain == MICROSOFT for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    return model


def _quantize_product(graph: GraphProto, node: NodeProto, matrix: Matrix, weight: TensorProto, plan: Plan) -> NodeProto:
    rows = np.ascontiguousarray(numpy_helper.to_array(weight).T)  # (N, K)
    names = f"{node.name}.levels", f"{node.name}.scales"
    bits = WEIGHT_BITS.get(plan.format(node.name))
    attributes: dict[str, Any] = {}
    levels: NDArray[Any]
    if bits is None:
        operator = "DynamicQuantizeMatMul"
        levels, scales = quantize_rows(rows, plan.max_level)
        levels = np.ascontiguousarray(levels.T)
    else:
        operator = "MatMulNBits"
        levels, scales = quantize_blocks(rows, bits)
        attributes = {"N": matrix.rows, "K": matrix.columns, "bits": bits, "block_size": BLOCK}
        attributes["accuracy_level"] = ACTIVATIONS_IN_INT8
    graph.initializer.append(numpy_helper.from_array(levels, names[0]))
    graph.initializer.append(numpy_helper.from_array(scales, names[1]))
    inputs = [node.input[0], *names]
    return helper.make_node(operator, inputs, list(node.output), name=node.name, domain=MICROSOFT, **attributes)


def _quantize_convolution(graph: GraphProto, node: NodeProto, weight: TensorProto) -> list[NodeProto]:
    array = numpy_helper.to_array(weight)  # (out channels, in channels, height, width)
    levels, scales = quantize_rows(array.reshape(len(array), -1))  # computed in float32: no target limits them
    names = f"{node.name}.levels", f"{node.name}.scales", f"{node.name}.weight"
    graph.initializer.append(numpy_helper.from_array(levels.reshape(array.shape), names[0]))
    graph.initializer.append(numpy_helper.from_array(scales, names[1]))
    unpack = helper.make_node("DequantizeLinear", names[:2], [names[2]], name=f"{node.name}.unpack", axis=0)
    convolution = NodeProto()
    convolution.CopyFrom(node)
    convolution.input[1] = names[2]
    return [unpack, convolution]


def _drop_unused(graph: GraphProto) -> None:
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
