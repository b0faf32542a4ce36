"""Rows of conversations to entries of a bank, with the bundle's own graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tinyalign_edge.bundle import Manifest
from tinyalign_edge.config import WITH_LATENTS, WITH_TOKENS
from tinyalign_edge.data import Row
from tinyalign_edge.errors import InputError
from tinyalign_edge.evaluate import single_questions
from tinyalign_edge.image import open_image
from tinyalign_edge.memory import Record, Value, latents_of, make_thumbnail, token_ids_of
from tinyalign_edge.memory.search import UNIT
from tinyalign_edge.memory.shards import Entries
from tinyalign_edge.runtime.model import Model
from tinyalign_edge.runtime.sight import EncodedImage


@dataclass(frozen=True)
class NewEntry:
    """An entry as it will be stored, its numbers not quantised yet."""

    key: npt.NDArray[np.float32]  # (key_dim,), unit length
    record: Record
    value: Value


class EntryMaker:
    """Makes the entry of a row. A picture that the row before had is not encoded again."""

    def __init__(self, model: Model, *, value_tokens: int, thumbnails: bool) -> None:
        self._model, self._value_tokens, self._thumbnails = model, value_tokens, thumbnails
        self._last: tuple[Path, EncodedImage] | None = None

    def entries(self, row: Row) -> list[NewEntry]:
        """What the bank keeps of `row`: an entry, or one of each question where they are found by it.

        Raises:
            InputError: as `entry`.
        """
        rows = single_questions([row]) if self._model.keys.asks else [row]
        return [self.entry(one) for one in rows]

    def entry(self, row: Row) -> NewEntry:
        """What the bank keeps of `row`, under what its first question asks.

        Raises:
            InputError: its picture cannot be read; the message names the row.
        """
        image = self._encode(row)
        assert image.key is not None
        if not abs(np.linalg.norm(image.key) - 1) <= UNIT:
            raise InputError(f"{row.where}: the key of {row.path} is not of length 1; look for a damaged encoder")
        value = self._value(image, row)
        if not np.all(np.isfinite(latents_of(value))):
            raise InputError(f"{row.where}: a value of {row.path} is not finite; look for a damaged value encoder")
        first, asked = row.memory_turns[0], row.turns[0].question
        thumbnail = make_thumbnail(open_image(row.path)) if self._thumbnails else b""
        question = asked if self._model.keys.asks else first.question
        record = Record(first.answer, question, row.id, thumbnail=thumbnail)
        return NewEntry(self._model.keys.key(image.key, asked), record, value)

    def _value(self, image: EncodedImage, row: Row) -> Value:
        """What the model will read of the entry."""
        value: Value = self._model.values.make(image.features, row.memory_turns, limit=self._value_tokens)
        return value

    def _encode(self, row: Row) -> EncodedImage:
        if self._last is None or self._last[0] != row.path:
            try:
                self._last = row.path, self._model.encode(row.path, memories=())
            except InputError as error:
                raise InputError(f"{row.where}: {error}") from None
        return self._last[1]


def side_by_side(entries: Sequence[NewEntry], manifest: Manifest) -> Entries:
    """Entries as a shard is written from them."""
    memory = manifest.memory
    latents, shape = [latents_of(entry.value) for entry in entries], (len(entries), memory.latents, memory.latent_dim)
    token_ids = [token_ids_of(entry.value).tolist() for entry in entries]
    return Entries(
        keys=np.array([entry.key for entry in entries], np.float32).reshape(len(entries), memory.key_dim),
        records=[entry.record for entry in entries],
        token_ids=token_ids if memory.kind in WITH_TOKENS else None,
        latents=np.array(latents, np.float32).reshape(shape) if memory.kind in WITH_LATENTS else None,
    )
