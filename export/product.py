"""Matrices in a graph: products with them and lookups of their rows, in one of four formats.

    int8         one scale a row; a product's other side is quantised to 8 bits when it runs, with one scale for the
                 whole tensor. The fast one: it reaches the int8 matrix units of a CPU.
    int8_weight  one scale a block of 32 numbers of a row; the other side is quantised block by block, row by row, so
                 that a large number spoils its own block only. 9 bits a weight, as fast as int8 for one token, an
                 order slower for many.
    int4_weight  the same with 4 bits a number: 5 bits a weight.
    fp32         as it is.

A matrix is given as its rows (outputs, inputs), as torch keeps a linear layer and an embedding table.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyalign_edge.bundle import Format
from tinyalign_edge.export.graph import MICROSOFT, Graph
from tinyalign_edge.export.plan import BLOCK, INT8_MAX, Plan

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

WEIGHT_BITS: dict[Format, int] = {"int8_weight": 8, "int4_weight": 4}
ROWS_AT_ONCE = 4096
ACTIVATIONS_IN_INT8 = 4  # accuracy_level of MatMulNBits; with float32 activations one token takes 100 times as long


def quantize_rows(rows: Floats, max_level: int = INT8_MAX) -> tuple[NDArray[np.int8], Floats]:
    """Round each row to int8, symmetric about zero.

    Returns:
        levels (N, K) int8 in -max_level..max_level and scales (N,) float32, so that `levels * scales[:, None]` is
        about `rows`.
    """
    peaks = np.maximum(rows.max(axis=1), -rows.min(axis=1))
    scales = np.maximum(peaks / np.float32(max_level), np.finfo(np.float32).tiny)
    levels = np.empty(rows.shape, np.int8)
    for part in _parts(rows):
        levels[part] = np.rint(rows[part] / scales[part, None])
    return levels, scales


def quantize_blocks(rows: Floats, bits: int) -> tuple[Bytes, Floats]:
    """Round each block of `BLOCK` numbers of a row to 8 or 4 bits, about the middle of the unsigned range.

    Rows are filled up with zeros to whole blocks. The number of largest magnitude falls on an end of the range: with
    4 bits on its lower end, which is the one farther from the middle.

    Returns:
        levels (N, blocks, BLOCK * bits / 8) uint8, the first of two numbers in the lower half of a byte, and scales
        (N, blocks) float32.
    """
    levels, scales = zip(*(_quantize_part(rows[part], bits) for part in _parts(rows)), strict=True)
    return np.concatenate(levels), np.concatenate(scales)


def _parts(rows: Floats) -> Iterator[slice]:
    """Rows in pieces, so that a vocabulary's temporary copies are small."""
    return (slice(start, start + ROWS_AT_ONCE) for start in range(0, len(rows), ROWS_AT_ONCE))


def _quantize_part(rows: Floats, bits: int) -> tuple[Bytes, Floats]:
    middle = 1 << (bits - 1)
    padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % BLOCK)))
    blocks = padded.reshape(len(rows), -1, BLOCK)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2, keepdims=True), axis=2)  # with its sign
    scales: Floats = np.asarray(largest / -middle if bits == 4 else np.abs(largest) / (middle - 1), np.float32)
    scales[scales == 0] = 1
    levels = np.clip(np.rint(blocks / scales) + middle, 0, 2 * middle - 1).astype(np.uint8)
    return levels if bits == 8 else levels[..., ::2] | levels[..., 1::2] << 4, scales[..., 0]


