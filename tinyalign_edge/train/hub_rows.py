"""Rows of a data set on the Hugging Face hub, through `datasets` where that package is installed."""

from __future__ import annotations

import hashlib
import json
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
    """Whether `org/name` or `org/name@split` is meant rather than a file."""
    path = Path(data)
    return (
        not path.exists() and path.suffix not in (".json", ".jsonl") and data.count("/") == 1 and data[0] not in "./~"
    )


class HubRows:
    """The rows of a data set with LLaVA's columns. The column `image` names files, or holds pictures: these are never
    decoded here, but written below `folder` as they are, when their row is first asked for, and named by their content.

    Attributes:
        holds_pictures: the rows' pictures are below `folder`.

    Raises:
        MissingExtraError: `datasets` is not installed.
        InputError: the hub could not give it; a row, when it is asked for, that cannot be read or lacks the bytes of a
            picture.
        TinyAlignError: a picture cannot be written.
    """

    def __init__(self, data: str, folder: Path) -> None:
        try:
            from datasets import load_dataset
        except ModuleNotFoundError:
            raise MissingExtraError(
                f"--data {data}: no such file, and a hub id needs the package datasets: pip install datasets"
            ) from None
        name, _, split = data.partition("@")
        try:
            rows = load_dataset(name, split=split or SPLIT)
        except Exception as error:  # many kinds, of several libraries
            raise InputError(f"--data {data}: the hub could not give it ({first_line(error)})") from None
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
        try:
            row = {key: value for key, value in self._texts[number].items() if value is not None}
        except Exception as error:  # a column of another kind than it should be, a damaged file
            raise InputError(f"{self.data} row {number + 1}: cannot be read ({first_line(error)})") from None
        if self._pictures is not None:
            if number not in self._names:
                where = f"{self.data} row {number + 1}" + (f" (id {row['id']})" if "id" in row else "")
                (held,) = self._pictures[number][IMAGE].to_pylist()
                if held is None:
                    return row
                self._names[number] = self._write(held, where)
            row[IMAGE] = self._names[number]
        return row

    def sha256(self) -> str:
        """Of all rows; pictures count by their content, where they could be written."""
        digest, number = hashlib.sha256(), 0
        for part in self._texts.with_format("arrow").iter(AT_ONCE):
            for row in part.to_pylist():
                held = {IMAGE: self._names.get(number)} if self.holds_pictures else {}
                digest.update(json.dumps({**row, **held}, sort_keys=True, default=repr).encode() + b"\n")
                number += 1
        return digest.hexdigest()

    def _write(self, held: Any, where: str) -> str | list[str]:
        if not isinstance(held, list):
            return self._files.add(_content(held, where))
        if len(held) > MAX_PICTURES:
            raise InputError(f"{where}: {len(held)} pictures, a row may have {MAX_PICTURES}")
        return [self._files.add(picture) for picture in [_content(one, where) for one in held]]


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
