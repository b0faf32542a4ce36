"""What this machine can do at most: int8 products of its matrix kernel, and reading memory; and our share of both."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tinyalign_edge.bench.peers.plan import OURS
from tinyalign_edge.bench.peers.shapes import LANGUAGE
from tinyalign_edge.export.graph import IR_VERSION, MICROSOFT, OPSETS

SIDE = 2048
ROWS = (256, 768)
READ_BYTES = 2**29  # far above any cache
SECONDS = 1.5


def measure_limits() -> dict[str, Any]:
    """Multiply-adds a second of a product with int8 weights, and bytes read a second, with 1 and 2 threads."""
    memory = np.ones(READ_BYTES // 8, np.int64)
    products, reads = [], []
    for threads in (1, 2):
        for kind in ("DynamicQuantizeMatMul", "MatMulInteger"):
            products += [_product(kind, rows, threads) for rows in ROWS]
        reads.append({"threads": threads, "bytes_per_s": _read(memory, threads)})
    return {"products": products, "reads": reads}


def shares(rows: list[dict[str, Any]], limits: dict[str, Any]) -> list[dict[str, Any]]:
    """Of our int8 rows: multiply-adds of prefill and bytes of decode, beside the limit for that number of threads."""
    found = []
    for row in rows:
        if (row["engine"], row["precision"]) != (OURS, "int8") or row["phase"] == "encode":
            continue
        config = LANGUAGE[row["model"]].config
        per_token = {"prefill": multiply_adds(config, row["tokens"]) / row["tokens"],
                     "decode": read_bytes(config, row["context"] + row["tokens"] // 2)}[row["phase"]]  # fmt: skip
        if row["phase"] == "prefill":
            limit = max(p["macs_per_s"] for p in limits["products"] if p["threads"] == row["threads"])
        else:
            limit = max(p["bytes_per_s"] for p in limits["reads"] if p["threads"] == row["threads"])
        reached = per_token * row["median_per_s"]
        about = {key: row[key] for key in ("model", "threads", "phase", "tokens", "context")}
        unit = "multiply-adds a second" if row["phase"] == "prefill" else "bytes a second"
        found.append({**about, "unit": unit, "reached": reached, "limit": limit, "share": reached / limit})
    return found


def layer_weights(config: dict[str, Any]) -> int:
    """Weights in the matrix products of all layers."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    kv_width = width * config["num_key_value_heads"] // heads
    each: int = 2 * width * width + 2 * width * kv_width + 3 * width * config["intermediate_size"]
    return each * int(config["num_hidden_layers"])


def multiply_adds(config: dict[str, Any], tokens: int) -> int:
    """Int8 multiply-adds of a prompt; the last position alone gets logits. Attention is float32 and not counted."""
    return layer_weights(config) * tokens + int(config["hidden_size"] * config["vocab_size"])


def read_bytes(config: dict[str, Any], context: int) -> int:
    """Bytes that a decoding step has to read: int8 weights with `lm_head`, keys and values in float32."""
    kv_width = config["hidden_size"] * config["num_key_value_heads"] // config["num_attention_heads"]
    cache = config["num_hidden_layers"] * 2 * kv_width * context * 4
    return int(layer_weights(config) + config["hidden_size"] * config["vocab_size"] + cache)


def _product(kind: str, rows: int, threads: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.integers(-127, 128, (SIDE, SIDE), np.int8), "weight")
    scale = numpy_helper.from_array(np.full(SIDE, 1e-3, np.float32), "scale")
    if kind == "MatMulInteger":
        node, given, taken = helper.make_node(kind, ["x", "weight"], ["y"]), TensorProto.UINT8, TensorProto.INT32
        x: NDArray[Any] = rng.integers(0, 256, (rows, SIDE)).astype(np.uint8)
    else:
        node = helper.make_node(kind, ["x", "weight", "scale"], ["y"], domain=MICROSOFT)
        given = taken = TensorProto.FLOAT
        x = rng.standard_normal((rows, SIDE), np.float32)
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", given, (rows, SIDE))],
        [helper.make_tensor_value_info("y", taken, (rows, SIDE))],
        [weight, scale] if kind != "MatMulInteger" else [weight],
    )
    opsets = [helper.make_opsetid(domain, version) for domain, version in OPSETS.items()]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    seconds = _fastest(lambda: session.run(None, {"x": x}))
    return {"kind": kind, "rows": rows, "side": SIDE, "threads": threads, "macs_per_s": rows * SIDE * SIDE / seconds}


def _read(memory: NDArray[np.int64], threads: int) -> float:
    pieces = np.array_split(memory, threads)
    with ThreadPoolExecutor(threads) as pool:
        return memory.nbytes / _fastest(lambda: list(pool.map(np.bitwise_or.reduce, pieces)))


def _fastest(call: Callable[[], object]) -> float:
    """The least seconds that one call took, in `SECONDS` of calls: other work on the machine only adds."""
    call()
    end, best = time.perf_counter() + SECONDS, float("inf")
    while (start := time.perf_counter()) < end:
        call()
        best = min(best, time.perf_counter() - start)
    return best
