"""One pass of the frozen encoder over all pictures: pooled features for training, region features for the keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

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
    """Features of pictures in the order of their rows; a slice is of some of them."""

    pooled: npt.NDArray[np.floating[Any]]  # (E, N, C), what the connector reads
    regions: npt.NDArray[np.float32]  # (E, key_grid**2 * C), what the key is made of

    def __getitem__(self, rows: slice | npt.NDArray[np.int64]) -> Encoded:
        return Encoded(self.pooled[rows], self.regions[rows])


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
    first = {row.path: row for row in reversed(rows)}
    pooled: list[npt.NDArray[np.floating[Any]]] = []
    regions: list[npt.NDArray[np.float32]] = []
    vision.to(device)
    vision.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # much faster convolutions on CPU
    with progress("Encoding pictures", len(unique)) as advance, torch.inference_mode():
        for start in range(0, len(unique), BATCH):
            paths = unique[start : start + BATCH]
            pixels = np.concatenate([_pixels(first[path], image) for path in paths])
            grid = patch_features(vision, _channels_last(pixels, device)).float().cpu()  # (B, H, W, C)
            regions.append(model.key.regions(grid).numpy())
            pooled.append(model.pool(grid).numpy().astype(dtype))
            advance(len(paths))
    place = {path: i for i, path in enumerate(unique)}
    order = np.array([place[row.path] for row in rows])
    return Encoded(np.concatenate(pooled)[order], np.concatenate(regions)[order])


def _channels_last(pixels: npt.NDArray[np.float32], device: str) -> Tensor:
    return torch.from_numpy(pixels).to(device=device, memory_format=torch.channels_last)


def _pixels(row: Row, image: ImageConfig) -> npt.NDArray[np.float32]:
    try:
        return preprocess(open_image(row.path), image)
    except InputError as error:
        raise InputError(f"{row.where}: {error}") from None


Encode = Callable[..., Encoded]  # what is called as `encode_rows` is
