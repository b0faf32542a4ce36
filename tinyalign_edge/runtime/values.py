"""What a memory's entries carry: token ids, latents made by the bundle's value encoder, or both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyalign_edge.bundle import Manifest
from tinyalign_edge.data import Turn
from tinyalign_edge.errors import InputError
from tinyalign_edge.memory import Value, value_of
from tinyalign_edge.prompt import Prompt
from tinyalign_edge.runtime.sessions import check_shapes, onnxruntime_errors, open_session

Float = npt.NDArray[np.float32]


class ValueMaker:
    """Makes the values of new entries.

    Args:
        embed: token ids (T,) to the language model's embeddings (T, D).

    Raises:
        BundleError: onnxruntime does not take the value encoder, or it is not the one the manifest describes.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, prompt: Prompt, embed: Callable[[npt.NDArray[np.int64]], Float]
    ) -> None:
        settings, vision = manifest.memory, manifest.vision
        self._kind, self._limit, self._prompt, self._embed = settings.kind, settings.value_tokens, prompt, embed
        self._session: Any = None
        if settings.value_file is not None:
            self._path = folder / settings.value_file
            self._session = open_session(self._path, threads=1)
            shapes = {
                "features": [vision.visual_tokens, vision.feature_dim],
                "latents": [settings.latents, settings.latent_dim],
            }
            if settings.kind == "latents":
                shapes["text"] = [manifest.decoder.width]
            check_shapes(self._session, shapes, self._path)

    def make(self, features: Float | None, turns: Sequence[Turn], *, limit: int | None = None) -> Value:
        """The value of an entry: token ids (T,) int32, latents (L, latent_dim) float32, or both, by the memory's kind.

        Args:
            features: (N, C) of the picture, as the vision graph gives them; of no effect on token ids.
            turns: what is to be remembered; a text by itself has no question.
            limit: the most token ids kept or read; None: the bundle's.

        Raises:
            InputError: latents need features, and there are none.
        """
        ids = np.array(self._prompt.memory_ids(turns, self._limit if limit is None else limit), np.int64)
        latents = None if self._session is None else self._latents(features, ids)
        return value_of(self._kind, ids.astype(np.int32), latents)

    def _latents(self, features: Float | None, ids: npt.NDArray[np.int64]) -> Float:
        if features is None:
            raise InputError("image: it was encoded by a bundle without a value encoder; encode it with this one")
        feed = {"features": features[None]}
        if self._kind == "latents":
            feed["text"] = self._embed(ids)[None]
        with onnxruntime_errors(self._path):
            latents: Float = self._session.run(["latents"], feed)[0][0]
        return latents
