"""Rows of a data set on the Hugging Face hub, through `datasets` where that package is installed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinyalign_edge.data import MAX_PICTURES
from tinyalign_edge.errors import InputError, MissingExtraError, first_line
from tinyalign_edge.image import MAX_FILE_BYTES
from tinyalign_edge.train.picture_files import PictureFiles

SPLIT = "train"
IMAGE = "image"
KEYS = ("id", IMAGE, "conversations", "caption")  # other columns are not read
AT_ONCE = 1000  # rows that are hashed


def is_hub_id(data: str) -> bool:
    """Whether `org/name`, with `/config` or `@split` behind it or both, is meant rather than a file."""
    path = Path(data)
    slashes = data.count("/")
    return not path.exists() and path.suffix not in (".json", ".jsonl") and slashes in (1, 2) and data[0] not in "./~"


class HubRows:
    """The rows of a data set with LLaVA's columns. The column `image` names files, or holds pictures: these are never
    decoded here, but written below `folder` as they are, when their row is first asked for, and named by their content.

    Attributes:
        holds_pictures: the rows' pictures are below `folder`.

    Raises:
        MissingExtraError: `datasets` is not installed.
        InputError: the hub could not give it, or has several configurations or other splits, which are named; a row,
            when it is asked for, that cannot be read or lacks the bytes of a picture.
        TinyAlignError: a picture cannot be written.
    """

    def __init__(self, data: str, folder: Path) -> None:
        try:
            from datasets import load_dataset
        except ModuleNotFoundError:
            raise MissingExtraError(
                f"--data {data}: no such file, and a hub id needs datasets: pip install 'tinyalign-edge[hub]'"
            ) from None
        named, _, split = data.partition("@")
        owner, name, *config = named.split("/")
        try:
            rows = load_dataset(f"{owner}/{name}", *config, split=split or SPLIT)
        except Exception as error:  # many kinds, of several libraries
            said = " ".join(str(error).splitlines()[:2]) or first_line(error)  # the second line may name the choices
            choice = "; ORG/NAME/CONFIG@SPLIT names one of several" if isinstance(error, ValueError) else ""
            raise InputError(f"--data {data}: no such file, and the hub could not give it ({said}){choice}") from None
        self.data, self.folder = data, folder
        self.holds_pictures = _is_picture(rows.features.get(IMAGE))
        self._files = PictureFiles(folder)
        self._names: dict[int, str | list[str]] = {}  # of the rows whose pictures are written
        self._pictures = rows.select_columns([IMAGE]).with_format("arrow") if self.holds_pictures else None
        texts = [key for key in KEYS if key in rows.column_names and not (key == IMAGE and self.holds_pictures)]
        self._texts = rows.select_columns(texts)

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, number: int) -> Any:
        where = f"{self.data} row {number + 1}"
        texts = _read(lambda: self._texts[number], where)
        row = {key: value for key, value in texts.items() if value is not None}
        if self._pictures is not None:
            if number not in self._names:
                where += f" (id {row['id']})" if "id" in row else ""
                pictures = self._pictures
                (held,) = _read(lambda: pictures[number][IMAGE].to_pylist(), where)
                if held is None:
                    return row
                self._names[number] = self._write(held, where)
            row[IMAGE] = self._names[number]
        return row

    def sha256(self) -> str:
        """Of all rows; pictures count by their content, where they could be written, and bad rows not at all."""
        digest, number, texts = hashlib.sha256(), 0, self._texts.with_format("arrow")
        for start in range(0, len(self), AT_ONCE):
            for row in _texts_of(texts, range(start, min(start + AT_ONCE, len(self)))):
                held = {IMAGE: self._names.get(number)} if self.holds_pictures else {}
                said = None if row is None else {**row, **held}
                digest.update(json.dumps(said, sort_keys=True, default=repr).encode() + b"\n")
                number += 1
        return digest.hexdigest()

    def _write(self, held: Any, where: str) -> str | list[str]:
        if not isinstance(held, list):
            return self._files.add(_content(held, where))
        if len(held) > MAX_PICTURES:
            raise InputError(f"{where}: {len(held)} pictures, a row may have {MAX_PICTURES}")
        return [self._files.add(picture) for picture in [_content(one, where) for one in held]]


def _read(read: Callable[[], Any], where: str) -> Any:
    """What `read` gives.

    Raises:
        InputError: it cannot be read: a column of another kind than it should be, a damaged file, text that is none.
    """
    try:
        return read()
    except Exception as error:  # many kinds, of several libraries
        raise InputError(f"{where}: cannot be read ({first_line(error)})") from None


def _texts_of(rows: Any, part: range) -> list[dict[str, Any] | None]:
    """A part of the rows of a data set in arrow's format; None for each that cannot be read."""
    try:
        texts: list[dict[str, Any] | None] = _read(lambda: rows[part.start : part.stop].to_pylist(), f"rows {part}")
    except InputError:
        half = len(part) // 2
        return [*_texts_of(rows, part[:half]), *_texts_of(rows, part[half:])] if half else [None]
    return texts


def _is_picture(feature: Any) -> bool:
    """Whether a column holds pictures, or lists of them."""
    from datasets import Image

    while not isinstance(feature, Image):
        feature = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        if feature is None:
            return False
    return True


def _content(picture: Any, where: str) -> bytes:
    """The bytes of a picture; a path that a data set has in their place is not followed."""
    content = picture and picture["bytes"]
    if not content:
        said = f", only the path {picture['path']!r:.80}" if picture and picture["path"] else ""
        raise InputError(
            f"{where}: a picture of column 'image' has no bytes{said}; the data set must hold its pictures"
        )
    if len(content) > MAX_FILE_BYTES:
        raise InputError(f"{where}: a picture has {len(content)} bytes, more than the {MAX_FILE_BYTES} allowed")
    return bytes(content)
