"""What the frozen encoder sees in every picture: pooled features for training, region features for the keys.

They are kept in memory, or in a cache on disk (`feature_cache`) from which they are mapped. Where neither has room for
the pooled ones, these are made anew whenever they are asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyalign_edge.errors import InputError
from tinyalign_edge.progress import progress
from tinyalign_edge.train.feature_cache import FeatureCache, Known, content_digest

Floats = npt.NDArray[np.floating[Any]]
Records = npt.NDArray[np.void]  # of `record_type`
Encoder = Callable[[Sequence[int]], tuple[Floats, npt.NDArray[np.float32]]]  # pictures by number: pooled, regions

BATCH = 8  # pictures; fits the processor's caches, larger batches are slower
SHARE_OF_MEMORY = 0.6  # that features may take


def record_type(pooled: tuple[int, int], regions: int, kind: str = "<f2") -> np.dtype[np.void]:
    """One picture's features: `pooled` (N, C), in training float16 (the connector's LayerNorm makes the rounding
    harmless), `regions` (key_grid**2 * C,) float32, and the SHA-256 of the picture's file where they come from a cache.
    """
    return np.dtype([("digest", "u1", 32), ("regions", "<f4", regions), ("pooled", kind, pooled)])


@dataclass(frozen=True)
class Features:
    """Records of pictures, in blocks.

    Attributes:
        blocks: in memory, or mapped from files.
        places: of every picture, its block and its record in it: (P, 2); (-1, -1) for a picture that is not there.
        lost: why a picture is not there, of those that this process was to read.
        anew: encodes pictures whose pooled features are not in the records, up to `BATCH` of them; None: they are.
    """

    blocks: Sequence[Records]
    places: npt.NDArray[np.int64]
    record: np.dtype[np.void]
    lost: dict[int, str] = field(default_factory=dict)
    anew: Encoder | None = None

    def __contains__(self, picture: int) -> bool:
        return bool(self.places[picture, 0] >= 0)

    def pooled(self, pictures: Sequence[int]) -> Floats:
        """(P, N, C) of the pictures with these numbers; of none, (0, N, C), or (0, 0, C) where they are made anew."""
        if self.anew is None or not pictures:
            return self._take("pooled", pictures)
        places: dict[int, list[int]] = {}
        for place, picture in enumerate(pictures):
            places.setdefault(picture, []).append(place)
        each, out = list(places), np.empty(0, self.record["pooled"].base)
        for start in range(0, len(each), BATCH):
            some = each[start : start + BATCH]
            made, _ = self.anew(some)
            if not start:
                out = np.empty((len(pictures), *made.shape[1:]), out.dtype)
            for picture, pooled in zip(some, made, strict=True):
                out[places[picture]] = pooled
        return out

    def regions(self, pictures: Sequence[int]) -> npt.NDArray[np.float32]:
        """(P, key_grid**2 * C) of the pictures with these numbers."""
        return self._take("regions", pictures)

    def _take(self, name: str, pictures: Sequence[int]) -> npt.NDArray[Any]:
        kind = self.record[name]
        out = np.empty((len(pictures), *kind.shape), kind.base)
        for i, picture in enumerate(pictures):
            block, record = self.places[picture]
            out[i] = self.blocks[block][name][record]
        return out


def find_features(
    paths: Sequence[Path],
    wanted: Sequence[int],
    record: np.dtype[np.void],
    encode: Encoder,
    *,
    cache: Callable[[np.dtype[np.void]], FeatureCache] | None,
    no_room: Callable[[int, float], None] | None = None,
    skip_bad: bool = False,
    share: tuple[int, int] = (0, 1),
    together: Callable[[], AbstractContextManager[None]] = nullcontext,
    of_first: Callable[[bool], bool] = bool,
) -> Features:
    """The features of the pictures with the numbers `wanted`; those that the cache lacks are encoded.

    Args:
        paths: of all pictures, by number.
        encode: up to `BATCH` pictures, by number, to their pooled and region features.
        cache: of records of a type; None: they are kept in memory.
        no_room: called, before anything is encoded, where there is no room for the pooled features, with the bytes that
            they take and those that are free: they are made anew whenever they are asked for. None: that is an error.
        skip_bad: leave out pictures that cannot be read, instead of raising.
        share: number of this process and how many there are: each encodes a part, and they meet in the cache;
            the first alone says how far it is.
        together: a block at whose end all processes meet.
        of_first: what the first process decides, in all of them.

    Raises:
        InputError: a picture cannot be read, or the features do not fit into memory or on the disk.
    """
    first = share[0] == 0
    places = np.full((len(paths), 2), -1, np.int64)
    lost: dict[int, str] = {}
    anew: Encoder | None = None
    if cache is None:
        needed = len(wanted) * record.itemsize
        if no_room and needed > _memory_room():
            no_room(needed, _memory_room())
            record, anew = _without_pooled(record), encode
        _check_memory(len(wanted) * record.itemsize, len(wanted))
        block = np.zeros(len(wanted), record)
        good = _encode(block, wanted, encode, lost if skip_bad else None, shown=first)
        places[np.asarray(wanted, np.int64)[good]] = [(0, i) for i in np.flatnonzero(good)] or (-1, -1)
        return Features([block], places, record, lost, anew)
    with together():
        digests = _digests(paths, wanted, shown=first)
        unique = {digest: i for i, digest in reversed(digests.items())}  # pictures of the same content share a record
        kept, known, missing = _look_into(cache, record, unique)
        needed, room = len(missing) * record.itemsize, kept.room()
    if no_room and of_first(needed > room):
        no_room(needed, room)
        if first:
            kept.remove_if_empty()
        record, anew = _without_pooled(record), encode
        with together():
            kept, known, missing = _look_into(cache, record, unique)
    with together():
        kept.check_room(len(missing) * record.itemsize, len(missing), told=first)
    with together():
        for part in kept.parts(missing[share[0] :: share[1]], record):
            block = np.zeros(len(part), record)
            block["digest"] = [np.frombuffer(digests[i], np.uint8) for i in part]
            good = _encode(block, part, encode, lost if skip_bad else None, shown=first)
            if good.any():
                kept.write(block[good])
    known = kept.known(record) if missing else known
    for i, digest in digests.items():
        places[i] = known.places.get(digest, (-1, -1))
    return Features(known.blocks, places, record, lost, anew)


def _look_into(
    cache: Callable[[np.dtype[np.void]], FeatureCache], record: np.dtype[np.void], unique: dict[bytes, int]
) -> tuple[FeatureCache, Known, list[int]]:
    """The cache of such records, what it holds, and the pictures whose digests it lacks."""
    kept = cache(record)
    known = kept.known(record)
    return kept, known, [i for digest, i in unique.items() if digest not in known.places]


def _without_pooled(record: np.dtype[np.void]) -> np.dtype[np.void]:
    pooled = record["pooled"]
    return record_type((0, pooled.shape[1]), record["regions"].shape[0], pooled.base.str)


def _digests(paths: Sequence[Path], wanted: Sequence[int], *, shown: bool) -> dict[int, bytes]:
    digests = {}
    with progress("Reading pictures", len(wanted), shown=shown) as advance:
        for i in wanted:
            digests[i] = content_digest(paths[i])
            advance()
    return digests


def _encode(
    block: Records, pictures: Sequence[int], encode: Encoder, lost: dict[int, str] | None, *, shown: bool
) -> npt.NDArray[np.bool_]:
    """Fill the records of `pictures`; true for those that could be read. Why others could not is put into `lost`, or
    raised where that is None."""
    good = np.ones(len(pictures), np.bool_)
    with progress("Encoding pictures", len(pictures), shown=shown) as advance:
        for start in range(0, len(pictures), BATCH):
            part = range(start, min(start + BATCH, len(pictures)))
            try:
                _fill(block, part, pictures, encode)
            except InputError:
                if lost is None:
                    raise
                for i in part:
                    try:
                        _fill(block, range(i, i + 1), pictures, encode)
                    except InputError as error:
                        good[i] = False
                        lost[pictures[i]] = str(error.__cause__ or error)
            advance(len(part))
    return good


def _fill(block: Records, part: range, pictures: Sequence[int], encode: Encoder) -> None:
    place = slice(part.start, part.stop)
    pooled, block["regions"][place] = encode(pictures[place])
    block["pooled"][place] = pooled[:, : block["pooled"].shape[1]]


def _memory_room() -> float:
    return SHARE_OF_MEMORY * _memory()


def _memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _check_memory(needed: int, pictures: int) -> None:
    if needed > _memory_room():
        memory = f"{_memory() / 1e9:.1f} GB of memory"
        raise InputError(
            f"the features of {pictures} pictures take {needed / 1e9:.1f} GB, this machine has {memory}; give "
            "--cache-features DIR or train on fewer rows (--fraction)"
        )
