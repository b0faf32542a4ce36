"""The formats of a matrix: the error of one product in each, with and without an outlier among its inputs.

    python -m tinyalign_edge.bench.formats

Writes `bench/results/formats.json`. Refuses processors whose products of bytes saturate.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tinyalign_edge.bench.record import record
from tinyalign_edge.export.graph import Graph
from tinyalign_edge.export.matrices import Floats
from tinyalign_edge.export.plan import MAX_LEVELS, Plan
from tinyalign_edge.export.processor import own_target
from tinyalign_edge.export.product import product
from tinyalign_edge.runtime.sessions import open_session

SIDE, TOKENS, OUTLIER, CHANNEL = 1024, 256, 200.0, 7
PLANS = {
    "int8": Plan("int8"),
    "int8, 7 bits": Plan("int8", max_level=MAX_LEVELS["avx2"]),
    **{kind: Plan(kind) for kind in ("int8_weight", "int4_weight")},
}


def main() -> None:
    """Measure and record."""
    if own_target() != "vnni":
        raise SystemExit("products of bytes saturate on this processor; measure on one with VNNI, or an ARM")
    rng = np.random.default_rng(0)
    rows, x = (rng.standard_normal((n, SIDE), np.float32) for n in (SIDE, TOKENS))
    scale = np.ones(SIDE, np.float32)
    scale[CHANNEL] = OUTLIER
    result: dict[str, Any] = {"side": SIDE, "tokens": TOKENS, "outlier": OUTLIER, "formats": {}}
    for name, plan in PLANS.items():
        plain, outlier = error(plan, x, rows), error(plan, x * scale, rows / scale)
        result["formats"][name] = {"error": plain, "error_with_outlier": outlier}
        print(f"{name:14} {plain:.2%}  with an outlier {outlier:.2%}")
    print(record("formats", "python -m tinyalign_edge.bench.formats", result))


def error(plan: Plan, x: Floats, rows: Floats) -> float:
    """|y - x w| / |x w| of the product as onnxruntime computes it in the plan's format."""
    graph = Graph("product")
    graph.input("x", np.float32, ("T", SIDE))
    graph.output(product(graph, "x", rows, name="product", plan=plan), np.float32, ("T", SIDE))
    with tempfile.TemporaryDirectory() as folder:
        graph.save(Path(folder) / "product.onnx")
        y = open_session(Path(folder) / "product.onnx", threads=1).run(None, {"x": x})[0]
    exact = x @ rows.T
    return float(np.linalg.norm(y - exact) / np.linalg.norm(exact))


if __name__ == "__main__":
    main()
