"""What an entry carries: token ids of its text, latents, or both."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer]
Float = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Hybrid:
    """Both. The language model reads the latents, which tell of the picture, and after them the text.

    Its length is the memory tokens that it becomes, as that of the other kinds of value.
    """

    token_ids: Ints  # (T,)
    latents: Float  # (L, latent_dim)

    def __len__(self) -> int:
        return len(self.latents) + len(self.token_ids)


Value = Ints | Float | Hybrid  # "tokens": (T,) int32; "latents": (L, latent_dim) float32; "hybrid"


def value_of(kind: str, token_ids: Ints, latents: Float | None) -> Value:
    """What an entry of a bank of `kind` carries, of both; without latents, and so for the kind "none", token ids."""
    if latents is None:
        return token_ids
    return Hybrid(token_ids, latents) if kind == "hybrid" else latents


def token_ids_of(value: Value) -> Ints:
    """The token ids (T,) of a value; none of latents."""
    if isinstance(value, Hybrid):
        return value.token_ids
    return value if value.ndim == 1 else np.zeros(0, np.int32)  # type: ignore[return-value]


def latents_of(value: Value) -> Float:
    """The latents (L, latent_dim) of a value; none of token ids."""
    if isinstance(value, Hybrid):
        return value.latents
    return np.asarray(value, np.float32) if value.ndim == 2 else np.zeros((0, 0), np.float32)


def reading_order(latents: int, lengths: Ints) -> npt.NDArray[np.int64]:
    """The order (M,) in which hybrid entries are read, as places in all their latents followed by all their token ids.

    Args:
        latents: of each entry.
        lengths: token ids of each (E,).
    """
    count = len(lengths)
    owners = np.concatenate([np.repeat(np.arange(count), latents), np.repeat(np.arange(count), lengths)])
    return np.argsort(owners, kind="stable")
