"""What the frozen encoder sees in every picture: pooled features for training, region features for the keys.

They are kept in memory, or in a cache on disk (`feature_cache`) from which they are mapped. Where neither has room for
the pooled ones, these are made anew whenever they are asked for.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyalign_edge.errors import InputError
from tinyalign_edge.progress import progress
from tinyalign_edge.train.feature_cache import FeatureCache, content_digest
from tinyalign_edge.train.processes import Processes

Floats = npt.NDArray[np.floating[Any]]
Records = npt.NDArray[np.void]  # of `record_type`
Encoder = Callable[[Sequence[int]], tuple[Floats, npt.NDArray[np.float32]]]  # pictures by number: pooled, regions
NoRoom = Callable[[int, float], None]  # is told the bytes that are needed, and those that are free

BATCH = 8  # pictures; fits the processor's caches, larger batches are slower
SHARE_OF_MEMORY = 0.6  # that features may take
CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))  # v2, v1


def record_type(pooled: tuple[int, int], regions: int, kind: str = "<f2") -> np.dtype[np.void]:
    """One picture's features: `pooled` (N, C), in training float16 (the connector's LayerNorm makes the rounding
    harmless), `regions` (key_grid**2 * C,) float32, and the SHA-256 of the picture's file where they come from a cache.
    """
    return np.dtype([("digest", "u1", 32), ("regions", "<f4", regions), ("pooled", kind, pooled)])


@dataclass(frozen=True)
class Features:
    """Records of pictures, in blocks.

    Attributes:
        blocks: in memory, or mapped from files; without what is made `anew`.
        places: of every picture, its block and its record in it: (P, 2); (-1, -1) for a picture that is not there.
        record: the type of a picture's features.
        lost: why a picture is not there.
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
        """(P, N, C) of the pictures with these numbers."""
        if self.anew is None:
            return self._take("pooled", pictures)
        places: dict[int, list[int]] = {}
        for place, picture in enumerate(pictures):
            places.setdefault(picture, []).append(place)
        each, out = list(places), self._empty("pooled", len(pictures))
        for start in range(0, len(each), BATCH):
            some = each[start : start + BATCH]
            made, _ = self.anew(some)
            for picture, pooled in zip(some, made, strict=True):
                out[places[picture]] = pooled
        return out

    def regions(self, pictures: Sequence[int]) -> npt.NDArray[np.float32]:
        """(P, key_grid**2 * C) of the pictures with these numbers."""
        return self._take("regions", pictures)

    def _take(self, name: str, pictures: Sequence[int]) -> npt.NDArray[Any]:
        out = self._empty(name, len(pictures))
        for i, picture in enumerate(pictures):
            block, record = self.places[picture]
            out[i] = self.blocks[block][name][record]
        return out

    def _empty(self, name: str, pictures: int) -> npt.NDArray[Any]:
        kind = self.record[name]
        return np.empty((pictures, *kind.shape), kind.base)


def features_in_memory(
    pictures: int,
    wanted: Sequence[int],
    record: np.dtype[np.void],
    encode: Encoder,
    *,
    less: str,
    no_room: NoRoom | None = None,
    skip_bad: bool = False,
) -> Features:
    """Encode the pictures with the numbers `wanted`, of so many.

    Args:
        encode: up to `BATCH` pictures, by number, to their pooled and region features.
        less: how a message says what takes less room.
        no_room: called, before anything is encoded, where there is no room for the pooled features: they are made anew
            whenever they are asked for. None: that is an error.
        skip_bad: leave out pictures that cannot be read, instead of raising.

    Raises:
        InputError: a picture cannot be read, or there is no room.
    """
    needed, room = len(wanted) * record.itemsize, SHARE_OF_MEMORY * _memory()
    anew = no_room is not None and needed > room
    stored = _without_pooled(record) if anew else record
    if (least := len(wanted) * stored.itemsize) > room:
        raise InputError(
            f"the features of {len(wanted)} pictures take {least / 1e9:.1f} GB, this machine has {_memory() / 1e9:.1f} "
            f"GB of memory; {less}"
        )
    if no_room and anew:
        no_room(needed, room)
    lost: dict[int, str] = {}
    block = np.zeros(len(wanted), stored)
    good = _encode(block, wanted, encode, lost if skip_bad else None)
    places = np.full((pictures, 2), -1, np.int64)
    places[np.asarray(wanted, np.int64)[good]] = [(0, i) for i in np.flatnonzero(good)] or (-1, -1)
    return Features([block], places, record, lost, encode if anew else None)


