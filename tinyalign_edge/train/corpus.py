"""The rows that a run trains on, from one or several conversation files, kept on disk and read when they are wanted."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt

from tinyalign_edge.data import Row, check_images, parse_row
from tinyalign_edge.errors import InputError
from tinyalign_edge.files import file_sha256
from tinyalign_edge.jsonrows import RowFile
from tinyalign_edge.progress import progress
from tinyalign_edge.train.hub_rows import HubRows, is_hub_id
from tinyalign_edge.train.processes import is_first
from tinyalign_edge.train.settings import DataRef

MAX_WEIGHT = 100.0
SHOWN_BAD = 3

Numbers = npt.NDArray[np.int64]


Items = RowFile | HubRows  # parsed rows by number


@dataclass(frozen=True)
class Source:
    """A conversation file or a hub data set, and how often an epoch goes through it: 0.5 is a random half each time."""

    data: str
    weight: float = 1.0


def parse_source(given: str) -> Source:
    """`FILE` or `FILE:WEIGHT`.

    Raises:
        InputError: a weight that is not above 0 and at most `MAX_WEIGHT`.
    """
    data, colon, weight = given.rpartition(":")
    if not colon or Path(given).exists():
        return Source(given)
    try:
        value = float(weight)
    except ValueError:
        return Source(given)
    if not 0 < value <= MAX_WEIGHT:
        raise InputError(f"--data {given}: the weight must be above 0 and at most {MAX_WEIGHT:g}")
    return Source(data, value)


@dataclass(frozen=True)
class Corpus(Sequence[Row]):
    """Rows by number, parsed anew each time.

    Attributes:
        sources, files: where the rows are.
        folders: of every source, where its pictures are.
        source, item: of every row, which file and which row of it: (R,).
        pictures: of every row, the numbers of its pictures.
        names, homes: of every picture, its name in a folder and a source that has this folder.
        turn: of every row, the one turn that it is taken for; None: all turns.
    """

    sources: tuple[Source, ...]
    files: tuple[Items, ...]
    folders: tuple[Path, ...]
    source: Numbers
    item: Numbers
    pictures: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]
    homes: tuple[int, ...]
    turn: Numbers | None = None

    def __len__(self) -> int:
        return len(self.item)

    @overload
    def __getitem__(self, number: int) -> Row: ...
    @overload
    def __getitem__(self, number: slice) -> list[Row]: ...
    def __getitem__(self, number: int | slice) -> Row | list[Row]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        which, item = int(self.source[number]), int(self.item[number])
        row = parse_row(self.files[which][item], _where(self.sources[which], item), self.folders[which])
        return row if self.turn is None else replace(row, turns=(row.turns[self.turn[number]],))

    def select(self, numbers: Sequence[int] | Numbers) -> Corpus:
        """The corpus of these rows, in this order."""
        chosen = np.asarray(numbers, np.int64)
        pictures = tuple(self.pictures[i] for i in chosen)
        turn = None if self.turn is None else self.turn[chosen]
        return replace(self, source=self.source[chosen], item=self.item[chosen], pictures=pictures, turn=turn)

    def questions(self) -> tuple[Corpus, Numbers]:
        """Every turn as a row of its own, and the number of the row here that it is of."""
        turns = [len(row.turns) for row in self]
        of = np.repeat(np.arange(len(self)), turns)
        turn = np.concatenate([np.arange(count) for count in turns]) if turns else of
        return replace(self.select(of), turn=turn), of

    def path(self, picture: int) -> Path:
        """Where a picture is."""
        return self.folders[self.homes[picture]] / self.names[picture]

    def where(self, picture: int) -> str:
        """The first row that has a picture, for messages."""
        row = next(i for i, pictures in enumerate(self.pictures) if picture in pictures)
        return self[row].where

    def used(self) -> list[int]:
        """The numbers of all pictures that rows have, in the order of the rows."""
        return list(dict.fromkeys(picture for pictures in self.pictures for picture in pictures))

    def epoch(self, number: int, seed: int) -> Numbers:
        """The rows of an epoch: every source as often as its weight says, the broken part drawn anew each epoch."""
        if all(source.weight == 1 for source in self.sources):
            return np.arange(len(self))
        parts = []
        for which, source in enumerate(self.sources):
            rows = np.flatnonzero(self.source == which)
            whole, broken = divmod(source.weight, 1.0)
            drawn = np.random.default_rng((seed, number, which)).permutation(len(rows))[: round(len(rows) * broken)]
            parts += [rows] * int(whole) + [rows[np.sort(drawn)]]
        return np.concatenate(parts)


def open_corpus(sources: Iterable[Source], images: Path | None, kept: Path, *, skip_bad: bool = False) -> Corpus:
    """Go through all files once, and look at every row.

    Args:
        images: the folder of the pictures that rows name; None where data sets hold all of them.
        kept: the folder for pictures that data sets hold.
        skip_bad: count bad rows and leave them out, instead of raising.

    Raises:
        InputError: a file that is missing or not a list of rows, a bad row (with its file and number), no rows, or
            bad ones only; no `images` where rows name them.
        TinyAlignError: a picture cannot be written to `kept`.
    """
    if images is not None:
        check_images(images)
    sources = tuple(sources)
    files = tuple(_open(source.data, kept) for source in sources)
    folders = tuple(_folder(source, file, images) for source, file in zip(sources, files, strict=True))
    if not sum(map(len, files)):
        raise InputError(f"{sources[0].data}: holds no rows")
    which, items, pictures, bad = [], [], [], []
    names: dict[tuple[Path, str], int] = {}
    homes: list[int] = []
    with progress("Reading rows", sum(map(len, files)), brief=True, shown=is_first()) as advance:
        for number, (source, file) in enumerate(zip(sources, files, strict=True)):
            for item in range(len(file)):
                try:
                    row = parse_row(file[item], _where(source, item), folders[number])
                    which.append(number)
                    items.append(item)
                    pictures.append(
                        tuple(names.setdefault((folders[number], p.name), len(names)) for p in row.pictures)
                    )
                    homes += [number] * (len(names) - len(homes))
                except InputError as error:
                    if not skip_bad:
                        raise
                    bad.append(str(error))
                if item % 1000 == 999 or item + 1 == len(file):
                    advance(item % 1000 + 1)
    if not items:
        raise InputError(f"all {len(bad)} rows are bad; the first: {bad[0]}")
    _say_skipped(bad)
    return Corpus(
        sources, files, folders, np.array(which, np.int64), np.array(items, np.int64), tuple(pictures),
        tuple(name for _, name in names), tuple(homes),
    )  # fmt: skip


def split(corpus: Corpus, *, held_out: int, fraction: float, seed: int) -> tuple[Corpus, Corpus]:
    """Training rows and held-out rows without a picture in common; the held-out ones do not depend on the fraction.

    Held out are rows of one picture: a tenth of the pictures, at most `held_out`. A row of several pictures with a
    held-out one among them is in neither part. Of rows that are text alone the same fraction is kept.
    """
    names = sorted(corpus.names[picture] for picture in corpus.used())
    ordered = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    held_count = min(held_out, len(names) // 10)
    kept_count = max(1, round((len(names) - held_count) * fraction))
    held, kept = set(ordered[:held_count]), set(ordered[held_count : held_count + kept_count])
    texts = [i for i, pictures in enumerate(corpus.pictures) if not pictures]
    texts = [texts[i] for i in np.random.default_rng(seed).permutation(len(texts))[: round(len(texts) * fraction)]]
    training, apart = set(texts), []
    for i, pictures in enumerate(corpus.pictures):
        mine = {corpus.names[picture] for picture in pictures}
        if len(pictures) == 1 and mine <= held:
            apart.append(i)
        elif mine and mine <= kept:
            training.add(i)
    return corpus.select(sorted(training)), corpus.select(apart)


def check_weights(corpus: Corpus) -> None:
    """Refuse a source that has rows of which its weight takes none.

    Raises:
        InputError: names the source and its rows.
    """
    for which, source in enumerate(corpus.sources):
        rows = int((corpus.source == which).sum())
        if rows and not round(rows * source.weight):
            raise InputError(
                f"--data {source.data}:{source.weight:g}: of {rows} training rows that is none an epoch; give a higher "
                "weight"
            )


def data_refs(corpus: Corpus) -> tuple[DataRef, ...]:
    """The sources with the hashes of the files, or of the data sets' rows."""
    return tuple(
        DataRef(source.data, file.sha256() if isinstance(file, HubRows) else file_sha256(file.path), source.weight)
        for source, file in zip(corpus.sources, corpus.files, strict=True)
    )


