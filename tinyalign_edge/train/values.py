"""Values of the bank's entries, made by the value encoder."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import torch

from tinyalign_edge.progress import progress
from tinyalign_edge.train.batches import Values, pad_texts
from tinyalign_edge.train.model import AlignModel
from tinyalign_edge.train.processes import is_first

BATCH = 64


def value_fingerprint(keys: str, model: AlignModel) -> str:
    """What a bank depends on: the fingerprint of its keys, and of latents also the trained weights they are made by."""
    if model.value_encoder is None:
        return keys
    digest = hashlib.sha256(bytes.fromhex(keys))
    for weight in model.value_encoder.state_dict().values():
        digest.update(weight.cpu().numpy().tobytes())
    return digest.hexdigest()


def encode_values(model: AlignModel, values: Values) -> npt.NDArray[np.float32]:
    """Latents (E, L, latent_dim) of every entry, from its features and token ids."""
    assert values.features is not None
    made = []
    count = len(values.token_ids)
    telling = progress("Encoding entries", count, brief=True, shown=is_first())
    with torch.inference_mode(), telling as advance:
        for start in range(0, count, BATCH):
            ids, mask = pad_texts(values.token_ids[start : start + BATCH])
            entries = range(start, start + len(ids))
            features = torch.from_numpy(np.asarray(values.features(entries), np.float32))
            made.append(model.latents(features, ids, mask).numpy())
            advance(len(ids))
    return np.concatenate(made)
