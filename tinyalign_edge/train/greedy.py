"""Greedy answers of a batch, in torch, with the copy term."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from tinyalign_edge.train.copying import mix
from tinyalign_edge.train.model import AlignModel, body_name


def greedy_answers(
    model: AlignModel, embeds: Tensor, batch: dict[str, Any], *, ends: Collection[int], max_new_tokens: int
) -> list[list[int]]:
    """Token ids of the answer to each row's question, without the one that ends it.

    Args:
        embeds: (B, S, D) of the rows of `batch`, padded on the right.
        batch: as `Collate` gives it; the rows end with their questions.
    """
    valid = batch["block"] >= 0
    order = torch.argsort(valid.int(), dim=1, stable=True)  # padding first, the rest in order
    read, memory_mask, mask = (part.gather(1, order) for part in (batch["input_ids"], batch["memory_mask"], valid))
    given = embeds.gather(1, order[..., None].expand_as(embeds))
    body = getattr(model.language, body_name(model.language))
    memory, texts, cache = batch["memory"], None, None
    ids: list[list[int]] = [[] for _ in embeds]
    open_rows = set(range(len(ids)))
    for _ in range(max_new_tokens):
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)[:, -given.shape[1] :]
        out = body(inputs_embeds=given, attention_mask=mask.long(), position_ids=positions, past_key_values=cache,
                   use_cache=True)  # fmt: skip
        hidden, cache = out.last_hidden_state, out.past_key_values
        if texts is None and memory is not None and model.copy_head is not None:
            first = hidden[torch.arange(len(hidden)), (~mask).sum(dim=1)]  # in place of what stands before it: padding
            texts = model.texts(torch.where(mask[..., None], hidden, first[:, None]), memory_mask, memory)
        scores = model.vocabulary_logits(hidden[:, -1])
        if texts is not None and model.copy_head is not None:
            shares = model.copy_head.shares(hidden[:, -1:], read[:, -1:], texts)
            scores = mix(scores, shares.squeeze(1), texts.token_ids)
        read = scores.argmax(dim=-1, keepdim=True)  # (B, 1)
        for row, token in enumerate(read.flatten().tolist()):
            if row in open_rows and token in ends:
                open_rows.remove(row)
            elif row in open_rows:
                ids[row].append(token)
        if not open_rows:
            break
        given = model.language.get_input_embeddings()(read)
        mask = torch.cat([mask, torch.ones_like(read, dtype=torch.bool)], dim=1)
    return ids
