"""Which int8 weights this processor multiplies exactly: those of the target that bundles have by default."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime as ort

from tinyalign_edge.bundle import Format, Target
from tinyalign_edge.export.graph import Graph
from tinyalign_edge.export.plan import INT8_MAX, MAX_LEVELS, Plan

ROWS, COLUMNS = 8, 64


@cache
def own_target() -> Target:
    """`vnni`, whose files are those of `arm64`; `avx2` where the sum of two products of bytes is cut to 16 bits."""
    graph = Graph("product")
    x = graph.input("x", np.uint8, (1, COLUMNS))
    graph.op("MatMulInteger", x, graph.constant("w", np.full((COLUMNS, ROWS), INT8_MAX, np.int8)), output="y")
    graph.output("y", np.int32, (1, ROWS))
    with tempfile.TemporaryDirectory() as folder:
        graph.save(Path(folder) / "product.onnx")
        session = ort.InferenceSession(Path(folder) / "product.onnx", providers=["CPUExecutionProvider"])
        (y,) = session.run(None, {x: np.full((1, COLUMNS), 255, np.uint8)})
    return "vnni" if (y == 255 * INT8_MAX * COLUMNS).all() else "avx2"


def own_plan(base: Format, given_back: Mapping[str, Format] | None = None) -> Plan:
    """The plan of a component in `base`, but for what is given back, for `own_target`."""
    return Plan(base, given_back or {}, max_level=MAX_LEVELS[own_target()])
