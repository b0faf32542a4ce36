"""Vision encoder, connector and retrieval key as one ONNX graph. The only file that uses optimum, which traces it."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import onnx
from optimum.exporters.onnx import export
from optimum.exporters.tasks import TasksManager
from torch import Tensor, nn

from tinyalign_edge.errors import UnsupportedError
from tinyalign_edge.export.fold import fold_constants
from tinyalign_edge.export.fuse import fuse
from tinyalign_edge.train.checkpoint import Checkpoint
from tinyalign_edge.train.towers import patch_features

OPSET = 20


class _Eye(nn.Module):
    """`pixel_values` (1, 3, height, width) -> `visual_tokens` (1, N, D) and `key` (1, key_dim)."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.config: Any = checkpoint.vision.model.config
        self.vision = checkpoint.vision.model
        self.pooling = nn.Buffer(checkpoint.model.pooling)
        self.connector = checkpoint.model.connector
        self.key = checkpoint.model.key

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        grid = patch_features(self.vision, pixel_values)
        visual = self.connector(self.pooling @ grid.flatten(1, 2))
        return {"visual_tokens": visual, "key": self.key(self.key.regions(grid))}


def encoder_graph(checkpoint: Checkpoint) -> onnx.ModelProto:
    """The float32 graph for one picture of the checkpoint's image size, attention fused.

    Raises:
        UnsupportedError: an encoder that optimum does not know; the message lists those it does.
    """
    eye = _Eye(checkpoint).eval()
    image = checkpoint.config.image
    config = _config(eye)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "encoder.onnx"
        export(eye, config, path, opset=OPSET, input_shapes={"height": image.height, "width": image.width})
        graph = onnx.load(path)
    _fix_shape(graph, image.height, image.width)
    graph = fold_constants(graph)
    fuse(graph)
    return graph


def _config(eye: _Eye) -> Any:
    """optimum's description of the encoder, with our outputs in place of its own."""
    kind = str(eye.config.model_type)
    try:
        constructor = TasksManager.get_exporter_config_constructor(
            "onnx", model_type=kind.replace("_", "-"), task="feature-extraction", library_name="transformers"
        )
    except (KeyError, ValueError):
        try:
            constructor = TasksManager.get_exporter_config_constructor(
                "onnx", model_type=kind, task="feature-extraction", library_name="transformers"
            )
        except (KeyError, ValueError) as error:
            raise UnsupportedError(
                f"vision encoder of type {kind!r}: optimum has no ONNX export for it ({error})"
            ) from None
    config = constructor(eye.config)
    outputs = OrderedDict(visual_tokens={0: "B"}, key={0: "B"})
    described = type(config)
    config.__class__ = type(described.__name__, (described,), {"outputs": property(lambda _: outputs)})
    return config


class _quiet(warnings.catch_warnings):  # noqa: N801
    """Keeps the tracer's warnings about fixed sizes, which are meant, from the reader."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
        logging.getLogger("optimum").setLevel(logging.ERROR)


def _fix_shape(graph: onnx.ModelProto, height: int, width: int) -> None:
    """One picture of one size: then every shape is known, and what depends on shapes alone is folded."""
    for value, known in ((graph.graph.input[0], (1, 3, height, width)), *((out, (1,)) for out in graph.graph.output)):
        for dim, size in zip(value.type.tensor_type.shape.dim, known, strict=False):
            dim.dim_value = size
