"""The own loss of latents: an entry's i-th memory token has to be known as the i-th token of its text.

It is known by the direction in which it lies from the mean of the language model's input embeddings, among those of
the whole vocabulary: that is the table that a frozen language model reads. Its output embeddings say what follows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

TEMPERATURE = 0.05  # of the cosines: a token's own embedding is then known among tens of thousands
AT_ONCE = 128  # tokens, whose cosines with a whole vocabulary are in memory


@dataclass(frozen=True)
class Vocabulary:
    """The mean (D,) of the input embeddings, and the directions (V, D) in which they lie from it, of unit length."""

    mean: Tensor
    directions: Tensor


def vocabulary_of(table: Tensor) -> Vocabulary:
    """Of input embeddings (V, D); nothing is computed backwards through them."""
    table = table.detach().float()
    mean = table.mean(dim=0)
    return Vocabulary(mean, nn.functional.normalize(table - mean, dim=-1))


def text_losses(tokens: Tensor, token_ids: Tensor, token_mask: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """How surely the texts' first tokens are known from the memory tokens at their places.

    Args:
        tokens: (E, L, D) memory tokens of E entries.
        token_ids, token_mask: (E, T) int64 and bool, the entries' texts. What is longer than L is not asked for, and
            what is left of the L after a shorter text may say anything.
        vocabulary: `vocabulary_of` the input embeddings.

    Returns:
        Negative log-likelihoods (P,), in nats, of all tokens that are asked for, and (P,) int64 of which entry each is.
    """
    size = min(tokens.shape[1], token_ids.shape[1])
    asked = token_mask[:, :size]
    found = nn.functional.normalize(tokens[:, :size][asked].float() - vocabulary.mean, dim=-1)  # (P, D)

    def losses(some: Tensor, ids: Tensor) -> Tensor:
        logits = (some @ vocabulary.directions.T).float() / TEMPERATURE
        return nn.functional.cross_entropy(logits, ids, reduction="none")

    parts = zip(found.split(AT_ONCE), token_ids[:, :size][asked].split(AT_ONCE), strict=True)
    kept = [checkpoint(losses, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.cat(kept), asked.nonzero()[:, 0]


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
