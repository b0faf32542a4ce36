"""The trained parts: connector, memory connector, value encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tinyalign_edge.config import WITH_LATENTS
from tinyalign_edge.train.settings import ConnectorSettings, MemorySettings

HEADS = 4  # of the value encoder
OPEN = 4.0  # where a memory token's gate begins: 98 % of it passes
NEARLY_CLOSED = -2.0  # beside a whole model, which knows nothing of memories: 12 %


def pooling_matrix(height: int, width: int, tokens: int) -> Tensor:
    """Average pooling of a (height, width) grid to `tokens` cells as a matrix (tokens, height * width).

    The cells form a grid as square as `tokens` allows; their borders are those of adaptive average pooling.
    """
    rows = max(r for r in range(1, int(tokens**0.5) + 1) if tokens % r == 0)
    identity = torch.eye(height * width).reshape(1, height * width, height, width)
    pooled = nn.functional.adaptive_avg_pool2d(identity, (rows, tokens // rows))
    return pooled.reshape(height * width, tokens).T.contiguous()


class Patches(nn.Module):
    """Patch features (B, H, W, C) to what the connector reads: (B, N, input_dim), as `ConnectorSettings.kind` says."""

    matrix: Tensor

    def __init__(self, settings: ConnectorSettings) -> None:
        super().__init__()
        self.kind, side, height, width = settings.kind, settings.block, settings.grid_height, settings.grid_width
        self.blocks = (-1, height // side, side, width // side, side, settings.feature_dim)
        self.shape = (-1, settings.visual_tokens, settings.input_dim)
        if self.kind == "pooled":
            pooling = pooling_matrix(settings.grid_height, settings.grid_width, settings.visual_tokens)
            self.register_buffer("matrix", pooling, persistent=False)

    def forward(self, grid: Tensor) -> Tensor:
        if self.kind == "pooled":
            out: Tensor = self.matrix @ grid.flatten(1, 2)
            return out
        return grid.reshape(self.blocks).transpose(2, 3).reshape(self.shape)


class Connector(nn.Module):
    """Features (..., input_dim) of `Patches` to visual tokens (..., D): LayerNorm and a two-layer GELU MLP.

    Args:
        dropout: the share of the normed features that a training step does not see.
    """

    def __init__(self, settings: ConnectorSettings, embedding_rms: float, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(settings.input_dim)
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(settings.input_dim, settings.width)
        self.down = nn.Linear(settings.width, settings.width)
        with torch.no_grad():  # begin at the scale of the language model's own embeddings
            self.down.weight.mul_(embedding_rms / 0.3)

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.down(nn.functional.gelu(self.up(self.dropout(self.norm(features)))))
        return out


class MemoryConnector(nn.Module):
    """Values of retrieved entries to memory tokens (M, D).

    Token values arrive as embeddings of width D; latents are first brought to width D by `expand`, those of hybrid
    entries by `joined`, which puts them before the embeddings of their texts. Each token is
    then told the rank of its entry and how similar that entry is, and passes a residual bottleneck MLP that begins
    at zero, so that before training a memory token is the plain embedding of the retrieved text. With a gate it is
    drawn towards a vector that says nothing.

    Args:
        opening: where the gate begins, before the sigmoid.
    """

    def __init__(self, settings: MemorySettings, embeddings: Tensor, *, opening: float = OPEN) -> None:
        super().__init__()
        width = embeddings.shape[1]
        self.kind = settings.kind
        self.expand = nn.Linear(settings.latent_dim, width) if settings.kind in WITH_LATENTS else None
        if self.expand is not None:
            mean, basis = principal_axes(embeddings, settings.latent_dim)
            with torch.no_grad():
                self.expand.weight.copy_(basis.T)
                self.expand.bias.copy_(mean)
        self.rank = nn.Parameter(torch.zeros(settings.k, width))
        self.similarity = nn.Parameter(torch.zeros(width))
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, max(64, width // 4))
        self.down = nn.Linear(max(64, width // 4), width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        self.gate = nn.Linear(width, 1) if settings.gate else None
        self.nothing = nn.Parameter(embeddings.detach().float().mean(dim=0)) if settings.gate else None
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)
            nn.init.constant_(self.gate.bias, opening)

    def forward(self, values: Tensor, rank: Tensor, similarity: Tensor) -> Tensor:
        """`values` (M, D or latent_dim), `rank` (M,) int64, `similarity` (M,) float32 -> (M, D)."""
        if self.expand is not None and self.kind == "latents":
            values = self.expand(values)
        values = values + self.rank[rank] + similarity[:, None] * self.similarity
        normed = self.norm(values)
        out: Tensor = values + self.down(nn.functional.gelu(self.up(normed)))
        if self.gate is None or self.nothing is None:
            return out
        return torch.lerp(self.nothing.expand_as(out), out, torch.sigmoid(self.gate(normed)).to(out.dtype))

    def joined(self, latents: Tensor, text: Tensor, order: Tensor) -> Tensor:
        """The values (M, D) of hybrid entries: all their latents (P, latent_dim) and embeddings of all their token ids
        (M - P, D), one after the other, in the `order` (M,) int64 in which they are read."""
        assert self.expand is not None
        return torch.cat([self.expand(latents), text])[order]


class ValueEncoder(nn.Module):
    """A picture's pooled features and its text's embeddings to L latents.

    Latent i begins as the compressed embedding of the text's i-th token (principal axes of the embedding table);
    one step of cross attention over features and text, closed at first, learns what else to keep.
    """

    def __init__(self, settings: MemorySettings, feature_dim: int, embeddings: Tensor) -> None:
        super().__init__()
        self.latents, self.feature_dim, dim = settings.latents, feature_dim, settings.latent_dim
        mean, basis = principal_axes(embeddings, dim)
        self.mean = nn.Parameter(mean)
        self.compress = nn.Parameter(basis)
        self.see = nn.Sequential(nn.LayerNorm(feature_dim), nn.Linear(feature_dim, dim))
        self.query = nn.Parameter(torch.randn(settings.latents, dim) * 0.02)
        self.attention = nn.MultiheadAttention(dim, HEADS, batch_first=True)
        self.gate = nn.Parameter(torch.zeros(dim))

    def forward(self, features: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """`features` (E, N, C), `text` (E, T, D), `text_mask` (E, T) bool -> latents (E, L, latent_dim)."""
        words = ((text - self.mean) @ self.compress.T) * text_mask[..., None]  # (E, T, latent_dim)
        start = nn.functional.pad(words, (0, 0, 0, max(0, self.latents - words.shape[1])))[:, : self.latents]
        context = torch.cat([self.see(features), words], dim=1)
        hidden = torch.cat([text_mask.new_zeros(features.shape[:2]), ~text_mask], dim=1)
        read, _ = self.attention(start + self.query, context, context, key_padding_mask=hidden, need_weights=False)
        out: Tensor = start + self.gate * read
        return out


class PictureEncoder(nn.Module):
    """A picture's pooled features to L latents, which stand beside its text and tell what the text leaves out.

    All begin at zero, which the memory connector expands to the mean of all embeddings: one step of cross attention,
    closed at first, learns what they say. Each opens by itself and looks from a query of its own, so that they part.
    """

    def __init__(self, settings: MemorySettings, feature_dim: int) -> None:
        super().__init__()
        self.feature_dim, dim = feature_dim, settings.latent_dim
        self.see = nn.Sequential(nn.LayerNorm(feature_dim), nn.Linear(feature_dim, dim))
        self.query = nn.Parameter(torch.randn(settings.latents, dim))
        self.attention = nn.MultiheadAttention(dim, HEADS, batch_first=True)
        self.gate = nn.Parameter(torch.zeros(settings.latents, dim))

    def forward(self, features: Tensor) -> Tensor:
        """`features` (E, N, C) -> latents (E, L, latent_dim)."""
        context, queries = self.see(features), self.query.expand(len(features), -1, -1)
        read, _ = self.attention(queries, context, context, need_weights=False)
        out: Tensor = self.gate * read
        return out


def principal_axes(embeddings: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Mean (D,) and the first `dim` principal axes (dim, D) of an embedding table (V, D); orthonormal rows."""
    table = embeddings.detach().float()
    mean = table.mean(dim=0)
    centred = table - mean
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    axes = vectors.flip(1)[:, :dim].T.contiguous()
    if axes.shape[0] < dim:  # more latent dimensions than the model is wide: the rest is free
        axes = torch.cat([axes, torch.zeros(dim - axes.shape[0], axes.shape[1])])
    return mean, axes


