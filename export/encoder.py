"""Vision encoder, connector and retrieval key as one ONNX graph. The only file that uses optimum, which traces it."""

from __future__ import annotations

import io
import logging
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import onnx
import torch
from optimum.exporters.onnx import export
from optimum.exporters.tasks import TasksManager
from torch import Tensor, nn
from torch.onnx import OnnxExporterError

from tinyalign_edge.errors import UnsupportedError, first_line
from tinyalign_edge.export.fold import fold_constants
from tinyalign_edge.export.fuse import fuse
from tinyalign_edge.export.limits import refuse_large
from tinyalign_edge.train.checkpoint import Checkpoint
from tinyalign_edge.train.model import AlignModel
from tinyalign_edge.train.towers import INTERPOLATE, VisionTower, patch_features

OPSET = 20  # the first in which Gelu is one operator
ALIKE = {"dinov2_with_registers": "dinov2"}  # kinds that optimum does not name and traces all the same
TESTED = "siglip, clip, dinov2, dinov2_with_registers, vit, mobilenet_v2, convnext"


class Eye(nn.Module):
    """What a bundle's vision graph computes: `pixel_values` (1, 3, height, width) -> `visual_tokens` (1, N, D), `key`
    (1, key_dim), and for a value encoder `features` (1, N, C)."""

    def __init__(self, vision: nn.Module, model: AlignModel, grid: tuple[int, int, int]) -> None:
        super().__init__()
        self.config: Any = vision.config
        self.vision = vision
        self.pool = model.pool
        self.connector = model.connector
        self.key = model.key
        self.sizes = tuple(model.pool(torch.zeros(1, *grid)).shape[1:])
        self.outputs = ("visual_tokens", "key", *(("features",) if model.value_encoder is not None else ()))

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        grid = patch_features(self.vision, pixel_values)
        features = self.pool(grid)
        seen = {
            "visual_tokens": self.connector(features),
            "key": self.key(self.key.regions(grid)),
            "features": features.reshape(-1, *self.sizes),  # fixed sizes: optimum cannot settle others for our input
        }
        return {name: seen[name] for name in self.outputs}


def encoder_graph(checkpoint: Checkpoint) -> onnx.ModelProto:
    """The float32 graph of a checkpoint's encoder, as `trace_encoder` gives it."""
    return trace_encoder(checkpoint.vision, checkpoint.model)


def trace_encoder(tower: VisionTower, model: AlignModel) -> onnx.ModelProto:
    """The float32 graph for one picture of the tower's image size, attention fused.

    Raises:
        UnsupportedError: an encoder that optimum does not know or cannot trace; the message lists those it does.
    """
    refuse_large(tower.model, f"vision encoder {tower.ref.path}")
    eye = Eye(tower.model, model, tower.grid).eval()
    image = tower.image
    config = _config(eye, image.height, image.width)
    with tempfile.TemporaryDirectory() as folder, _quiet(), _fixed_positions(eye.vision, image.height, image.width):
        path = Path(folder) / "encoder.onnx"
        try:
            export(eye, config, path, opset=OPSET)
        except (OnnxExporterError, RuntimeError, NotImplementedError) as error:
            kind = eye.config.model_type
            raise UnsupportedError(
                f"vision encoder of type {kind!r}: cannot be traced ({first_line(error)}); tested: {TESTED}"
            ) from None
        graph = onnx.load(path)
    _fix_shape(graph, image.height, image.width)
    graph = fold_constants(graph)
    fuse(graph)
    return graph


@contextmanager
def _fixed_positions(vision: nn.Module, height: int, width: int) -> Iterator[None]:
    """Positions interpolated by torch stand in the graph as constants: not every interpolation has an ONNX operator."""
    modules: list[Any] = [module for module in vision.modules() if hasattr(module, INTERPOLATE)]
    kept: dict[int, Tensor] = {}

    def recorded(place: int, interpolate: Any) -> Any:
        def call(*args: Any) -> Tensor:
            if place not in kept:
                kept[place] = interpolate(*args)
            return kept[place]

        return call

    for place, module in enumerate(modules):
        module.interpolate_pos_encoding = recorded(place, module.interpolate_pos_encoding)
    try:
        with torch.no_grad():
            patch_features(vision, torch.zeros(1, 3, height, width))
        yield
    finally:
        for module in modules:
            del module.interpolate_pos_encoding


def _config(eye: Eye, height: int, width: int) -> Any:
    """optimum's description of the encoder, with our input and outputs in place of its own."""
    config = _constructor(str(eye.config.model_type))(eye.config)
    outputs = OrderedDict((name, {0: "B"}) for name in eye.outputs)
    pixels = torch.zeros(1, 3, height, width)  # optimum's own would have the size of the encoder's configuration
    ours = {
        "outputs": property(lambda _: outputs),
        "generate_dummy_inputs": lambda *_, **__: {"pixel_values": pixels},
    }
    described = type(config)
    config.__class__ = type(described.__name__, (described,), ours)
    return config


def _constructor(kind: str) -> Any:
    known = ALIKE.get(kind, kind)
    for name in (known.replace("_", "-"), known):  # optimum writes both
        try:
            return TasksManager.get_exporter_config_constructor(
                "onnx", model_type=name, task="feature-extraction", library_name="transformers"
            )
        except (KeyError, ValueError):
            continue
    raise UnsupportedError(f"vision encoder of type {kind!r}: optimum has no ONNX export for it; tested: {TESTED}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps from the reader what the tracer says of fixed sizes, which are meant, and its dumps of graphs."""
    loggers = [logging.getLogger(name) for name in ("optimum", "transformers")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _fix_shape(graph: onnx.ModelProto, height: int, width: int) -> None:
    """One picture of one size: then every shape is known, and what depends on shapes alone is folded."""
    for value, known in ((graph.graph.input[0], (1, 3, height, width)), *((out, (1,)) for out in graph.graph.output)):
        for dim, size in zip(value.type.tensor_type.shape.dim, known, strict=False):
            dim.dim_value = size
