"""The frozen encoder on pictures: pooled features for the connector, region features for the keys."""

from __future__ import annotations

import copy
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
from tinyalign_edge.train.features import features_in_memory, record_type
from tinyalign_edge.train.model import AlignModel
from tinyalign_edge.train.towers import patch_features


@dataclass(frozen=True)
class Encoded:
    """Features of pictures in the order of their rows."""

    pooled: npt.NDArray[np.floating[Any]]  # (E, N, C), what the connector reads
    regions: npt.NDArray[np.float32]  # (E, key_grid**2 * C), what the key is made of


def encode_rows(
    vision: nn.Module, image: ImageConfig, model: AlignModel, rows: Sequence[Row], *, device: str
) -> Encoded:
    """Encode the first picture of every row; rows that share a picture share the work.

    Raises:
        InputError: a picture cannot be read; the message names it and its row.
    """
    paths = list(dict.fromkeys(row.path for row in rows))
    first = {row.path: row.where for row in reversed(rows)}
    encode = PictureEncoder(vision, image, model, device=device, where=first.__getitem__)
    record = record_type((model.pool.shape[1], model.pool.shape[2]), len(model.key.mean), "<f4")
    numbers = range(len(paths))
    features = features_in_memory(
        len(paths), numbers, record, lambda some: encode([paths[i] for i in some]), less="ask about fewer at once"
    )
    place = dict(zip(paths, numbers, strict=True))
    order = [place[row.path] for row in rows]
    return Encoded(features.pooled(order), features.regions(order))


class PictureEncoder:
    """Pictures to pooled features (B, N, C) and region features (B, key_grid**2 * C), float32.

    Args:
        where: the row of a picture, for messages.
    """

    def __init__(
        self, vision: nn.Module, image: ImageConfig, model: AlignModel, *, device: str, where: Callable[[Path], str]
    ) -> None:
        self.vision, self.image, self.device, self.where = vision.to(device), image, device, where
        self.pool, self.key = copy.deepcopy(model.pool).cpu(), copy.deepcopy(model.key).cpu()  # the model's may move
        vision.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # much faster convolutions on CPU

    def __call__(self, paths: Sequence[Path]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Raises InputError for a picture that cannot be read; the message names it and its row."""
        pixels = torch.from_numpy(np.concatenate([self._pixels(path) for path in paths]))
        kind = torch.device(self.device).type
        with torch.inference_mode(), torch.autocast(kind, enabled=False):  # also where a step's computing asks for it
            there = pixels.to(device=self.device, memory_format=torch.channels_last)
            grid = patch_features(self.vision, there).float().cpu()  # (B, H, W, C)
            return self.pool(grid).numpy(), self.key.regions(grid).numpy()

    def _pixels(self, path: Path) -> npt.NDArray[np.float32]:
        try:
            return preprocess(open_image(path), self.image)
        except InputError as error:
            raise InputError(f"{self.where(path)}: {error}") from error  # the reason, without the row


Encode = Callable[..., Encoded]  # what is called as `encode_rows` is