class KeyProjection(nn.Module):
    """Patch features (B, H, W, C) to retrieval keys (B, key_dim).

    The features are averaged over regions of the picture, put side by side, centred, projected on their principal
    axes and brought to unit length. One region is the mean of all features; more tell where things stand.
    """

    mean: Tensor
    axes: Tensor

    pooling: Tensor

    def __init__(self, settings: ConnectorSettings, key_grid: int, key_dim: int) -> None:
        super().__init__()
        pooling = pooling_matrix(settings.grid_height, settings.grid_width, key_grid**2)
        self.register_buffer("pooling", pooling)
        self.register_buffer("mean", torch.zeros(len(pooling) * settings.feature_dim))
        self.register_buffer("axes", torch.zeros(key_dim, len(self.mean)))

    def regions(self, grid: Tensor) -> Tensor:
        """Patch features (B, H, W, C) to region features (B, key_grid**2 * C)."""
        out: Tensor = (self.pooling @ grid.flatten(1, 2)).flatten(1)
        return out

    def fit(self, regions: Tensor) -> None:
        """Take mean and axes from region features (E, key_grid**2 * C)."""
        mean, axes = principal_axes(regions, self.axes.shape[0])
        self.mean.copy_(mean)
        self.axes.copy_(axes)

    def forward(self, regions: Tensor) -> Tensor:
        """Region features to keys."""
        key: Tensor = (regions - self.mean) @ self.axes.T
        length: Tensor = key.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return key / length
