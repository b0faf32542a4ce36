"""optimum: `ORTModelForCausalLM` as exported, in float32 and after its dynamic quantisation."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from optimum.onnxruntime import AutoQuantizationConfig, ORTModelForCausalLM, ORTQuantizer

from tinyalign_edge.bench.peers.check import Floats, folder_bytes
from tinyalign_edge.bench.peers.worker import Language

PACKAGES = ("optimum-onnx", "onnxruntime", "transformers")


def prepare(source: Path, folder: Path, precision: str) -> None:
    """Export the checkpoint `source`, and quantise it."""
    if precision == "fp32":
        ORTModelForCausalLM.from_pretrained(source, export=True).save_pretrained(folder)
        return
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        ORTModelForCausalLM.from_pretrained(source, export=True).save_pretrained(scratch)
        settings = AutoQuantizationConfig.avx512_vnni(is_static=False)
        ORTQuantizer.from_pretrained(scratch).quantize(
            settings, save_dir=folder, file_suffix="", use_external_data_format=True
        )


def load(source: Path, folder: Path, precision: str, threads: int) -> Language:
    """Open what `prepare` wrote."""
    return _Optimum(folder, threads)


class _Optimum(Language):
    def __init__(self, folder: Path, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        torch.set_num_threads(threads)
        self._model = ORTModelForCausalLM.from_pretrained(folder, session_options=options)
        self._past: Any = None
        self._logits = torch.zeros(1)
        self.vocab_size = self._model.config.vocab_size
        self.weight_bytes = folder_bytes(folder, ".onnx", ".onnx_data", ".onnx.data")
        self.length = 0

    def append(self, ids: NDArray[np.int64], *, num_logits: int = 1) -> Floats:
        mask = torch.ones(1, self.length + len(ids), dtype=torch.int64)
        out = self._model(torch.from_numpy(ids)[None], attention_mask=mask, past_key_values=self._past)
        self._past = out.past_key_values
        self._logits = out.logits[0]
        self.length += len(ids)
        logits: Floats = self._logits.numpy()
        return logits

    def step(self) -> None:
        self.append(self._logits[-1:].argmax(-1).numpy())

    def truncate(self, length: int) -> None:
        if length == 0:
            self._past = None
        elif length < self.length:
            self._past = tuple(tuple(t[:, :, :length].contiguous() for t in layer) for layer in self._past)
        self.length = length
