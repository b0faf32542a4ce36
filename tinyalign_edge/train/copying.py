"""The copy term: what follows may be taken from the retrieved texts instead of the language model's vocabulary.

A pointer over the memory tokens and one place that stands for the vocabulary (pointer sentinel mixture, Merity et al.,
2017, arXiv 1609.07843). A token of the memory is found as an induction head finds it: by what the language model
expected before it, by what it made of it, and by whether the token before it is the one just read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

NOTHING = -1  # in place of the token before an entry's first
LEAST = 1e-30  # of a copied share, so that its logarithm is finite
VOCABULARY_FIRST = 7.0  # what the vocabulary's place begins at: untrained, little is copied
ALIKE = 8.0  # what a token counts at first whose key is the query
SIMILAR = 4.0  # how much the similarity of its entry counts at first
MATCH = 5.0  # what a token counts at first where the one before it was just read


@dataclass(frozen=True)
class Texts:
    """What can be copied in the rows of a batch: the memory tokens and, after every whole entry, the answer's end.

    Attributes:
        states: (B, M, 2 * D), the language model's last hidden states before and at each of them; of an end, which is
            not read, twice that of the entry's last token.
        token_ids, before: (B, M) int64, each token and the one before it in its entry, or `NOTHING`.
        mask: (B, M) bool.
        similarity: (B, M) float32, of the entry that each is of.
    """

    states: Tensor
    token_ids: Tensor
    before: Tensor
    mask: Tensor
    similarity: Tensor


def memory_texts(
    hidden: Tensor,
    memory_mask: Tensor,
    token_ids: Tensor,
    rank: Tensor,
    similarity: Tensor,
    *,
    end: int | None = None,
    limit: int = 0,
) -> Texts:
    """The memory tokens among the hidden states (B, S, D), at the places that `memory_mask` (B, S) says.

    Args:
        token_ids, rank, similarity: of all of them, row after row: (M,) int64, int64 and float32.
        end: the token that ends an answer, to be copied after entries shorter than `limit` tokens; None: it is not.
    """
    count = int(memory_mask.sum(dim=1).max())
    places = torch.argsort(memory_mask.int(), dim=1, descending=True, stable=True)[:, :count]  # (B, M)
    empty = torch.zeros_like(memory_mask, dtype=torch.int64)
    ids, ranks = (empty.masked_scatter(memory_mask, value).gather(1, places) for value in (token_ids, rank))
    alike = similarity.new_zeros(memory_mask.shape).masked_scatter(memory_mask, similarity).gather(1, places)
    mask = memory_mask.gather(1, places)
    follows = (ranks[:, 1:] == ranks[:, :-1]) & mask[:, 1:]
    before = nn.functional.pad(ids[:, :-1].masked_fill(~follows, NOTHING), (1, 0), value=NOTHING)
    rows = torch.arange(len(places), device=places.device)[:, None]
    states = torch.cat([hidden[rows, (places - 1).clamp_min(0)], hidden[rows, places]], dim=-1)
    if end is None:
        return Texts(states, ids, before, mask, alike)
    number = torch.arange(count, device=places.device)
    continued = nn.functional.pad(follows, (1, 0))
    first = number.masked_fill(continued, 0).cummax(dim=1).values  # of each token's entry
    whole = mask & ~nn.functional.pad(follows, (0, 1)) & (number - first + 1 < limit)
    entries = torch.argsort(whole.int(), dim=1, descending=True, stable=True)[:, : int(whole.sum(dim=1).max())]
    last = hidden[rows, places.gather(1, entries)]
    return Texts(
        torch.cat([states, torch.cat([last, last], dim=-1)], dim=1),
        torch.cat([ids, torch.full_like(entries, end)], dim=1),
        torch.cat([before, ids.gather(1, entries)], dim=1),
        torch.cat([mask, whole.gather(1, entries)], dim=1),
        torch.cat([alike, alike.gather(1, entries)], dim=1),
    )


class CopyHead(nn.Module):
    """From hidden states to how likely the next token is a copy, and of which token of the memory."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, dim)
        self.key = nn.Linear(2 * width, dim)
        self.vocabulary = nn.Linear(width, 1)
        self.match = nn.Linear(width, 1)
        self.similar = nn.Linear(width, 1)
        self.alike = nn.Linear(width, 1)
        with torch.no_grad():  # states that expect the same are alike from the start
            self.key.weight[:, :width].copy_(self.query.weight)
            starts = {self.vocabulary: VOCABULARY_FIRST, self.alike: ALIKE, self.match: MATCH, self.similar: SIMILAR}
            for scores, start in starts.items():
                scores.weight.zero_()
                scores.bias.fill_(start)

    def shares(self, hidden: Tensor, read: Tensor, texts: Texts) -> Tensor:
        """Logarithms (B, A, 1 + M) of the vocabulary's share of what follows, and of each memory token's.

        Args:
            hidden: (B, A, D), last hidden states of the positions that are asked.
            read: (B, A) int64, the tokens there.
        """
        states = torch.cat([self.norm(half) for half in texts.states.float().chunk(2, dim=-1)], dim=-1)
        normed = self.norm(hidden.float())
        query, key = (nn.functional.normalize(x, dim=-1) for x in (self.query(normed), self.key(states)))
        scores = self.alike(normed) * (query @ key.mT)  # (B, A, M)
        scores = scores + self.match(normed) * (read[:, :, None] == texts.before[:, None])
        scores = scores + self.similar(normed) * texts.similarity[:, None]
        scores = scores.masked_fill(~texts.mask[:, None], -torch.inf)
        return torch.cat([self.vocabulary(normed), scores], dim=-1).float().log_softmax(dim=-1)


def label_losses(logits: Tensor, shares: Tensor, token_ids: Tensor, labels: Tensor) -> Tensor:
    """Negative logarithms (W,) of what `mix` gives the labels (W,) int64, without those of the other tokens."""
    vocabulary = shares[:, 0] - nn.functional.cross_entropy(logits, labels, reduction="none")
    copied = (shares[:, 1:].exp() * (token_ids == labels[:, None])).sum(dim=1)
    return -torch.logaddexp(vocabulary, (copied + LEAST).log())


def mix(logits: Tensor, shares: Tensor, token_ids: Tensor) -> Tensor:
    """Log probabilities (W, V) of what follows.

    Args:
        logits: (W, V) of the language model.
        shares: (W, 1 + M) as `CopyHead.shares` gives them.
        token_ids: (W, M) int64.
    """
    copied = torch.zeros_like(logits).scatter_add(1, token_ids, shares[:, 1:].exp())
    return torch.logaddexp(logits.log_softmax(dim=-1) + shares[:, :1], (copied + LEAST).log())
