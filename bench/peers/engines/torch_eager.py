"""transformers in torch, not compiled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, DynamicCache

from tinyalign_edge.bench.peers.check import Floats, folder_bytes
from tinyalign_edge.bench.peers.worker import Language

PACKAGES = ("torch", "transformers")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def prepare(source: Path, folder: Path, precision: str) -> None:
    """Nothing: torch reads the checkpoint."""


def load(source: Path, folder: Path, precision: str, threads: int) -> Language:
    """Open the checkpoint."""
    torch.set_num_threads(threads)
    return _Torch(source, DTYPES[precision])


class _Torch(Language):
    def __init__(self, source: Path, dtype: torch.dtype) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
        self._cache = DynamicCache()
        self._logits = torch.zeros(1)
        self.vocab_size = self._model.config.vocab_size
        self.weight_bytes = folder_bytes(source, ".safetensors") * dtype.itemsize // torch.float32.itemsize
        self.length = 0

    @torch.inference_mode()
    def append(self, ids: NDArray[np.int64], *, num_logits: int = 1) -> Floats:
        out = self._model(
            torch.from_numpy(ids)[None], past_key_values=self._cache, use_cache=True, logits_to_keep=num_logits
        )
        self._logits = out.logits[0]
        self.length += len(ids)
        logits: Floats = self._logits.float().numpy()
        return logits

    def step(self) -> None:
        self.append(self._logits[-1:].argmax(-1).numpy())

    def truncate(self, length: int) -> None:
        if length == 0:
            self._cache = DynamicCache()
        elif length < self.length:
            self._cache.crop(length)
        self.length = length