def features_in_cache(
    paths: Sequence[Path],
    wanted: Sequence[int],
    record: np.dtype[np.void],
    encode: Encoder,
    cache: Callable[[np.dtype[np.void]], FeatureCache],
    processes: Processes,
    *,
    less: str,
    no_room: NoRoom,
    skip_bad: bool = False,
) -> Features:
    """Encode those of the pictures with the numbers `wanted` that the cache lacks: each process a part of them.

    What is missing and what there is room for is what the first process finds: another run may fill the same cache, or
    the disk, meanwhile.

    Args:
        paths: of all pictures, by number.
        cache: of records of a type.
        encode, less, no_room, skip_bad: as of `features_in_memory`.

    Raises:
        InputError: a picture cannot be read, there is no room, or somebody has emptied the cache.
    """
    first, together = processes.first, processes.together
    stored = record
    with together():
        kept = cache(record)
        digests = _digests(paths, wanted, shown=first)
        known = kept.known(record)
    unique = {digest: i for i, digest in reversed(digests.items())}  # pictures of the same content share a record

    def missing() -> list[int]:
        lacked: list[int] = processes.of_first([i for digest, i in unique.items() if digest not in known.places])
        return lacked

    to_encode = missing()
    needed, room = processes.of_first((len(to_encode) * record.itemsize, kept.room()))
    if anew := needed > room:
        stored = _without_pooled(record)
        with together():
            kept = cache(stored)
            known = kept.known(stored)
        to_encode = missing()
    with together():
        kept.check_room(len(to_encode) * stored.itemsize, room, len(to_encode), less)
        if anew:
            no_room(needed, room)
        if first and to_encode:
            size = f"{len(to_encode) * stored.itemsize / 1e9:.3f} GB"
            print(f"note: caching the features of {len(to_encode)} pictures, {size}, in {kept.folder}", file=sys.stderr)
    lost: dict[int, str] = {}
    with together():
        for part in kept.parts(to_encode[processes.rank :: processes.count], stored):
            block = np.zeros(len(part), stored)
            block["digest"] = [np.frombuffer(digests[i], np.uint8) for i in part]
            good = _encode(block, part, encode, lost if skip_bad else None, shown=first)
            if good.any():
                kept.write(block[good])
    reasons = {digests[i]: why for i, why in processes.joined(lost).items()}
    with together():
        if not known.places.keys() >= unique.keys() - reasons.keys():
            known = kept.known(stored)
        if gone := unique.keys() - known.places.keys() - reasons.keys():
            raise InputError(
                f"{kept.folder}: the features of {len(gone)} pictures have been taken away from there, such as "
                f"{paths[unique[min(gone)]]}; let nothing else remove them, and start again"
            )
    places = np.full((len(paths), 2), -1, np.int64)
    for i, digest in digests.items():
        places[i] = known.places.get(digest, (-1, -1))
    lost = {i: reasons[digest] for i, digest in digests.items() if digest in reasons}
    return Features(known.blocks, places, record, lost, encode if anew else None)


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
    block: Records, pictures: Sequence[int], encode: Encoder, lost: dict[int, str] | None, *, shown: bool = True
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


def _memory() -> int:
    """Bytes that this process may have: the machine's, or fewer where a container has a limit."""
    limits = [text for file in CONTAINER_LIMITS if file.is_file() and (text := file.read_text().strip()).isdigit()]
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *map(int, limits)])
