"""What is asked, as part of a key: two questions of the same words in another order are the same here."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tinyalign_edge.train.connector import principal_axes

QUESTION_DIM = 64
LEAST = 1e-3  # a question this close to the mean of all is like any other


class QuestionKey(nn.Module):
    """Embeddings of a question's tokens to a unit vector, of length 0 for the mean question; nothing is trained.

    The embeddings, each of unit length, are averaged, centred on the mean of the training questions, and projected on
    the principal axes of these.
    """

    mean: Tensor
    axes: Tensor

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("axes", torch.zeros(dim, width))

    def words(self, text: Tensor, text_mask: Tensor) -> Tensor:
        """`text` (B, T, D), `text_mask` (B, T) bool -> the mean of each row's words (B, D)."""
        words = nn.functional.normalize(text, dim=-1) * text_mask[..., None]
        return words.sum(dim=1) / text_mask.sum(dim=1, keepdim=True).clamp_min(1)

    def fit(self, words: Tensor) -> None:
        """Take mean and axes from the words (E, D) of questions."""
        mean, axes = principal_axes(words, self.axes.shape[0])
        self.mean.copy_(mean)
        self.axes.copy_(axes)

    def forward(self, words: Tensor) -> Tensor:
        """Words (B, D) -> keys (B, Q)."""
        key: Tensor = (words - self.mean) @ self.axes.T
        length: Tensor = key.norm(dim=-1, keepdim=True)
        return torch.where(length > LEAST, key / length.clamp_min(LEAST), 0.0)
