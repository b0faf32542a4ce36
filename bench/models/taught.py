"""A simple language for the tiny models to learn: one that has learnt it knows what comes next, as a real model does.

Each token has one that follows it; one time in ten another one comes.
"""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel

from tinyalign_edge.bench.models.tiny import VOCABULARY

SURPRISES = 0.1
STEPS, BATCH, TOKENS, RATE = 100, 8, 48, 6e-3


def sentence(count: int, *, seed: int) -> list[int]:
    """Token ids of the language, the same at every call with the same seed."""
    rng, follows = np.random.default_rng(seed), np.random.default_rng(0).permutation(VOCABULARY)
    ids = [int(rng.integers(VOCABULARY))]
    while len(ids) < count:
        ids.append(int(rng.integers(VOCABULARY) if rng.random() < SURPRISES else follows[ids[-1]]))
    return ids


def teach(model: PreTrainedModel) -> PreTrainedModel:
    """Train the model on the language for a second; returns it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    for step in range(STEPS):
        ids = torch.tensor([sentence(TOKENS, seed=100 + step * BATCH + i) for i in range(BATCH)])
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return model.requires_grad_(False)
