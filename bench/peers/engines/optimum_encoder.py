"""optimum's export of an encoder alone, in float32 and after its dynamic quantisation."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import AutoQuantizationConfig, ORTQuantizer
from transformers import AutoConfig

from tinyalign_edge.bench.peers.check import Floats, fixed_image, folder_bytes
from tinyalign_edge.bench.peers.engines.torch_encoder import expected_features
from tinyalign_edge.bench.peers.worker import EXPECTED, Encoder

PACKAGES = ("optimum-onnx", "onnxruntime", "transformers")
FILE = "model.onnx"


def prepare(source: Path, folder: Path, precision: str) -> None:
    """Export the tower `source`, and quantise its products; its convolution stays, int8 ones are slower."""
    options = {"task": "feature-extraction", "library_name": "transformers", "do_validation": False}
    if precision == "fp32":
        main_export(str(source), folder, **options)
    else:
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            main_export(str(source), Path(scratch), **options)
            settings = AutoQuantizationConfig.avx512_vnni(is_static=False, operators_to_quantize=["MatMul"])
            ORTQuantizer.from_pretrained(scratch).quantize(settings, save_dir=folder, file_suffix="")
    np.save(folder / EXPECTED, expected_features(source))


def load(source: Path, folder: Path, precision: str, threads: int) -> Encoder:
    """Open what `prepare` wrote."""
    torch.set_num_threads(threads)
    return _Optimum(source, folder, threads)


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
