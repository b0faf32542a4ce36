"""Graph clean-up with onnxruntime's own optimiser."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx
import onnxruntime as ort

KEPT_APART = ["MatMulAddFusion"]  # products stay MatMul nodes under their own names: they are fused and quantised later


def fold_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """Fold constants and drop dead nodes; operators stay those of the ONNX standard."""
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "before.onnx", Path(folder) / "after.onnx"
        onnx.save(model, before)
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(after)
        options.log_severity_level = 3
        ort.InferenceSession(before, options, providers=["CPUExecutionProvider"], disabled_optimizers=KEPT_APART)
        return onnx.load(after)
