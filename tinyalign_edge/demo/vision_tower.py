"""The demo's vision encoder: a small SigLIP tower pretrained on drawn scenes, without captions or questions.

Two objectives share the tower and need no head that is kept. Each patch token says which kind of object covers
it. The cosine of two mean-pooled outputs is that of the two scenes' contents, so the mean is a retrieval key.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from tinyalign_edge.demo.fit import Progress, fit
from tinyalign_edge.demo.world import COLOURS, KINDS, SHAPES, SIDE, Scene, draw, kind_map, make_scenes

PATCH = 12  # pixels
CELLS = SIDE // PATCH
WIDTH, LAYERS, HEADS, MLP_WIDTH = 128, 4, 4, 256
SCENES, STEPS, BATCH, MUON_RATE = 8000, 400, 64, 0.007
MEAN, STD = 0.9, 0.25  # of the pixels of the drawn world: the ground is about zero
PRESENCE, SIZED, PLACED = 1.0, 0.5, 0.5  # what counts in the content of a scene: names, kinds, names with places


def pretrain_vision(folder: Path, *, seed: int, progress: Progress = lambda done, total: None) -> None:
    """Write a SigLIP vision tower and its image processor in Hugging Face format to `folder`."""
    torch.manual_seed(seed)
    pixels, kinds, contents = _tensors(make_scenes(SCENES, seed=seed))
    model = SiglipVisionModel(_config())
    head = nn.Linear(WIDTH, 1 + len(KINDS))

    def loss(pick: torch.Tensor) -> torch.Tensor:
        tokens = model(pixel_values=(pixels[pick] / 255 - MEAN) / STD).last_hidden_state  # (B, N, D)
        return _patch_loss(head(tokens), kinds[pick]) + _content_loss(tokens.mean(1), contents[pick])

    picks = (torch.randperm(SCENES)[:BATCH] for _ in range(STEPS))
    fit(nn.ModuleList([model, head]), picks, loss, steps=STEPS, muon_rate=MUON_RATE, progress=progress)
    model.save_pretrained(folder)
    _processor().save_pretrained(folder)


def _patch_loss(logits: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of (B, N, 1 + kinds) against (B, N); ground and objects weigh the same in sum."""
    losses = F.cross_entropy(logits.flatten(0, 1), kinds.flatten(), reduction="none")
    covered = kinds.flatten() > 0
    return 0.5 * losses[covered].mean() + 0.5 * losses[~covered].mean()


def _content_loss(pooled: torch.Tensor, contents: torch.Tensor) -> torch.Tensor:
    """How far the cosines within a batch of centred (B, D) features are from those of centred (B, C) contents."""
    got, wanted = (F.normalize(rows - rows.mean(0), dim=-1) for rows in (pooled, contents))
    return (got @ got.T - wanted @ wanted.T).square().mean() * len(pooled)


def _tensors(scenes: Sequence[Scene]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels (S, 3, SIDE, SIDE) uint8, patch kinds (S, N) int64, contents (S, C) float32."""
    pixels = np.stack([np.asarray(draw(scene)) for scene in scenes]).transpose(0, 3, 1, 2)
    kinds = np.stack([kind_map(scene, CELLS).ravel() for scene in scenes])
    contents = np.stack([content(scene) for scene in scenes])
    return torch.from_numpy(np.ascontiguousarray(pixels)), torch.from_numpy(kinds), torch.from_numpy(contents)


def content(scene: Scene) -> np.ndarray:
    """What a scene shows as a vector (C,) float32: which names, which kinds, and which name in which place."""
    colours, shapes, sizes = len(COLOURS), len(SHAPES), len(KINDS) // (len(COLOURS) * len(SHAPES))
    names = np.zeros(colours * shapes, np.float32)
    kinds = np.zeros((sizes, colours * shapes), np.float32)
    placed = np.zeros((2, 3, colours * shapes), np.float32)  # row or column, before or between or after
    for rank, item in enumerate(scene.objects):
        size, name = divmod(item.kind, colours * shapes)
        names[name] += PRESENCE
        kinds[size, name] += SIZED
        if len(scene.objects) > 1:
            place = 0 if rank == 0 else 2 if rank == len(scene.objects) - 1 else 1
            placed[0 if scene.axis == "row" else 1, place, name] += PLACED
    return np.concatenate([names, kinds.ravel(), placed.ravel()])


def _config() -> SiglipVisionConfig:
    config = SiglipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=MLP_WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=SIDE,
        patch_size=PATCH,
    )
    config.vision_use_head = False
    return config


def _processor() -> SiglipImageProcessor:
    side = {"height": SIDE, "width": SIDE}
    return SiglipImageProcessor(
        size=side, resample=Image.Resampling.BICUBIC, image_mean=[MEAN] * 3, image_std=[STD] * 3
    )
