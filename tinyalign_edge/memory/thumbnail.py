"""Small pictures for people, who want to see what a memory holds; neither search nor answers read them."""

from __future__ import annotations

import io

from PIL import Image

from tinyalign_edge.errors import BundleError, InputError
from tinyalign_edge.image import open_image

SIDE = 64  # pixels of the longer edge
QUALITY = 75


def make_thumbnail(picture: Image.Image) -> bytes:
    """A JPEG of at most `SIDE` pixels a side, without metadata, of an RGB picture."""
    small = picture.copy()
    small.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=QUALITY, optimize=True)
    return file.getvalue()


def open_thumbnail(data: bytes, where: str) -> Image.Image:
    """Decode the thumbnail of an entry, which `where` names.

    Raises:
        BundleError: not a picture, or larger than thumbnails are.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as opened:
            if max(opened.size) > SIDE:
                raise BundleError(
                    f"{where}: its thumbnail is {opened.size[0]} x {opened.size[1]}; build the bank again"
                )
            return open_image(opened)
    except (OSError, InputError):
        raise BundleError(f"{where}: its thumbnail cannot be read; build the bank again") from None
