"""The graph builder, its data file, and matrices in float32 and int8, through onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from tinyalign_edge.bundle import Format, Target
from tinyalign_edge.export.graph import PAGE_BYTES, DataFile, Graph
from tinyalign_edge.export.plan import MAX_LEVELS
from tinyalign_edge.export.processor import own_plan
from tinyalign_edge.export.product import lookup, product, quantize_blocks, quantize_rows

Floats = NDArray[np.float32]
INT8 = own_plan("int8")
MAX_LEVEL = INT8.max_level


def normal(*shape: int) -> Floats:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def run_product(folder: Path, x: Floats, rows: Floats, bias: Floats | None = None, **options: Any) -> Floats:
    graph = Graph("product")
    graph.input("x", np.float32, ("T", rows.shape[1]))
    graph.output(product(graph, "x", rows, bias, name="linear", **options), np.float32, ("T", rows.shape[0]))
    graph.save(folder / "product.onnx")
    found: Floats = ort.InferenceSession(folder / "product.onnx").run(None, {"x": x})[0]
    return found


def worst(found: Floats, wanted: Floats) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def test_a_data_file_keeps_equal_arrays_once_and_starts_each_on_a_page(tmp_path: Path) -> None:
    data = DataFile(tmp_path / "data")
    a, b = normal(40, 50), normal(30, 50) + 1
    first, second = data.add(a), data.add(b)
    assert data.add(a.copy()) == first
    assert (first.offset, first.length, second.offset) == (0, 8000, 2 * PAGE_BYTES)
    content = (tmp_path / "data").read_bytes()
    assert len(content) == 2 * PAGE_BYTES + 6000
    assert content[2 * PAGE_BYTES :] == b.tobytes()


def test_two_graphs_read_one_table_of_one_data_file(tmp_path: Path) -> None:
    table, data = normal(100, 64), DataFile(tmp_path / "shared.data")
    find, head = Graph("find"), Graph("head")
    find.input("ids", np.int64, ("B", "T"))
    lookup(find, "ids", table, name="table", plan=INT8, output="rows")
    find.output("rows", np.float32, ("B", "T", 64))
    head.input("x", np.float32, ("T", 64))
    head.output(product(head, "x", table, name="head", plan=INT8, as_table=True), np.float32, ("T", 100))
    for graph, name in ((find, "find.onnx"), (head, "head.onnx")):
        graph.save(tmp_path / name, data=data)
    assert (tmp_path / "shared.data").stat().st_size == table.size
    levels, scales = quantize_rows(table, MAX_LEVEL)
    rows = ort.InferenceSession(tmp_path / "find.onnx").run(None, {"ids": np.array([[7, 99]])})[0]
    assert np.array_equal(rows[0], (levels * scales[:, None])[[7, 99]])
    products = ort.InferenceSession(tmp_path / "head.onnx").run(None, {"x": table[:3]})[0]
    assert worst(products, table[:3] @ table.T) < 0.02


@pytest.mark.parametrize(
    ("kind", "bound"), [("fp32", 1e-6), ("int8", 0.02), ("int8_weight", 0.02), ("int4_weight", 0.2)]
)
@pytest.mark.parametrize("level", [False, True])
def test_a_product_is_that_of_numpy(kind: Format, bound: float, level: bool, tmp_path: Path) -> None:
    x, rows, bias = normal(5, 64), normal(32, 64)[::-1], normal(32)
    found = run_product(tmp_path, x, rows, bias, level=level, plan=own_plan(kind))
    assert worst(found, x @ rows.T + bias) < bound


def test_levelling_keeps_a_large_row_from_spoiling_the_others(tmp_path: Path) -> None:
    x, rows = normal(6, 64), normal(32, 64)[::-1]
    x[0] *= 300
    x[5] = 0
    errors = [
        worst(run_product(tmp_path, x, rows, plan=INT8, level=level)[1:], x[1:] @ rows.T) for level in (False, True)
    ]
    assert errors[0] > 0.3 > 0.02 > errors[1]


def test_int8_rows_are_symmetric_and_a_row_of_zeros_stays_zero() -> None:
    levels, scales = quantize_rows(np.array([[1.27, -0.5, 0.004], [0, 0, 0]], np.float32))
    assert levels.tolist() == [[127, -50, 0], [0, 0, 0]]
    assert scales[0] == pytest.approx(0.01)


def saturating_product(x: NDArray[np.uint8], levels: NDArray[np.int8]) -> NDArray[np.int64]:
    """x (T, K) times levels (N, K), as x86 without VNNI computes it: `vpmaddubsw` adds pairs of u8 * s8 in 16 bits.

    An emulation, since the processor that runs the tests may well have VNNI and never saturate.
    """
    terms = x[:, None].astype(np.int64) * levels[None]  # (T, N, K)
    limits = np.iinfo(np.int16)
    return np.clip(terms[..., ::2] + terms[..., 1::2], limits.min, limits.max).sum(axis=2)


@pytest.mark.parametrize(("target", "exact"), [("vnni", False), ("avx2", True), ("portable", True)])
def test_a_target_without_vnni_is_kept_from_saturating(target: Target, exact: bool) -> None:
    rows = np.tile(np.array([[1, 1, -1, -1], [1, -1, 1, -1]], np.float32), 16)  # pairs of one sign reach the limit
    levels, _ = quantize_rows(rows, MAX_LEVELS[target])
    x = np.full((3, 64), 255, np.uint8)
    x[1] //= 2
    x[2, ::3] = 0
    wanted = x.astype(np.int64) @ levels.T.astype(np.int64)
    assert np.array_equal(saturating_product(x, levels), wanted) == exact


@pytest.mark.parametrize("level", [63, 127])
def test_the_default_target_has_the_largest_weights_that_this_processor_multiplies_exactly(
    level: int, tmp_path: Path
) -> None:
    w = np.tile(np.array([[level, level], [-level, -level], [level, -level]], np.int8), 48).T  # (96, 3)
    graph = Graph("product")
    x = graph.input("x", np.uint8, (5, 96))
    graph.op("MatMulInteger", x, graph.constant("w", w), output="y")
    graph.output("y", np.int32, (5, 3))
    graph.save(tmp_path / "product.onnx")
    bytes_ = np.full((5, 96), 255, np.uint8) - np.arange(5, dtype=np.uint8)[:, None]
    (y,) = ort.InferenceSession(tmp_path / "product.onnx", providers=["CPUExecutionProvider"]).run(None, {"x": bytes_})
    assert np.array_equal(y, bytes_.astype(np.int64) @ w.astype(np.int64)) == (level <= MAX_LEVEL)


def test_seven_bits_give_up_half_of_a_levels_precision_and_no_more() -> None:
    rows = normal(64, 256)
    errors = []
    for target in ("vnni", "avx2"):
        levels, scales = quantize_rows(rows, MAX_LEVELS[target])  # type: ignore[index]
        errors.append(worst(levels * scales[:, None], rows))
    assert errors[1] == pytest.approx(errors[0] * 127 / 63, rel=0.05)


def test_blocks_of_four_and_eight_bits_hold_the_rows_to_half_a_step() -> None:
    rows = np.pad(normal(6, 40), ((0, 1), (0, 0)))
    for bits in (8, 4):
        packed, scales = quantize_blocks(rows, bits)
        assert packed.shape == (7, 2, 32 * bits // 8)
        levels = packed if bits == 8 else np.stack([packed & 15, packed >> 4], axis=-1).reshape(7, 2, 32)
        found = ((levels.astype(int) - (1 << (bits - 1))) * scales[..., None]).reshape(7, -1)[:, :40]
        step = np.repeat(np.abs(scales), 32, axis=1)[:, :40]
        assert (np.abs(found - rows) <= step * (0.501 if bits == 8 else 1.001)).all()
        assert not found[6].any()


@pytest.mark.parametrize("kind", ["int8", "int8_weight", "int4_weight"])
@pytest.mark.parametrize("width", [64, 40])
def test_a_lookup_finds_what_a_product_multiplies_with(kind: Format, width: int, tmp_path: Path) -> None:
    table, graph, plan = normal(50, width), Graph("both"), own_plan(kind)
    graph.input("ids", np.int64, ("B", "T"))
    graph.input("x", np.float32, ("T", width))
    lookup(graph, "ids", table, name="table", plan=plan, output="rows")
    graph.output("rows", np.float32, ("B", "T", width))
    graph.output(product(graph, "x", table, name="head", plan=plan, as_table=True), np.float32, ("T", 50))
    graph.save(tmp_path / "both.onnx")
    ids = np.arange(50)[None]
    feed = {"ids": ids, "x": np.eye(width, dtype=np.float32)}
    rows, products = ort.InferenceSession(tmp_path / "both.onnx").run(None, feed)
    assert worst(products.T, rows[0]) < 0.01
    assert worst(rows[0], table) < (0.15 if kind == "int4_weight" else 0.01)


def test_a_name_used_twice_is_an_error() -> None:
    graph = Graph("twice")
    graph.constant("a", normal(1))
    with pytest.raises(ValueError, match="constant 'a' is there already"):
        graph.constant("a", normal(1))
