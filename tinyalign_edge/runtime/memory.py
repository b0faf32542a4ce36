"""The memory of an open bundle: what it knows of pictures, and how it is taught and made to forget."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from tinyalign_edge.bundle import MEMORY_DIR, Manifest, MemoryBlock
from tinyalign_edge.data import Turn
from tinyalign_edge.errors import BundleError, InputError
from tinyalign_edge.files import inside
from tinyalign_edge.image import ImageLike, open_image
from tinyalign_edge.memory import Bank, BankStats, Entry, Record, copy_bank, make_thumbnail
from tinyalign_edge.runtime.keys import KeyMaker
from tinyalign_edge.runtime.values import ValueMaker

if TYPE_CHECKING:
    from tinyalign_edge.runtime.sight import EncodedImage

Float = npt.NDArray[np.float32]


def check_has_memory(folder: Path, manifest: Manifest) -> None:
    """Refuse the bundle `folder` where it was trained without a memory.

    Raises:
        InputError: it was.
    """
    if manifest.memory.kind == "none":
        raise InputError(f"{folder}: this bundle has no memory; train one with --memory tokens")


def open_bank(folder: Path, manifest: Manifest, memory_dir: str | Path | None = None) -> Bank:
    """Open the bank of the bundle `folder`, or the one in `memory_dir`, which begins as a copy of the bundle's.

    Raises:
        InputError: the bundle has no memory, or `memory_dir` holds something else.
        BundleError: damaged, hostile, too new, or made with another bundle.
    """
    check_has_memory(folder, manifest)
    settings = manifest.memory
    home = inside(folder, MEMORY_DIR)
    if memory_dir is not None:
        copy_bank(home, Path(memory_dir))
        home = Path(memory_dir)
    bank = Bank(home)
    spec = bank.manifest.spec
    found = (spec.kind, spec.key_dim, spec.fingerprint)
    sizes = (spec.latents, spec.latent_dim, spec.vocab_size)
    expected_sizes = (settings.latents, settings.latent_dim, manifest.decoder.vocab_size)
    if found != (settings.kind, settings.key_dim, settings.fingerprint) or sizes != expected_sizes:
        raise BundleError(
            f"{bank.folder}: holds {found[0]} under keys of encoder {found[2][:12]}, the bundle reads "
            f"{settings.kind} of {settings.fingerprint[:12]}; use the bank made with this bundle"
        )
    return bank


class Memory:
    """Search, add and forget by picture. Reached as `Model.memory`; safe to use from several threads.

    Changes are seen by the next question in this process, also about pictures that were encoded before, and by other
    processes after their `refresh`.
    """

    def __init__(
        self,
        bank: Bank,
        settings: MemoryBlock,
        values: ValueMaker,
        keys: KeyMaker,
        encode: Callable[[ImageLike | EncodedImage], EncodedImage],
    ) -> None:
        self.bank = bank
        self._settings, self._values, self._keys, self._encode = settings, values, keys, encode

    def __len__(self) -> int:
        return len(self.bank)

    @property
    def generation(self) -> int:
        """Rises with every change that this process has seen."""
        return self.bank.manifest.generation

    @property
    def version(self) -> tuple[str, int]:
        """The bank's folder and its generation: what was found stays right as long as both do."""
        return str(self.bank.folder.resolve()), self.generation

    @property
    def asks(self) -> bool:
        """Whether entries are found by what is asked, too."""
        return self._keys.asks

    def searched(self, question: str) -> tuple[str, int, str]:
        """What the memories of a picture stay right for: `version` and, if they are found by it, the question."""
        return *self.version, question if self.asks else ""

    def recall(self, picture: Float, question: str) -> tuple[Entry, ...]:
        """What the model reads of a picture's key (P,) and a question; nothing while that is needed and not known."""
        return () if self.asks and not question else self.nearest(self._keys.key(picture, question))

    def search(
        self,
        image: ImageLike | EncodedImage,
        k: int | None = None,
        *,
        question: str = "",
        floor: float | None = None,
    ) -> tuple[Entry, ...]:
        """The entries most similar to a picture, most similar first.

        Args:
            image: as `Model.encode` takes it, or encoded.
            k: how many; None: as many as the model reads.
            question: what is asked, where entries are found by that, too; "": by the picture alone.
            floor: the least cosine similarity; None: the bundle's, under which the model reads nothing. By a picture
                alone, where entries are found by the question, too, there is none.

        Raises:
            InputError: not a picture, or `k` below 1.
        """
        if k is not None and k < 1:
            raise InputError(f"k {k}: must be at least 1")
        if floor is None and self.asks and not question.strip():
            floor = -1.0
        return self.nearest(self._keys.key(_key(self._encode(image)), question), k, floor=floor)

    def nearest(self, key: Float, k: int | None = None, *, floor: float | None = None) -> tuple[Entry, ...]:
        """`search` by a key (key_dim,)."""
        settings = self._settings
        return self.bank.search(key, settings.k if k is None else k, floor=settings.floor if floor is None else floor)

    def entry(self, id: int) -> Entry:
        """Read one entry.

        Raises:
            InputError: there is none of this id.
        """
        return self.bank.entry(id)

    def add(
        self,
        image: ImageLike | EncodedImage,
        text: str,
        *,
        question: str = "",
        source: str = "",
        time: str | None = None,
        thumbnail: bool = False,
    ) -> Entry:
        """Remember a text with a picture. It is on the disk when this returns.

        Args:
            image: as `Model.encode` takes it, or encoded.
            text: what is to be known about the picture; its first `value_tokens` tokens count.
            question: what the text answers; needed where entries are found by that, too.
            source: where it comes from, by which it can be forgotten.
            time: ISO 8601; None: now, in UTC.
            thumbnail: keep a small JPEG of the picture, which must not be encoded then.

        Raises:
            InputError: not a picture, the text is empty or too long, or the question is missing.
            TinyAlignError: the folder cannot be written; the memory is as it was.
        """
        text = text.strip()
        if not text:
            raise InputError("text: it is empty; say what is to be remembered")
        question = question.strip()
        if self.asks and not question:
            raise InputError("question: it is empty, and this memory is searched by it; say what the text answers")
        encoded = self._encode(image)
        value = self._values.make(encoded.features, [Turn("", text)])
        small = _thumbnail(image) if thumbnail else b""
        record = Record(text, question, source, _now() if time is None else time, small)
        key = self._keys.key(_key(encoded), question)
        return self.bank.entry(self.bank.add(key, record, value=value))

    def forget(self, *, id: int | None = None, source: str | None = None, text: str | None = None) -> tuple[int, ...]:
        """Forget the entry of an id, or all of a source or of a text, as `Bank.forget` says; returns their ids."""
        return self.bank.forget(id=id, source=source, text=text)

    def refresh(self) -> None:
        """See what other processes have changed."""
        self.bank.refresh()

    def stats(self) -> BankStats:
        """Counts and sizes."""
        return self.bank.stats()


def _key(image: EncodedImage) -> Float:
    if image.key is None:
        raise InputError("image: it was encoded by a bundle without a memory; encode it with this one")
    return image.key


def _thumbnail(image: ImageLike | EncodedImage) -> bytes:
    if not isinstance(image, str | Path | bytes | Image.Image | np.ndarray):
        raise InputError("image: it is encoded, and a thumbnail is made of a picture; give the picture")
    return make_thumbnail(open_image(image))


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
