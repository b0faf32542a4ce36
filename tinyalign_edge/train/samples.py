"""Pictures and questions that a checkpoint carries, so that `export` can prove what it writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from tinyalign_edge.data import Row, read_rows

HELD_OUT = "held_out.jsonl"
CALIBRATION = "calibration.jsonl"
IMAGES = "images"


def write_samples(folder: Path, held_out: Sequence[Row], calibration: Sequence[Row]) -> None:
    """Copy the pictures of held-out and calibration rows, with their conversations, into `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / IMAGES).mkdir(parents=True)
    for name, rows in ((HELD_OUT, held_out), (CALIBRATION, calibration)):
        lines = []
        for number, row in enumerate(rows):
            image = f"{Path(name).stem}-{number:04}{row.path.suffix.lower()}"
            shutil.copyfile(row.path, folder / IMAGES / image)
            messages = [
                {"from": sender, "value": value}
                for turn in row.turns
                for sender, value in (("human", turn.question), ("gpt", turn.answer))
            ]
            lines.append(json.dumps({"id": row.id, "image": image, "conversations": messages}, ensure_ascii=False))
        (folder / name).write_text("".join(line + "\n" for line in lines), "utf-8")


def read_samples(folder: Path, name: str) -> list[Row]:
    """The rows of `HELD_OUT` or `CALIBRATION`; an empty list where there are none."""
    if not (folder / name).is_file() or not (folder / name).stat().st_size:
        return []
    return read_rows(folder / name, folder / IMAGES)
