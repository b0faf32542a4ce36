"""One pass of the frozen encoder over all pictures: pooled features for training, region features for the keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from tinyalign_edge.bundle import ImageConfig
from tinyalign_edge.data import Row
from tinyalign_edge.errors import InputError
from tinyalign_edge.image import open_image, preprocess
from tinyalign_edge.progress import progress
from tinyalign_edge.train.model import AlignModel
from tinyalign_edge.train.towers import patch_features

BATCH = 8  # fits the processor's caches; larger batches are slower


@dataclass(frozen=True)
class Encoded:
    """Features of pictures in the order of their rows."""

    pooled: npt.NDArray[np.floating[Any]]  # (E, N, C), what the connector reads
    regions: npt.NDArray[np.float32]  # (E, key_grid**2 * C), what the key is made of


def encode_rows(
    vision: nn.Module,
    image: ImageConfig,
    model: AlignModel,
    rows: Sequence[Row],
    *,
    device: str,
    dtype: npt.DTypeLike = np.float32,
) -> Encoded:
    """Encode the picture of every row; rows that share a picture share the work. `dtype` is that of `pooled`.

    Raises:
        InputError: a picture cannot be read; the message names it and its row.
    """
    unique = list(dict.fromkeys(row.path for row in rows))
    first = {row.path: row.where for row in reversed(rows)}
    encode = PictureEncoder(vision, image, model, device=device, where=first.__getitem__)
    pooled: list[npt.NDArray[np.floating[Any]]] = []
    regions: list[npt.NDArray[np.float32]] = []
    with progress("Encoding pictures", len(unique)) as advance:
        for start in range(0, len(unique), BATCH):
            paths = unique[start : start + BATCH]
            some, their = encode(paths)
            pooled.append(some.astype(dtype))
            regions.append(their)
            advance(len(paths))
    place = {path: i for i, path in enumerate(unique)}
    order = np.array([place[row.path] for row in rows])
    return Encoded(np.concatenate(pooled)[order], np.concatenate(regions)[order])


class PictureEncoder:
    """Pictures to pooled features (B, N, C) and region features (B, key_grid**2 * C), float32.

    Args:
        where: the row of a picture, for messages.
    """

    def __init__(
        self, vision: nn.Module, image: ImageConfig, model: AlignModel, *, device: str, where: Callable[[Path], str]
    ) -> None:
        self.vision, self.image, self.model, self.device, self.where = vision.to(device), image, model, device, where
        vision.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # much faster convolutions on CPU

    def __call__(self, paths: Sequence[Path]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Raises InputError for a picture that cannot be read; the message names it and its row."""
        pixels = torch.from_numpy(np.concatenate([self._pixels(path) for path in paths]))
        with torch.inference_mode():
            there = pixels.to(device=self.device, memory_format=torch.channels_last)
            grid = patch_features(self.vision, there).float().cpu()  # (B, H, W, C)
            return self.model.pool(grid).numpy(), self.model.key.regions(grid).numpy()

    def _pixels(self, path: Path) -> npt.NDArray[np.float32]:
        try:
            return preprocess(open_image(path), self.image)
        except InputError as error:
            raise InputError(f"{self.where(path)}: {error}") from None


Encode = Callable[..., Encoded]  # what is called as `encode_rows` is
