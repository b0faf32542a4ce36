"""What is asked, as part of a retrieval key: see `MemoryBlock.question_file`. It stays in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tinyalign_edge.export.graph import Graph
from tinyalign_edge.train.question_key import LEAST, QuestionKey

FILE = "question.onnx"


def export_question_key(key: QuestionKey, folder: Path) -> None:
    """Write the graph into `folder`."""
    dim, width = key.axes.shape
    graph = Graph("question")
    text = graph.input("text", np.float32, ("T", width))
    row = graph.constant("row", np.array([0]))
    words = graph.op("ReduceMean", graph.op("LpNormalization", text, axis=-1, p=2), row, keepdims=0)
    words = graph.op("Sub", words, graph.constant("mean", key.mean.numpy()))
    found = graph.op("MatMul", words, graph.constant("axes", key.axes.numpy().T.copy()))  # (Q,)
    length = graph.op("ReduceL2", found, row, keepdims=1)
    least = graph.constant("least", np.array([LEAST], np.float32))
    unit = graph.op("Div", found, graph.op("Max", length, least))
    nothing = graph.constant("nothing", np.zeros(1, np.float32))
    graph.op("Where", graph.op("Greater", length, least), unit, nothing, output="question")
    graph.output("question", np.float32, (dim,))
    graph.save(folder / FILE)
