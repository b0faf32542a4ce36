"""The graph that looks token ids up in the embedding table."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tinyalign_edge.bundle import Format
from tinyalign_edge.export.graph import Graph
from tinyalign_edge.export.plan import Plan
from tinyalign_edge.export.product import lookup

Floats = NDArray[np.float32]


def embedding_format(plan: Plan) -> Format:
    """The format of an embedding table that is not `lm_head` too."""
    return "fp32" if plan.base == "fp32" else "int8"


def embed_graph(table: Floats, plan: Plan, *, scale: float = 1.0) -> Graph:
    """The lookup of token ids in `table` (V, D), in the base format of `plan`, its rows multiplied by `scale`."""
    graph = Graph("embed")
    ids = graph.input("input_ids", np.int64, ("B", "T"))
    scaled = scale != 1
    found = lookup(graph, ids, table, name="embed_tokens", plan=plan, output="rows" if scaled else "embeddings")
    if scaled:
        factor = graph.constant("embedding_scale", np.array(scale, np.float32))
        graph.op("Mul", found, factor, output="embeddings")
    graph.output("embeddings", np.float32, ("B", "T", table.shape[1]))
    return graph
