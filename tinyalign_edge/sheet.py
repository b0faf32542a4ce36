"""What a memory found, side by side for people: a picture of thumbnails and texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tinyalign_edge.errors import InputError
from tinyalign_edge.folders import cause
from tinyalign_edge.memory import Entry, open_thumbnail
from tinyalign_edge.memory.thumbnail import SIDE

TILE_WIDTH, TILE_HEIGHT = 160, 2 * SIDE + 44  # pixels
COLUMNS = 5
LINE_CHARACTERS = 25


def contact_sheet(entries: Sequence[Entry]) -> Image.Image:
    """Entries in their order, row by row; a grey square stands for those without a thumbnail.

    Raises:
        BundleError: a thumbnail cannot be read.
    """
    columns = max(1, min(COLUMNS, len(entries)))
    sheet = Image.new("RGB", (columns * TILE_WIDTH, max(1, -(-len(entries) // COLUMNS)) * TILE_HEIGHT), "white")
    for place, entry in enumerate(entries):
        row, column = divmod(place, COLUMNS)
        sheet.paste(_tile(entry), (column * TILE_WIDTH, row * TILE_HEIGHT))
    return sheet


def write_sheet(entries: Sequence[Entry], path: Path) -> None:
    """Write the contact sheet of `entries` as PNG.

    Raises:
        InputError: `path` cannot be written.
    """
    try:
        contact_sheet(entries).save(path, "PNG")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({cause(error)}); choose another file") from None


def _tile(entry: Entry) -> Image.Image:
    tile = Image.new("RGB", (TILE_WIDTH, TILE_HEIGHT), "white")
    small = Image.new("RGB", (SIDE, SIDE), "lightgrey")
    if entry.thumbnail:
        small = open_thumbnail(entry.thumbnail, f"entry {entry.id}")
    shown = small.resize((2 * small.width, 2 * small.height))
    tile.paste(shown, ((TILE_WIDTH - shown.width) // 2, 4))
    lines = [f"{entry.id}  {entry.similarity:.3f}", entry.text[:LINE_CHARACTERS]]
    ImageDraw.Draw(tile).text((4, 2 * SIDE + 8), "\n".join(lines), fill="black", font=ImageFont.load_default(11))
    return tile
