"""Tiny random vision encoders in Hugging Face format, one for each kind that is tested.

Their weights are so large that attention is far from uniform and every picture gives other features: what a graph
leaves out shows. The tests and the table of `docs/models.md` are made from the same checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import nn

SIDE = 48
PATCH = 8
LAYERS = 2
SQUARE = {"height": SIDE, "width": SIDE}


@dataclass(frozen=True)
class TinyEncoder:
    """How one kind is made: transformers' classes by name, what it shows, what differs from the common sizes."""

    model: str
    config: str
    processor: str
    features: str
    attentions: int = LAYERS  # attention blocks that the exporter fuses
    changes: dict[str, Any] = field(default_factory=dict)
    two_towers: bool = False  # the folder holds a text tower too


SIGLIP, CLIP, BIT = "SiglipImageProcessor", "CLIPImageProcessor", "BitImageProcessor"
ENCODERS: dict[str, TinyEncoder] = {
    "siglip": TinyEncoder(
        "SiglipVisionModel", "SiglipVisionConfig", SIGLIP, "no class token; its attention pooling left out"
    ),
    "siglip, both towers": TinyEncoder(
        "SiglipModel", "SiglipConfig", SIGLIP, "vision half of a whole SigLIP or SigLIP 2 checkpoint", two_towers=True
    ),
    "siglip, patches with a rest": TinyEncoder(
        "SiglipVisionModel",
        "SiglipVisionConfig",
        SIGLIP,
        "a side that is no multiple of its patches, as so400m/14 at 384",
        changes={"patch_size": 7},
    ),
    "clip": TinyEncoder("CLIPVisionModel", "CLIPVisionConfig", CLIP, "class token left out, QuickGelu, center crop"),
    "clip, both towers": TinyEncoder(
        "CLIPModel", "CLIPConfig", CLIP, "vision half of a whole CLIP checkpoint", two_towers=True
    ),
    "dinov2": TinyEncoder("Dinov2Model", "Dinov2Config", BIT, "class token left out, layer scale"),
    "dinov2, SwiGLU": TinyEncoder(
        "Dinov2Model", "Dinov2Config", BIT, "the gated MLP of the giant size", changes={"use_swiglu_ffn": True}
    ),
    "dinov2 with registers": TinyEncoder(
        "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", BIT, "class and register tokens left out"
    ),
    "vit": TinyEncoder("ViTModel", "ViTConfig", "ViTImageProcessor", "class token and pooler left out"),
    "mobilenet_v2": TinyEncoder(
        "MobileNetV2Model",
        "MobileNetV2Config",
        "MobileNetV2ImageProcessor",
        "convolutions, the depthwise ones in float32",
        attentions=0,
        changes={"depth_multiplier": 0.35, "finegrained_output": False},
    ),
    "convnext": TinyEncoder(
        "ConvNextModel",
        "ConvNextConfig",
        "ConvNextImageProcessor",
        "convolutions and products a pixel, layer scale",
        attentions=0,
        changes={"depths": (1, 1, 2, 1), "hidden_sizes": (16, 24, 32, 48), "patch_size": 4},
    ),
}


def save_encoder(name: str, folder: Path) -> None:
    """Write the checkpoint `name` of `ENCODERS` and its image processor into `folder`."""
    tiny = ENCODERS[name]
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "mlp_ratio": 2,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
        **tiny.changes,
    }
    kind = getattr(hf, tiny.config)
    text = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 99,
    }
    config = kind(vision_config=sizes, text_config=text, projection_dim=32) if tiny.two_towers else kind(**sizes)
    model = getattr(hf, tiny.model)(config)
    randomise(model)
    model.save_pretrained(folder)
    _processor(tiny.processor).save_pretrained(folder)


def randomise(model: nn.Module) -> None:
    """Weights that all matter: matrices that keep the scale of what they read, norms and biases that show."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim < 2:
                weight.normal_(mean=float("bias" not in name), std=0.2)
            elif "position" in name or "token" in name:
                weight.normal_(std=0.7)
            else:
                weight.normal_(std=1.4 * (weight[0].numel()) ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.3)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)


def _processor(kind: str) -> Any:
    made = getattr(hf, kind)
    if kind == "ConvNextImageProcessor":
        return made(size={"shortest_edge": SIDE})
    if kind in ("SiglipImageProcessor", "ViTImageProcessor"):
        return made(size=SQUARE)
    return made(size={"shortest_edge": SIDE + 8}, crop_size=SQUARE, do_center_crop=True)
