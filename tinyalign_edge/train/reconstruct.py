"""The own loss of latents: an entry's i-th memory token has to be known as the i-th token of its text.

It is known by the direction in which it lies from the mean of the language model's input embeddings, among those of
the whole vocabulary: that is the table that a frozen language model reads. Its output embeddings say what follows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

TEMPERATURE = 0.05  # of the cosines: a token's own embedding is then known among tens of thousands


def text_losses(tokens: Tensor, token_ids: Tensor, token_mask: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """How surely the texts' first tokens are known from the memory tokens at their places.

    Args:
        tokens: (E, L, D) memory tokens of E entries.
        token_ids, token_mask: (E, T) int64 and bool, the entries' texts. What is longer than L is not asked for, and
            what is left of the L after a shorter text may say anything.
        table: (V, D) input embeddings; nothing is computed backwards through them.

    Returns:
        Negative log-likelihoods (P,), in nats, of all tokens that are asked for, and (P,) int64 of which entry each is.
    """
    size = min(tokens.shape[1], token_ids.shape[1])
    asked = token_mask[:, :size]
    table = table.detach().float()
    mean = table.mean(dim=0)
    vocabulary = nn.functional.normalize(table - mean, dim=-1)
    found = nn.functional.normalize(tokens[:, :size][asked].float() - mean, dim=-1)  # (P, D)
    logits = (found @ vocabulary.T).float() / TEMPERATURE
    losses = nn.functional.cross_entropy(logits, token_ids[:, :size][asked], reduction="none")
    return losses, asked.nonzero()[:, 0]


def sum_over_answers(losses: Tensor, rows: Tensor, answer_tokens: Tensor) -> Tensor:
    """What a batch adds to the sum of its answer tokens' losses: each adds the mean loss of its row's memory.

    So it does not depend on how the rows of a step are divided into passes and processes.

    Args:
        losses, rows: (P,) losses, and int64 of which row each is.
        answer_tokens: (B,) int64, of each row.
    """
    sums = losses.new_zeros(len(answer_tokens)).index_add(0, rows, losses)
    counts = torch.bincount(rows, minlength=len(answer_tokens))
    return (answer_tokens * sums / counts.clamp_min(1)).sum()
