"""Vision tower and projector of a whole model as one ONNX graph, traced by torch."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from tinyalign_edge.bundle import ImageConfig
from tinyalign_edge.export.encoder import OPSET
from tinyalign_edge.export.fold import fold_constants
from tinyalign_edge.export.fuse import fuse
from tinyalign_edge.export.limits import refuse_large


class LlavaEye(nn.Module):
    """`pixel_values` (1, 3, height, width) -> `visual_tokens` (1, N, D): chosen layers, the projector."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        layers = model.config.vision_feature_layer
        self.layers = [layers] if isinstance(layers, int) else list(layers)
        self.first = 1 if model.config.vision_feature_select_strategy == "default" else 0  # without the class token
        self.tower = model.model.vision_tower
        self.projector = model.model.multi_modal_projector

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = self.tower(pixel_values, output_hidden_states=True).hidden_states
        visual: Tensor = self.projector(torch.cat([hidden[i][:, self.first :] for i in self.layers], dim=-1))
        return visual


class Idefics3Eye(nn.Module):
    """`pixel_values` (1, 3, side, side) -> `visual_tokens` (1, N, D) of one full tile.

    The tower works out the position of each patch from a mask of the picture; a full tile always has the same, which
    are asked for once.
    """

    positions: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tower, self.connector = model.model.vision_model, model.model.connector
        side = model.config.vision_config.image_size
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
        visual: Tensor = self.connector(self.tower.post_layernorm(hidden))
        return visual

    def _full_mask(self, side: int) -> Tensor:
        patches = side // self.tower.patch_size
        return torch.ones(1, patches, patches, dtype=torch.bool)


def vision_graph(eye: nn.Module, image: ImageConfig) -> onnx.ModelProto:
    """The float32 graph for one picture of the model's size, constants folded and attention fused."""
    refuse_large(eye, "vision tower")
    example = torch.zeros(1, 3, image.height, image.width)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # the tracer's, about sizes that become constants: they are meant to
        path = Path(folder) / "encoder.onnx"
        torch.onnx.export(
            eye,
            (example,),
            path,
            opset_version=OPSET,
            dynamo=False,
            input_names=["pixel_values"],
            output_names=["visual_tokens"],
        )
        graph = fold_constants(onnx.load(path))
    fuse(graph)
    return graph
