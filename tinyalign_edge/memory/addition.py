"""An entry that is to be added: checked, its numbers quantised."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tinyalign_edge.config import WITH_TOKENS
from tinyalign_edge.errors import InputError
from tinyalign_edge.memory.check import in_vocabulary
from tinyalign_edge.memory.layout import MAX_ENTRY_BYTES, BankSpec
from tinyalign_edge.memory.search import quantize_keys
from tinyalign_edge.memory.table import Row
from tinyalign_edge.memory.value import Hybrid, Ints, Value, latents_of, token_ids_of
from tinyalign_edge.memory.write import quantize_latents

Float = npt.NDArray[np.float32]


def new_row(spec: BankSpec, key: Float, record: bytes, value: Value) -> Row:
    """The entry as it will be stored, with no id yet.

    Raises:
        InputError: a key or value of another shape or kind, zero or not finite, or an entry too large.
    """
    if key.shape != (spec.key_dim,):
        raise InputError(f"key: of the shape {key.shape}, this bank's are ({spec.key_dim},)")
    length = np.linalg.norm(key.astype(np.float64))
    if not np.isfinite(length) or length == 0:
        raise InputError("key: it is zero or not finite; give another picture")
    keys, key_scales = quantize_keys((key / length).astype(np.float32)[None])
    token_ids, latents = _checked_value(spec, value)
    quantised, scales = quantize_latents(latents)
    size = keys.nbytes + quantised.nbytes + scales.nbytes + (0 if token_ids is None else token_ids.nbytes) + len(record)
    if size > MAX_ENTRY_BYTES:
        raise InputError(f"entry: takes {size} bytes, at most {MAX_ENTRY_BYTES} are kept; give a shorter text")
    return Row(-1, key_scales[0], keys[0], token_ids, quantised, scales, record)


def _checked_value(spec: BankSpec, value: Value) -> tuple[Ints | None, Float]:
    """The token ids (T,) int32, None for "latents", and the latents (L, latent_dim) that a bank keeps of a value."""
    if not isinstance(value, Hybrid):
        array: Any = np.asarray(value)  # a list may be given
        value = array
    kind = "hybrid" if isinstance(value, Hybrid) else {1: "tokens", 2: "latents"}.get(value.ndim, f"{value.ndim}-d")
    if kind != spec.kind:
        raise InputError(f"value: it is of kind {kind}, and this bank holds {spec.kind}; give one of that kind")
    ids, latents = token_ids_of(value), latents_of(value)
    if latents.shape != (spec.latents, spec.latent_dim) or not np.all(np.isfinite(latents)):
        raise InputError(f"value: need finite latents of the shape ({spec.latents}, {spec.latent_dim})")
    if spec.kind not in WITH_TOKENS:
        return None, latents.astype(np.float32)
    if ids.ndim != 1 or not in_vocabulary(ids, spec):
        raise InputError(f"value: need token ids from 0 to {spec.vocab_size - 1}")
    return ids.astype(np.int32), latents.astype(np.float32)
