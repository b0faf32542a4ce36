"""optimum's export of an encoder alone, in float32 and after its dynamic quantisation."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from optimum.exporters.onnx import export
from optimum.exporters.tasks import TasksManager
from optimum.onnxruntime import AutoQuantizationConfig, ORTQuantizer
from torch import Tensor, nn
from transformers import AutoConfig

from tinyalign_edge.bench.peers.check import Floats, fixed_image, folder_bytes
from tinyalign_edge.bench.peers.engines.torch_encoder import expected_features
from tinyalign_edge.bench.peers.worker import EXPECTED, Encoder
from tinyalign_edge.train.towers import load_vision

PACKAGES = ("optimum-onnx", "onnxruntime", "transformers")
FILE = "model.onnx"


def prepare(source: Path, folder: Path, precision: str) -> None:
    """Export the tower `source`, and quantise its products; its convolution stays, int8 ones are slower."""
    if precision == "fp32":
        _export(source, folder)
    else:
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            _export(source, Path(scratch))
            settings = AutoQuantizationConfig.avx512_vnni(is_static=False, operators_to_quantize=["MatMul"])
            quantizer = ORTQuantizer.from_pretrained(scratch, file_name=FILE)
            quantizer.quantize(settings, save_dir=folder, file_suffix="")
    np.save(folder / EXPECTED, expected_features(source))


def load(source: Path, folder: Path, precision: str, threads: int) -> Encoder:
    """Open what `prepare` wrote."""
    torch.set_num_threads(threads)
    return _Optimum(source, folder, threads)


class _Tower(nn.Module):
    """An encoder without its pooled output, which nobody here reads."""

    def __init__(self, source: Path) -> None:
        super().__init__()
        self.tower = load_vision(str(source)).model
        self.config: Any = self.tower.config

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return {"last_hidden_state": self.tower(pixel_values=pixel_values).last_hidden_state}


def _export(source: Path, folder: Path) -> None:
    tower = _Tower(source).eval()
    constructor = TasksManager.get_exporter_config_constructor(
        "onnx", model=tower.tower, task="feature-extraction", library_name="transformers"
    )
    config = constructor(tower.config)
    kind, outputs = type(config), {"last_hidden_state": {0: "batch_size"}}
    config.__class__ = type(kind.__name__, (kind,), {"outputs": property(lambda _: outputs)})
    export(tower, config, folder / FILE)
    tower.config.save_pretrained(folder)


class _Optimum(Encoder):
    def __init__(self, source: Path, folder: Path, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        self._session = ort.InferenceSession(folder / FILE, options, providers=["CPUExecutionProvider"])
        side = AutoConfig.from_pretrained(source).image_size
        self._pixels = fixed_image(side, side)
        self.weight_bytes = folder_bytes(folder, FILE, ".onnx_data")

    def encode(self) -> Floats:
        features: Floats = self._session.run(["last_hidden_state"], {"pixel_values": self._pixels})[0]
        return features