def of_one_picture(corpus: Corpus, *, skip_bad: bool) -> Corpus:
    """The rows that have one picture.

    Raises:
        InputError: one has none or several, and bad rows may not be skipped.
    """
    others = {
        i: f"{corpus[i].where}: {len(pictures)} pictures; a model of --vlm is trained on rows of one"
        for i, pictures in enumerate(corpus.pictures)
        if len(pictures) != 1
    }
    return drop_bad(corpus, others, skip_bad=skip_bad)


def drop_bad(corpus: Corpus, reasons: dict[int, str], *, skip_bad: bool) -> Corpus:
    """The corpus without the rows for which there is a reason; the first reason is an error unless bad rows may be
    skipped. It may come out empty.

    Raises:
        InputError: a row is bad.
    """
    if not reasons:
        return corpus
    if not skip_bad:
        raise InputError(next(iter(reasons.values())))
    _say_skipped(list(reasons.values()))
    return corpus.select([i for i in range(len(corpus)) if i not in reasons])


def _open(data: str, kept: Path) -> Items:
    return HubRows(data, kept) if is_hub_id(data) else RowFile(Path(data))


def _folder(source: Source, file: Items, images: Path | None) -> Path:
    if isinstance(file, HubRows) and file.holds_pictures:
        return file.folder
    if images is None:
        raise InputError(f"{source.data}: names its pictures; give the folder that they are in with --images")
    return images


def _where(source: Source, item: int) -> str:
    return f"{source.data} row {item + 1}"


def _say_skipped(bad: Sequence[str]) -> None:
    if bad and is_first():
        shown = "; ".join(bad[:SHOWN_BAD])
        print(f"note: {len(bad)} bad rows skipped: {shown}{' ...' if len(bad) > SHOWN_BAD else ''}", file=sys.stderr)