def product(
    graph: Graph,
    x: str,
    rows: Floats,
    bias: Floats | None = None,
    *,
    name: str,
    plan: Plan,
    level: bool = False,
    as_table: bool = False,
) -> str:
    """Add `x @ rows.T + bias`, the product being the node `name`; returns the name of the sum.

    Args:
        x: value (..., K) float32.
        rows: (N, K).
        bias: (N,); None or all zeros adds nothing.
        plan: says the matrix's format under `name`.
        level: in int8, divide each row of `x` by its largest magnitude and multiply the result by it, so that one
            large row does not take the range from the others. No effect in other formats, which do not mix rows.
        as_table: keep the rows in the data file as `lookup` keeps them, so that both share one place there;
            onnxruntime transposes them when it loads the graph.
    """
    kind = plan.format(name)
    if kind in WEIGHT_BITS:
        y = _block_product(graph, x, rows, name, WEIGHT_BITS[kind])
    else:
        peaks = _row_peaks(graph, x, name) if level and kind == "int8" else ""
        x = graph.op("Div", x, peaks) if peaks else x
        levels, scales = quantize_rows(rows, plan.max_level) if kind == "int8" else (rows, None)
        weight = graph.constant(f"{name}.weight", levels if as_table else levels.T)
        weight = graph.op("Transpose", weight, perm=(1, 0)) if as_table else weight
        if scales is None:
            y = graph.op("MatMul", x, weight, name=name)
        else:
            scale = graph.constant(f"{name}.scale", scales)
            y = graph.op("DynamicQuantizeMatMul", x, weight, scale, name=name, domain=MICROSOFT)
        y = graph.op("Mul", y, peaks) if peaks else y
    return y if bias is None or not bias.any() else graph.op("Add", y, graph.constant(f"{name}.bias", bias))


def _block_product(graph: Graph, x: str, rows: Floats, name: str, bits: int) -> str:
    levels, scales = quantize_blocks(rows, bits)
    weight, scale = graph.constant(f"{name}.weight", levels), graph.constant(f"{name}.scale", scales)
    sizes: dict[str, Any] = {"N": rows.shape[0], "K": rows.shape[1], "bits": bits, "block_size": BLOCK}
    return graph.op(
        "MatMulNBits", x, weight, scale, name=name, domain=MICROSOFT, accuracy_level=ACTIVATIONS_IN_INT8, **sizes
    )


def _row_peaks(graph: Graph, x: str, name: str) -> str:
    """The largest magnitude of each row of `x`: (..., K) to (..., 1), above zero."""
    axis = graph.constant(f"{name}.axis", np.array([-1]))
    smallest = graph.constant(f"{name}.smallest_peak", np.array(np.finfo(np.float32).tiny))
    return graph.op("Max", graph.op("ReduceMax", graph.op("Abs", x), axis), smallest)


def lookup(graph: Graph, ids: str, rows: Floats, *, name: str, plan: Plan, output: str) -> str:
    """Add `rows[ids]`: ids (B, T) int64 to `output` (B, T, D) float32; rows (V, D), their format under `name`."""
    kind = plan.format(name)
    if kind in WEIGHT_BITS:
        return _block_lookup(graph, ids, rows, name, WEIGHT_BITS[kind], output)
    levels, scales = quantize_rows(rows, plan.max_level) if kind == "int8" else (rows, None)
    weight = graph.constant(f"{name}.weight", levels)
    if scales is None:
        return graph.op("Gather", weight, ids, output=output)
    found = graph.op("Cast", graph.op("Gather", weight, ids), to=1)  # 1: float32
    scale = graph.op("Gather", graph.constant(f"{name}.scale", scales[:, None]), ids)  # (B, T, 1)
    return graph.op("Mul", found, scale, output=output)


def _block_lookup(graph: Graph, ids: str, rows: Floats, name: str, bits: int, output: str) -> str:
    levels, scales = quantize_blocks(rows, bits)  # the bytes that a product with the same rows reads
    weight = graph.constant(f"{name}.weight", levels.reshape(len(rows), -1))
    scale = graph.constant(f"{name}.scale", scales)
    axes: dict[str, Any] = {"bits": bits, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
    padded = scales.shape[1] * BLOCK > rows.shape[1]
    found = graph.op(
        "GatherBlockQuantized", weight, ids, scale, domain=MICROSOFT, output="" if padded else output, **axes
    )
    if not padded:
        return found
    ends = (np.array([end]) for end in (0, rows.shape[1], -1))
    start, end, axis = (
        graph.constant(f"{name}.{what}", e) for what, e in zip(("start", "end", "axis"), ends, strict=True)
    )
    return graph.op("Slice", found, start, end, axis, output=output)
