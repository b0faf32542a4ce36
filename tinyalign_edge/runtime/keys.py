"""Retrieval keys: of a picture, or of a picture with what is asked about it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyalign_edge.bundle import Manifest
from tinyalign_edge.memory.side_by_side import joined
from tinyalign_edge.prompt import Prompt
from tinyalign_edge.runtime.sessions import check_shapes, onnxruntime_errors, open_session

Float = npt.NDArray[np.float32]


class KeyMaker:
    """Makes the keys that entries are stored under and searched with.

    Args:
        embed: token ids (T,) to the language model's embeddings (T, D).

    Attributes:
        asks: whether a key tells what is asked.

    Raises:
        BundleError: onnxruntime does not take the graph, or it is not the one the manifest describes.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, prompt: Prompt, embed: Callable[[npt.NDArray[np.int64]], Float]
    ) -> None:
        memory = manifest.memory
        file, self._dim, self._weight = memory.question_file, memory.question_dim, memory.question_weight
        self._prompt, self._embed, self.asks = prompt, embed, file is not None
        if file is not None:
            self._path = folder / file
            self._session: Any = open_session(self._path, threads=1)
            check_shapes(self._session, {"text": [manifest.decoder.width], "question": [self._dim]}, self._path)

    def key(self, picture: Float, question: str) -> Float:
        """The unit key (key_dim,) of a picture's (P,) and a question; "" tells nothing, as does any question where keys
        are of pictures alone."""
        if not self.asks:
            return picture
        return joined(picture, self._question(question), self._weight)

    def _question(self, question: str) -> Float:
        ids = np.array(self._prompt.asked_ids(question), np.int64)
        if not len(ids):
            return np.zeros(self._dim, np.float32)
        with onnxruntime_errors(self._path):
            found: Float = self._session.run(["question"], {"text": self._embed(ids)})[0]
        return found
