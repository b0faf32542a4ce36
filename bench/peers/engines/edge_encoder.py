"""This package's encoder graph: encoder, connector and retrieval key in one, as `export` writes it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from tinyalign_edge.bench.peers.check import Floats, fixed_image, folder_bytes
from tinyalign_edge.bench.peers.worker import EXPECTED, Encoder
from tinyalign_edge.runtime.sessions import open_session

PACKAGES = ("tinyalign-edge", "onnxruntime")
FILE = "encoder.onnx"
LANGUAGE_WIDTH = 576
VISUAL_TOKENS = 16
KEY_DIM = 128


def prepare(source: Path, folder: Path, precision: str) -> None:
    """Export the tower `source` with a random connector and key, and keep what torch computes."""
    import torch

    from tinyalign_edge.export.encoder import encoder_graph
    from tinyalign_edge.export.processor import own_plan
    from tinyalign_edge.export.quantize import quantize_graph
    from tinyalign_edge.train.towers import patch_features

    torch.manual_seed(0)
    checkpoint = _checkpoint(source)
    graph = encoder_graph(checkpoint)
    graph = quantize_graph(graph, own_plan("int8" if precision == "int8" else "fp32"))
    (folder / FILE).write_bytes(graph.SerializeToString())
    size = checkpoint.config.image
    with torch.inference_mode():
        grid = patch_features(checkpoint.vision.model, torch.from_numpy(fixed_image(size.height, size.width)))
        visual = checkpoint.model.connector(checkpoint.model.pool(grid))
    np.save(folder / EXPECTED, visual.numpy())


def load(source: Path, folder: Path, precision: str, threads: int) -> Encoder:
    """Open what `prepare` wrote."""
    return _Edge(folder, threads)


class _Edge(Encoder):
    def __init__(self, folder: Path, threads: int) -> None:
        self._session = open_session(folder / FILE, threads=threads)
        _, _, height, width = self._session.get_inputs()[0].shape
        self._pixels = fixed_image(height, width)
        self.weight_bytes = folder_bytes(folder, FILE)

    def encode(self) -> Floats:
        features: Floats = self._session.run(["visual_tokens", "key"], {"pixel_values": self._pixels})[0]
        return features


def _checkpoint(source: Path) -> Any:
    """The parts of a checkpoint that the encoder's graph is made of; nothing is trained."""
    from torch import nn

    from tinyalign_edge.train.connector import Connector, KeyProjection, Patches
    from tinyalign_edge.train.settings import ConnectorSettings
    from tinyalign_edge.train.towers import load_vision

    vision = load_vision(str(source))
    settings = ConnectorSettings(*vision.grid, VISUAL_TOKENS, LANGUAGE_WIDTH)
    key = KeyProjection(settings, 1, KEY_DIM)
    nn.init.normal_(key.axes)
    model = SimpleNamespace(pool=Patches(settings), connector=Connector(settings, 0.1), key=key, value_encoder=None)
    return SimpleNamespace(vision=vision, model=model, config=SimpleNamespace(image=vision.image))
