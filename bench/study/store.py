"""The results of parts on disk: a file each, which appears whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tinyalign_edge.bench.study.plan import Part
from tinyalign_edge.config import read_json, write_json

Results = dict[str, dict[str, Any]]  # by the names of the parts


def results(out: Path, parts: Iterable[Part]) -> Results:
    """What is there."""
    return {part.name: read_json(_file(out, part)) for part in parts if is_done(out, part)}


def recorded(folder: Path, parts: Sequence[Part]) -> Results:
    """What the files of `folder` hold, one a data set."""
    held: Results = {}
    for dataset in dict.fromkeys(part.run.dataset for part in parts):
        if (file := folder / f"{dataset}.json").is_file():
            held |= read_json(file)["parts"]
    return {part.name: held[part.name] for part in parts if part.name in held}


def is_done(out: Path, part: Part) -> bool:
    """Whether the part has a result."""
    return _file(out, part).is_file()


def keep(out: Path, part: Part, result: dict[str, Any]) -> None:
    """Write the result of a part."""
    file = _file(out, part)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file.with_suffix(".part"), result)
    file.with_suffix(".part").replace(file)


def _file(out: Path, part: Part) -> Path:
    return out / "parts" / f"{part.name}.json"
