"""Features on disk, in shards that are named after their content: what is damaged, cut short or foreign is not read.

DIR/<what the features depend on>/about.json          for people
DIR/<what the features depend on>/<SHA-256>.features  records as `record_type` says, one after another
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyalign_edge.config import to_json, write_json
from tinyalign_edge.errors import InputError
from tinyalign_edge.files import file_sha256

SUFFIX = ".features"
SHARD_BYTES = 256 * 2**20
SPARE_BYTES = 256 * 2**20  # left free on the disk


@dataclass(frozen=True)
class Known:
    """The records that a cache holds: mapped shards, and by the digest of a picture its shard and record."""

    blocks: list[npt.NDArray[np.void]]
    places: dict[bytes, tuple[int, int]]


class FeatureCache:
    """The features of one encoder with one preprocessing and pooling.

    Args:
        folder: of the caches of all encoders.
        about: what the features depend on besides the pictures: JSON values.

    Raises:
        InputError: the folder cannot be made.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        described = json.dumps(to_json(about), sort_keys=True).encode()
        self.folder, self.about = folder / hashlib.sha256(described).hexdigest()[:32], about
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise self._unusable(error) from None

    def known(self, record: np.dtype[np.void]) -> Known:
        """Open every whole shard; others are deleted, so that their pictures are encoded again."""
        blocks: list[npt.NDArray[np.void]] = []
        places: dict[bytes, tuple[int, int]] = {}
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            if not _whole(path, record):
                path.unlink(missing_ok=True)
                print(f"note: {path}: damaged or foreign; its pictures are encoded again", file=sys.stderr)
                continue
            block = np.memmap(path, record, mode="r")
            places.update({digest.tobytes(): (len(blocks), i) for i, digest in enumerate(block["digest"])})
            blocks.append(block)
        return Known(blocks, places)

    def room(self) -> int:
        """Bytes that may be added."""
        return max(0, shutil.disk_usage(self.folder.parent).free - SPARE_BYTES)

    def check_room(self, needed: int, room: int, pictures: int, less: str) -> None:
        """Refuse to write more than there is room for.

        Raises:
            InputError: says how much is needed and how much is free.
        """
        if needed > room:
            raise InputError(
                f"{self.folder.parent}: the features of {pictures} pictures take {needed / 1e9:.2f} GB, the disk has "
                f"room for {room / 1e9:.2f} GB; {less}"
            )

    def parts(self, pictures: Sequence[int], record: np.dtype[np.void]) -> Iterator[Sequence[int]]:
        """The pictures of one shard after another."""
        size = max(1, SHARD_BYTES // record.itemsize)
        return (pictures[start : start + size] for start in range(0, len(pictures), size))

    def write(self, block: npt.NDArray[np.void]) -> None:
        """Add a shard; it appears whole or not at all.

        Raises:
            InputError: it cannot be written.
        """
        data = block.tobytes()
        temporary, about = self.folder / f".{os.getpid()}.part", self.folder / "about.json"
        try:
            self.folder.mkdir(exist_ok=True)
            if not about.exists():
                write_json(about, self.about)
            temporary.write_bytes(data)
            temporary.replace(self.folder / (hashlib.sha256(data).hexdigest() + SUFFIX))
        except OSError as error:
            raise self._unusable(error) from None
        finally:
            temporary.unlink(missing_ok=True)

    def _unusable(self, error: OSError) -> InputError:
        where = f"{self.folder.parent}: cannot be written ({error.strerror})"
        return InputError(f"{where}; choose another folder (--cache-features DIR)")


def content_digest(path: Path) -> bytes:
    """SHA-256 of a picture's file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return bytes.fromhex(file_sha256(path))
    except OSError as error:
        raise InputError(f"image {path}: cannot be read ({error.strerror})") from None


def _whole(path: Path, record: np.dtype[np.void]) -> bool:
    size = path.lstat().st_size if path.exists() else 0  # another process may have deleted it
    if path.is_symlink() or not path.is_file() or not size or size % record.itemsize:
        return False
    return file_sha256(path) == path.name.removesuffix(SUFFIX)
