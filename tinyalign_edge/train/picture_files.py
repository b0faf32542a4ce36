"""Pictures that a data set holds itself, as files that are named after their content: DIR/<2 digits>/<SHA-256>."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from tinyalign_edge.errors import TinyAlignError
from tinyalign_edge.files import file_sha256

FOLDER = "pictures"  # of a run's state, or of the features that are kept
SPARE_BYTES = 256 * 2**20  # left free on the disk


class PictureFiles:
    """The pictures in `folder`, which is made with the first of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, picture: bytes) -> str:
        """Write a picture, unless it is there whole; it appears whole or not at all. Returns its name in the folder.

        Raises:
            TinyAlignError: it cannot be written. No fault of the row, and the next one would fare no better.
        """
        digest = hashlib.sha256(picture).hexdigest()
        name = f"{digest[:2]}/{digest}"
        path = self.folder / name
        try:
            if path.is_file() and not path.is_symlink() and file_sha256(path) == digest:
                return name
            path.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(path.parent).free
            if len(picture) + SPARE_BYTES > free:
                raise TinyAlignError(
                    f"{self.folder}: the disk has {free / 1e9:.2f} GB free, too little for the data set's pictures; "
                    "make room, or choose another folder with --cache-features"
                )
            _write(path, picture)
        except OSError as error:
            raise TinyAlignError(f"{self.folder}: a picture cannot be written ({error.strerror})") from None
        return name


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{os.getpid()}.part")  # another process may be writing the same picture
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
