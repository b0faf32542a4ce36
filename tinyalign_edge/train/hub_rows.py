"""Rows of a data set on the Hugging Face hub, through `datasets` where that package is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinyalign_edge.errors import InputError, MissingExtraError, first_line

SPLIT = "train"


def is_hub_id(data: str) -> bool:
    """Whether `org/name` or `org/name@split` is meant rather than a file."""
    path = Path(data)
    return (
        not path.exists() and path.suffix not in (".json", ".jsonl") and data.count("/") == 1 and data[0] not in "./~"
    )


class HubRows:
    """The rows of a data set with LLaVA's columns; its pictures are files, named in the column `image`.

    Raises:
        MissingExtraError: `datasets` is not installed.
        InputError: the hub could not give it, or its pictures are not files.
    """

    def __init__(self, data: str) -> None:
        try:
            from datasets import Image, load_dataset
        except ModuleNotFoundError:
            raise MissingExtraError(
                f"--data {data}: no such file, and a hub id needs the package datasets: pip install datasets"
            ) from None
        name, _, split = data.partition("@")
        try:
            self.rows = load_dataset(name, split=split or SPLIT)
        except Exception as error:  # many kinds, of several libraries
            raise InputError(f"--data {data}: the hub could not give it ({first_line(error)})") from None
        if isinstance(self.rows.features.get("image"), Image):
            raise InputError(f"--data {data}: holds its pictures itself; save them as files and name those in 'image'")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Any:
        return {key: value for key, value in self.rows[number].items() if value is not None}
