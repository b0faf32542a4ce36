"""The parts of TinyAlign as its authors released it (Hu et al., 2025, arXiv 2505.12884), to be measured against ours.

The key fuses picture and text: an entry's own text when it is stored, the question when it is searched for. The value
encoder is a Perceiver (Jaegle et al., 2021, arXiv 2103.03206) that stays as random as it begins. What does not work as
released is mended: key and value encoder are saved with the checkpoint, so the bank can be extended, and the connector
has the width that the values arrive with. The value encoder reads the frozen encoder's features and the language
model's embeddings of the text, not pixels and bytes a second time.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from tinyalign_edge.train.settings import MemorySettings

LATENTS, LATENT_DIM = 32, 96
SELF_ATTENTION_LAYERS = 8
HEADS = 8
PICTURE_WEIGHT, TEXT_WEIGHT = 0.4, 0.6


class FusedKey(nn.Module):
    """A picture's features and a text's embeddings to one key of the language model's width.

    The picture passes a copy of the connector as it begins, since keys must not move while it is trained.
    """

    def __init__(self, connector: nn.Module) -> None:
        super().__init__()
        self.connector = copy.deepcopy(connector).requires_grad_(False)
        for part in self.connector.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0

    def forward(self, features: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """`features` (B, N, C), `text` (B, T, D), `text_mask` (B, T) bool -> unit keys (B, D)."""
        picture = PICTURE_WEIGHT * nn.functional.normalize(self.connector(features), dim=-1)
        words = TEXT_WEIGHT * nn.functional.normalize(text, dim=-1)
        sequence = torch.cat([picture, words], dim=1)  # (B, N + T, D)
        seen = torch.cat([text_mask.new_ones(picture.shape[:2]), text_mask], dim=1)
        alike = (sequence @ sequence.mT).masked_fill(~seen[:, None], -torch.inf).softmax(dim=-1)
        weights = (alike * seen[..., None]).sum(dim=1) / seen.sum(dim=1, keepdim=True)  # mean over the rows
        return nn.functional.normalize((weights[:, None] @ sequence)[:, 0], dim=-1)


class RandomPerceiver(nn.Module):
    """A picture's features and its text's embeddings to L latents, by weights that are never trained."""

    def __init__(self, settings: MemorySettings, feature_dim: int, width: int) -> None:
        super().__init__()
        dim = settings.latent_dim
        self.latents = nn.Parameter(torch.randn(settings.latents, dim) * 0.02)
        self.see, self.read = nn.Linear(feature_dim, dim), nn.Linear(width, dim)
        self.norm = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, HEADS, batch_first=True)
        layer = nn.TransformerEncoderLayer(
            dim, HEADS, dim_feedforward=dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, SELF_ATTENTION_LAYERS, enable_nested_tensor=False)
        self.requires_grad_(False)

    def forward(self, features: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """`features` (E, N, C), `text` (E, T, D), `text_mask` (E, T) bool -> latents (E, L, latent_dim)."""
        context = self.norm(torch.cat([self.see(features), self.read(text)], dim=1))
        hidden = torch.cat([text_mask.new_zeros(features.shape[:2]), ~text_mask], dim=1)
        start = self.latents.expand(len(features), -1, -1)
        read, _ = self.attention(start, context, context, key_padding_mask=hidden, need_weights=False)
        out: Tensor = self.layers(start + read)
        return out


class SideBySideConnector(nn.Module):
    """The values of k entries, side by side, to as many memory tokens as one of them has latents."""

    def __init__(self, settings: MemorySettings, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(settings.k * settings.latent_dim, width)
        self.down = nn.Linear(width, width)

    def forward(self, values: Tensor, rank: Tensor, similarity: Tensor) -> Tensor:
        """`values` (M, k * latent_dim), zeros where an entry is missing -> (M, D); the places tell the rank."""
        out: Tensor = self.down(nn.functional.gelu(self.up(values)))
        return out
