"""Pictures on the device: from bytes to visual tokens and the key that memories are found by."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyalign_edge.bundle import Manifest
from tinyalign_edge.image import ImageLike, open_image, preprocess, read_picture
from tinyalign_edge.memory import Entry
from tinyalign_edge.runtime.lru import Lru
from tinyalign_edge.runtime.sessions import ThreadsLike, check_shapes, onnxruntime_errors, open_session

Float = npt.NDArray[np.float32]


@dataclass(frozen=True)
class EncodedImage:
    """A picture as the language model reads it, with the memories retrieved for it; ask it any number of questions.

    Its arrays are read-only: the model knows the picture by them.
    """

    visual_tokens: Float  # (N, D)
    key: Float | None  # (P,), unit length, what a retrieval key tells of the picture; None without such keys
    memories: tuple[Entry, ...]
    memory_tokens: Float  # (M, D)
    timings_ms: dict[str, float] = field(default_factory=dict)
    searched: tuple[str, int, str] | None = None  # see `Model.renewed`; None: the memories are given, and stay
    features: Float | None = None  # (N, C), which the memory's value encoder reads; None where there is none
    memory_first: bool = False  # as `MemoryBlock.first`
    encoder: str = ""  # SHA-256 of the vision graph, since no other model reads it; "": made by hand

    def __post_init__(self) -> None:
        for name in ("visual_tokens", "key", "memory_tokens", "features"):
            array = getattr(self, name)
            if array is not None:
                object.__setattr__(self, name, _read_only(array))

    @cached_property
    def tokens(self) -> Float:
        """What the language model reads in the picture's place, (N + M, D)."""
        parts = [self.visual_tokens, self.memory_tokens]
        return _read_only(np.concatenate(parts[::-1] if self.memory_first else parts))

    @cached_property
    def digest(self) -> bytes:
        """Of `tokens`: it tells pictures, preprocessing, models and what their memories say apart."""
        return hashlib.blake2b(self.tokens.tobytes(), digest_size=16).digest()


@dataclass(frozen=True)
class Seen:
    """What the vision graph makes of a picture."""

    visual_tokens: Float  # (N, D)
    key: Float | None  # (P,)
    features: Float | None  # (N, C)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.visual_tokens, self.key, self.features) if part is not None)


class Sight:
    """The vision graph of an open bundle; pictures seen lately are known by their content.

    Raises:
        BundleError: onnxruntime does not take the file, or the graph is not the one the manifest describes.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, *, threads: ThreadsLike, cache_bytes: int, packed: Path | None = None
    ) -> None:
        self._image, self._vision = manifest.image, manifest.vision
        self._path = folder / manifest.vision.file
        self._session: Any = open_session(self._path, threads=threads, packed=packed)
        self._lately: Lru[Seen] = Lru(cache_bytes)
        shapes = {
            "pixel_values": [3, self._image.height, self._image.width],
            "visual_tokens": [self._vision.visual_tokens, manifest.decoder.width],
        }
        shapes |= {"key": [self._vision.key_dim]} if self._vision.key_dim else {}
        features = [self._vision.visual_tokens, self._vision.feature_dim]
        shapes |= {"features": features} if self._vision.feature_dim else {}
        check_shapes(self._session, shapes, self._path)

    def see(self, image: ImageLike, timings_ms: dict[str, float]) -> Seen:
        """Visual tokens and key of a picture; fills in `decode_image`, `preprocess` and `encode`.

        Raises:
            InputError: not a picture, damaged or too large.
        """
        started = time.perf_counter()
        data = read_picture(image)
        content = _digest(data)
        seen = self._lately.get(content)
        decoded = preprocessed = time.perf_counter()
        if seen is None:
            picture = open_image(data, name=str(image) if isinstance(image, str | Path) else "image")
            decoded = time.perf_counter()
            pixels = preprocess(picture, self._image)
            preprocessed = time.perf_counter()
            with onnxruntime_errors(self._path):
                outputs = self._session.run(list(self._vision.outputs), {"pixel_values": pixels})
            found = dict(zip(self._vision.outputs, (output[0] for output in outputs), strict=True))
            seen = Seen(found["visual_tokens"], found.get("key"), found.get("features"))
            self._lately.put(content, seen)
        times = (started, decoded, preprocessed, time.perf_counter())
        stages = zip(("decode_image", "preprocess", "encode"), times, times[1:], strict=False)
        timings_ms |= {stage: (end - start) * 1000 for stage, start, end in stages}
        return seen

    def clear_cache(self) -> None:
        """Let go of the pictures that were seen lately."""
        self._lately.drop(lambda _: True)


def _read_only(array: Float) -> Float:
    view = array.view()
    view.flags.writeable = False
    return view


def _digest(data: bytes | npt.NDArray[np.uint8]) -> bytes:
    """Of a file's bytes, or of pixels with their size."""
    if isinstance(data, bytes):
        return hashlib.blake2b(data, digest_size=16).digest()
    return hashlib.blake2b(data.tobytes(), key=repr(data.shape).encode(), digest_size=16).digest()
