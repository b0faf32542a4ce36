"""The vision towers of whole models: `pixel_values` (B, 3, height, width) -> the grid (B, H, W, C) that the model's own
connector reads. A number of tokens that is no square is a grid of one row."""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn


class LlavaEye(nn.Module):
    """The chosen layers of the tower, side by side."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config = model.config
        layers = self.config.vision_feature_layer
        self.layers = [layers] if isinstance(layers, int) else list(layers)
        self.first = 1 if self.config.vision_feature_select_strategy == "default" else 0  # without the class token
        self.tower = model.model.vision_tower

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = self.tower(pixel_values, output_hidden_states=True).hidden_states
        return _grid(torch.cat([hidden[i][:, self.first :] for i in self.layers], dim=-1))


class Idefics3Eye(nn.Module):
    """The last layer of the tower for one full tile.

    The tower works out the position of each patch from a mask of the picture; a full tile always has the same, which
    are asked for once.
    """

    positions: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config = model.config
        self.tower = model.model.vision_model
        side = self.config.vision_config.image_size
        found: list[Tensor] = []
        table = self.tower.embeddings.position_embedding
        hook = table.register_forward_hook(lambda _module, _inputs, output: found.append(output))
        with torch.inference_mode():
            self.tower.embeddings(torch.zeros(1, 3, side, side), self._full_mask(side))
        hook.remove()
        self.register_buffer("positions", found[0].clone(), persistent=False)  # (1, patches, channels)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.tower.embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        hidden = self.tower.encoder(inputs_embeds=patches + self.positions).last_hidden_state
        return _grid(self.tower.post_layernorm(hidden))

    def _full_mask(self, side: int) -> Tensor:
        patches = side // self.tower.patch_size
        return torch.ones(1, patches, patches, dtype=torch.bool)


def _grid(hidden: Tensor) -> Tensor:
    batch, tokens, channels = hidden.shape
    height = isqrt(tokens) if isqrt(tokens) ** 2 == tokens else 1
    return hidden.reshape(batch, height, tokens // height, channels)
