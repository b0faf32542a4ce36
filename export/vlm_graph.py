"""The vision graphs of whole models, traced by torch, with a memory and without."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import onnx
import torch
from torch import nn

from tinyalign_edge.bundle import ImageConfig
from tinyalign_edge.export.encoder import OPSET, Eye
from tinyalign_edge.export.fold import fold_constants
from tinyalign_edge.export.fuse import fuse
from tinyalign_edge.export.limits import refuse_large
from tinyalign_edge.train.checkpoint import Checkpoint
from tinyalign_edge.train.connector import Patches
from tinyalign_edge.train.vlm import WholeModel


def whole_graph(whole: WholeModel) -> onnx.ModelProto:
    """The float32 graph of a model as it is: `pixel_values` (1, 3, height, width) -> `visual_tokens` (1, N, D)."""
    eye = nn.Sequential(whole.vision.model, Patches(whole.connector), whole.projector)
    return _trace(eye, ("visual_tokens",), whole.vision.image)


def remembering_graph(checkpoint: Checkpoint) -> onnx.ModelProto:
    """The float32 graph of one that was given a memory: what `Eye` gives."""
    eye = Eye(checkpoint.vision.model, checkpoint.model, checkpoint.vision.grid).eval()
    return _trace(eye, eye.outputs, checkpoint.vision.image)


def _trace(eye: nn.Module, outputs: Sequence[str], image: ImageConfig) -> onnx.ModelProto:
    """The graph for one picture of the model's size, constants folded and attention fused."""
    refuse_large(eye, "vision tower")
    example = torch.zeros(1, 3, image.height, image.width)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # the tracer's, about sizes that become constants: they are meant to
        path = Path(folder) / "encoder.onnx"
        torch.onnx.export(
            eye,
            (example,),
            path,
            opset_version=OPSET,
            dynamo=False,
            input_names=["pixel_values"],
            output_names=list(outputs),
        )
        graph = fold_constants(onnx.load(path))
    fuse(graph)
    return graph
