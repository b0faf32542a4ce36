"""How much each matrix of a written graph loses by its format, on real inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.onnx_ml_pb2 import NodeProto

from tinyalign_edge.bundle import DecoderBlock
from tinyalign_edge.export.matrices import Floats, constants, find_matrices, matrix_rows
from tinyalign_edge.export.product import quantize_rows
from tinyalign_edge.runtime.decoder import CACHE_DTYPES
from tinyalign_edge.runtime.sessions import open_session

Feed = Mapping[str, NDArray[Any]]

WATCHED = "watched.onnx"
BIAS = 4  # of DynamicQuantizeMatMul's inputs


def relative_errors(exact: Path, written: Path, feeds: Sequence[Feed]) -> dict[str, float]:
    """The error that each matrix of the graph `written` adds, by itself, to what it is given.

    Args:
        exact: the same graph in float32.
        feeds: inputs, one run each.

    Returns:
        node name to the mean over rows of |y - x w|² / |x w|², where x and y are the product's own input and output
        in `written` and w is its float32 matrix; of a convolution, |w' - w|² / |w|² of its weight. Nodes in float32
        are left out.
    """
    model, reference = (onnx.load(path, load_external_data=False) for path in (written, exact))
    matrices = find_matrices(reference)
    nodes = {n.name: n for n in model.graph.node if n.name in matrices and n.op_type != "MatMul"}
    products = [node for name, node in nodes.items() if not matrices[name].convolution]
    sums = {node.name: 0.0 for node in products}
    held = constants(model)
    biases = {n.name: numpy_helper.to_array(held[n.input[BIAS]]) for n in products if len(n.input) > BIAS}
    for values in watch(model, products, written.with_name(WATCHED), feeds):
        for node in products:
            rows = matrix_rows(reference, matrices[node.name], exact.parent)
            y = values[node.output[0]] - biases.get(node.name, 0)
            sums[node.name] += _row_error(values[node.input[0]], y, rows)
    convolutions = {name: matrices[name] for name in nodes if matrices[name].convolution}
    errors = {name: _weight_error(matrix_rows(reference, m, exact.parent)) for name, m in convolutions.items()}
    return {name: total / len(feeds) for name, total in sums.items()} | errors


def decoder_feed(block: DecoderBlock, embeddings: Floats, num_logits: int) -> dict[str, NDArray[Any]]:
    """The decoder's inputs for a prefill of `embeddings` (T, D) into an empty cache."""
    tokens = len(embeddings)
    buffer = np.zeros((1, block.kv_heads, tokens, block.head_dim), CACHE_DTYPES[block.kv])
    pasts = [name % i for i in range(block.layers) for name in (block.past_key, block.past_value)]
    return {
        "inputs_embeds": embeddings[None],
        "seqlens_k": np.array([tokens - 1], np.int32),
        "total_sequence_length": np.array(tokens, np.int32),
        "num_logits": np.array(num_logits, np.int64),
        **dict.fromkeys(pasts, buffer),
    }


def watch(model: onnx.ModelProto, nodes: Sequence[NodeProto], path: Path, feeds: Sequence[Feed]) -> Any:
    """Run the graph with the inputs and outputs of `nodes` made visible; yields them by name, one dict a feed."""
    names = list(dict.fromkeys(name for node in nodes for name in (node.input[0], node.output[0])))
    known = {value.name for value in (*model.graph.input, *model.graph.output)}
    model.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names if name not in known
    )
    onnx.save(model, path)  # beside its external data
    try:
        session = open_session(path)
        for feed in feeds:
            wanted = [name for name in names if name not in feed]
            yield {**feed, **dict(zip(wanted, session.run(wanted, feed), strict=True))}
    finally:
        path.unlink()


def _row_error(x: Floats, y: Floats, rows: Floats) -> float:
    exact = x.reshape(-1, x.shape[-1]) @ rows.T
    off = np.square(y.reshape(exact.shape) - exact).sum(axis=1)
    return float((off / np.maximum(np.square(exact).sum(axis=1), np.finfo(np.float32).tiny)).mean())


def _weight_error(rows: Floats) -> float:
    levels, scales = quantize_rows(rows)
    return float(np.square(levels * scales[:, None] - rows).sum() / np.square(rows).sum())
