"""`Gemm` with a constant matrix as `MatMul` and `Add`, so that its matrix can be quantised as all others are."""

from __future__ import annotations

import numpy as np
from onnx import helper, numpy_helper
from onnx.onnx_ml_pb2 import GraphProto, NodeProto

PLAIN = {"alpha": 1.0, "beta": 1.0, "transA": 0}


def split_gemm(graph: GraphProto) -> None:
    """Rewrite the nodes in place; one that scales, or transposes its first input, stays."""
    weights = {weight.name: weight for weight in graph.initializer}
    nodes: list[NodeProto] = []
    for node in graph.node:
        settings = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        plain = all(settings.get(key, value) == value for key, value in PLAIN.items())
        if node.op_type != "Gemm" or node.input[1] not in weights or not plain:
            nodes.append(node)
            continue
        x, matrix, *bias = node.input
        if settings.get("transB"):
            turned = np.ascontiguousarray(numpy_helper.to_array(weights[matrix]).T)
            matrix = f"{node.name}.matrix"
            graph.initializer.append(numpy_helper.from_array(turned, matrix))
        product = f"{node.name}.product" if bias else node.output[0]
        nodes.append(helper.make_node("MatMul", [x, matrix], [product], name=node.name))
        if bias:
            nodes.append(helper.make_node("Add", [product, *bias], node.output, name=f"{node.name}.bias"))
    del graph.node[:]
    graph.node.extend(nodes)
