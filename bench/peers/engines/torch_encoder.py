"""transformers' vision encoders in torch, not compiled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tinyalign_edge.bench.peers.check import Floats, fixed_image, folder_bytes
from tinyalign_edge.bench.peers.engines.torch_eager import DTYPES
from tinyalign_edge.bench.peers.worker import EXPECTED, Encoder
from tinyalign_edge.train.towers import load_vision

PACKAGES = ("torch", "transformers")


def prepare(source: Path, folder: Path, precision: str) -> None:
    """Keep what torch computes in float32."""
    np.save(folder / EXPECTED, expected_features(source))


def expected_features(source: Path) -> Floats:
    """The tower's `last_hidden_state` of `fixed_image` in float32: (1, patches, C)."""
    return _Torch(source, torch.float32).encode()


def load(source: Path, folder: Path, precision: str, threads: int) -> Encoder:
    """Open the checkpoint."""
    torch.set_num_threads(threads)
    return _Torch(source, DTYPES[precision])


class _Torch(Encoder):
    def __init__(self, source: Path, dtype: torch.dtype) -> None:
        tower = load_vision(str(source))
        self._model = tower.model.to(dtype)
        self._pixels = torch.from_numpy(fixed_image(tower.image.height, tower.image.width)).to(dtype)
        self.weight_bytes = folder_bytes(source, ".safetensors") * dtype.itemsize // torch.float32.itemsize

    @torch.inference_mode()
    def encode(self) -> Floats:
        features: Floats = self._model(pixel_values=self._pixels).last_hidden_state.float().numpy()
        return features
