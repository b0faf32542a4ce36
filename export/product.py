"""Matrices in a graph, in float32 or int8: products with them, and lookups of their rows.

A matrix is given as its rows (outputs, inputs), as torch keeps a linear layer and an embedding table. In int8 each
row has one scale; a product's other side is quantised when it runs, with one scale for the whole tensor.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tinyalign_edge.export.graph import MICROSOFT, Graph

Floats = NDArray[np.float32]

INT8_MAX = 127


def quantize_rows(rows: Floats) -> tuple[NDArray[np.int8], Floats]:
    """Round each row to int8, symmetric about zero.

    Returns:
        levels (N, K) int8 in -127..127 and scales (N,) float32, so that `levels * scales[:, None]` is about `rows`.
    """
    scales = np.maximum(np.abs(rows).max(axis=1) / np.float32(INT8_MAX), np.finfo(np.float32).tiny)
    return np.rint(rows / scales[:, None]).astype(np.int8), scales


def product(
    graph: Graph,
    x: str,
    rows: Floats,
    bias: Floats | None = None,
    *,
    name: str,
    int8: bool,
    level: bool = False,
    as_table: bool = False,
) -> str:
    """Add `x @ rows.T + bias`, the product being the node `name`; returns the name of the sum.

    Args:
        x: value (..., K) float32.
        rows: (N, K).
        bias: (N,); None or all zeros adds nothing.
        level: in int8, divide each row of `x` by its largest magnitude and multiply the result by it, so that one
            large row does not take the range from the others. No effect in float32.
        as_table: keep the rows in the data file as `lookup` keeps them, so that both share one place there;
            onnxruntime transposes them when it loads the graph.
    """
    levels, scales = quantize_rows(rows) if int8 else (rows, None)
    if as_table:
        weight = graph.op("Transpose", graph.constant(f"{name}.weight", levels), perm=(1, 0))
    else:
        weight = graph.constant(f"{name}.weight", levels.T)
    if scales is None:
        y = graph.op("MatMul", x, weight, name=name)
    else:
        peaks = _row_peaks(graph, x, name) if level else ""
        inputs = (graph.op("Div", x, peaks) if level else x, weight, graph.constant(f"{name}.scale", scales))
        y = graph.op("DynamicQuantizeMatMul", *inputs, name=name, domain=MICROSOFT)
        y = graph.op("Mul", y, peaks) if level else y
    return y if bias is None or not bias.any() else graph.op("Add", y, graph.constant(f"{name}.bias", bias))


def _row_peaks(graph: Graph, x: str, name: str) -> str:
    """The largest magnitude of each row of `x`: (..., K) to (..., 1), above zero."""
    axis = graph.constant(f"{name}.axis", np.array([-1]))
    smallest = graph.constant(f"{name}.smallest_peak", np.array(np.finfo(np.float32).tiny))
    return graph.op("Max", graph.op("ReduceMax", graph.op("Abs", x), axis), smallest)


def lookup(graph: Graph, ids: str, rows: Floats, *, name: str, int8: bool, output: str) -> str:
    """Add `rows[ids]`: ids (B, T) int64 to `output` (B, T, D) float32; rows (V, D)."""
    levels, scales = quantize_rows(rows) if int8 else (rows, None)
    weight = graph.constant(f"{name}.weight", levels)
    if scales is None:
        return graph.op("Gather", weight, ids, output=output)
    found = graph.op("Cast", graph.op("Gather", weight, ids), to=1)  # 1: float32
    scale = graph.op("Gather", graph.constant(f"{name}.scale", scales[:, None]), ids)  # (B, T, 1)
    return graph.op("Mul", found, scale, output=output)
