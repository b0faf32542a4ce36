"""The matrices of a float32 graph: what a plan can give a format to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.onnx_ml_pb2 import NodeProto, TensorProto

Floats = NDArray[np.float32]

KEY_SCOPE = "/key/"  # the retrieval key stays float32: it is compared with keys that torch made


@dataclass(frozen=True)
class Matrix:
    """The constant weight of a product or of an ungrouped convolution; a convolution's rows are its output channels."""

    tensor: str
    rows: int
    columns: int
    transposed: bool  # the tensor is (columns, rows)
    convolution: bool = False


def constants(model: onnx.ModelProto) -> dict[str, TensorProto]:
    """The constants of a graph by their names."""
    return {tensor.name: tensor for tensor in model.graph.initializer}


def find_matrices(model: onnx.ModelProto) -> dict[str, Matrix]:
    """Node name to matrix, in the order of the nodes; external data are not read."""
    tensors = constants(model)
    turned = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Transpose"}
    found = {}
    for node in model.graph.node:
        if len(node.input) < 2 or node.name.startswith(KEY_SCOPE):
            continue
        source = turned.get(node.input[1], node.input[1])
        tensor = tensors.get(source)
        if tensor is None or tensor.data_type != TensorProto.FLOAT:
            continue
        if node.op_type == "MatMul" and len(tensor.dims) == 2:
            transposed = source == node.input[1]
            columns, rows = tensor.dims if transposed else reversed(tensor.dims)
            found[node.name] = Matrix(source, rows, columns, transposed)
        elif node.op_type == "Conv" and _groups(node) == 1:
            found[node.name] = Matrix(source, tensor.dims[0], int(np.prod(tensor.dims[1:])), False, True)
    return found


def matrix_rows(model: onnx.ModelProto, matrix: Matrix, folder: Path) -> Floats:
    """The rows (N, K) of a matrix; external data lie in `folder`."""
    array: Floats = numpy_helper.to_array(constants(model)[matrix.tensor], str(folder))
    return array.T if matrix.transposed else array.reshape(matrix.rows, matrix.columns)


def _groups(node: NodeProto) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
