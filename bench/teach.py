"""Teach by example: what a checkpoint or bundle says of classes that no training saw, after a few examples of each.

    python -m tinyalign_edge.bench.teach TARGET [--limit N] [--record]

Examples go into a copy of the target's memory, nothing is trained. Queries are asked freely and among the taught
answers; the ceiling is the answer of the most similar entry of the same bank. The classes that training saw are asked
before and after. Needs `TINYALIGN_SHARED`; `--record` writes `bench/results/teach.json`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tinyalign_edge.bench.record import record, shared
from tinyalign_edge.bundle import MANIFEST
from tinyalign_edge.data import Row, Turn, read_rows
from tinyalign_edge.errors import InputError
from tinyalign_edge.evaluate import normalize
from tinyalign_edge.memory import Bank, Record, copy_bank, value_of
from tinyalign_edge.progress import progress
from tinyalign_edge.runtime.model import load
from tinyalign_edge.runtime.sight import EncodedImage
from tinyalign_edge.train.answer import TorchAnswerer
from tinyalign_edge.train.batches import tokenize
from tinyalign_edge.train.checkpoint import MEMORY, load_checkpoint
from tinyalign_edge.train.encode import Encode, encode_rows

SHOTS = (0, 1, 3, 5)
COMMAND = "python -m tinyalign_edge.bench.teach"
BATCH = 32

Shares = dict[str, dict[str, float]]


class Pupil(Protocol):
    """What is taught, and asked the first question of every row."""

    def teach(self, rows: Sequence[Row]) -> None:
        """Remember the answer of each row with its picture and question."""

    def say(self, rows: Sequence[Row]) -> list[str]:
        """Free answers."""

    def choose(self, rows: Sequence[Row], choices: Sequence[str]) -> list[str]:
        """The likeliest of the choices, for each row."""

    def nearest(self, rows: Sequence[Row]) -> list[str]:
        """The texts of the most similar entries."""


def teach_accuracies(
    target: Path, *, folder: Path | None = None, limit: int | None = None, encode: Encode = encode_rows
) -> Shares:
    """Shares of right answers of a checkpoint or a bundle with a memory.

    Args:
        folder: with `teach.json`, `query.json` and `test.json`; None: Caltech-101's.
        limit: ask only so many queries, and as many of the trained classes, drawn with a fixed seed.
        encode: of checkpoints: how pictures are encoded, for callers that keep what was encoded.

    Returns:
        `teach` and `teach_choices` after 0, 1, 3 and 5 examples a class, `teach_ceiling` after 1, 3 and 5 (keys are
        these numbers as text), `seen` with `before` and `after` all examples were taught.

    Raises:
        InputError: the target has no memory.
    """
    folder = folder or shared("data", "caltech101")
    lessons, queries, seen = (read_rows(folder / f"{name}.json", folder) for name in ("teach", "query", "test"))
    queries, seen = (_some(rows, limit) for rows in (queries, seen))
    choices = list(dict.fromkeys(row.turns[0].answer for row in lessons))
    found: Shares = {"teach": {}, "teach_choices": {}, "teach_ceiling": {}, "seen": {}}
    with tempfile.TemporaryDirectory() as scratch:
        pupil = _pupil(target, Path(scratch) / MEMORY, encode)
        found["seen"]["before"] = _right(seen, pupil.say(seen))
        taught = 0
        for shots in SHOTS:
            pupil.teach(_examples(lessons, taught, shots))
            taught = shots
            found["teach"][str(shots)] = _right(queries, pupil.say(queries))
            found["teach_choices"][str(shots)] = _right(queries, pupil.choose(queries, choices))
            if shots:
                found["teach_ceiling"][str(shots)] = _right(queries, pupil.nearest(queries))
        found["seen"]["after"] = _right(seen, pupil.say(seen))
    return found


class TorchPupil:
    """A checkpoint with a memory of its own in `bank`."""

    def __init__(self, checkpoint: Path, bank: Path, encode: Encode) -> None:
        opened = load_checkpoint(checkpoint)
        if opened.bank is None:
            raise InputError(f"{checkpoint}: has no memory to teach")
        copy_bank(checkpoint / MEMORY, bank)
        self._checkpoint, self._bank, self._encode = opened, Bank(bank), encode
        self._renew()

    def teach(self, rows: Sequence[Row]) -> None:
        if not rows:
            return
        prompt, limit = self._checkpoint.prompt, self._checkpoint.config.memory.value_tokens
        for row, example, key in zip(rows, *self._prepared(rows), strict=True):
            question, answer = row.turns[0].question, row.turns[0].answer
            ids = np.array(prompt.memory_ids([Turn("", answer)], limit), np.int32)
            value = value_of(self._bank.manifest.spec.kind, ids, self._side.latents(example, answer))
            self._bank.add(key, Record(answer, question, row.id), value=value)
        self._renew()

    def say(self, rows: Sequence[Row]) -> list[str]:
        examples, _ = self._prepared(rows)
        return self._side.answers(examples)

    def choose(self, rows: Sequence[Row], choices: Sequence[str]) -> list[str]:
        examples, _ = self._prepared(rows)
        said = []
        with progress("Choosing (torch)", len(rows)) as advance:
            for row, example in zip(rows, examples, strict=True):
                _, turns = tokenize(
                    [Turn(row.turns[0].question, choice) for choice in choices], self._checkpoint.prompt
                )
                (losses,) = self._side.losses([replace(example, turns=turns)])
                ends = np.cumsum([len(turn.answer) for turn in turns])[:-1]
                said.append(choices[int(np.argmin([part.mean() for part in np.split(losses, ends)]))])
                advance()
        return said

    def nearest(self, rows: Sequence[Row]) -> list[str]:
        _, keys = self._prepared(rows)
        return [self._bank.entry(int(number)).text for number in self._bank.nearest(keys, 1).rows[:, 0]]

    def _prepared(self, rows: Sequence[Row]) -> tuple[Sequence[Any], Any]:
        prepared = self._side.prepare(rows)
        return prepared.examples, prepared.keys

    def _renew(self) -> None:
        self._side = TorchAnswerer(replace(self._checkpoint, bank=self._bank), encode=self._encode)


class BundlePupil:
    """A bundle with a memory of its own in `bank`."""

    def __init__(self, bundle: Path, bank: Path) -> None:
        self._model = load(bundle, memory_dir=bank)
        self._seen: dict[Path, EncodedImage] = {}

    def teach(self, rows: Sequence[Row]) -> None:
        assert self._model.memory is not None
        for row in rows:
            turn = row.turns[0]
            self._model.memory.add(self._image(row), turn.answer, question=turn.question, source=row.id)

    def say(self, rows: Sequence[Row]) -> list[str]:
        with progress("Asking", len(rows)) as advance:
            return [self._ask(row, advance) for row in rows]

    def choose(self, rows: Sequence[Row], choices: Sequence[str]) -> list[str]:
        with progress("Choosing", len(rows)) as advance:
            return [self._ask(row, advance, choices=choices) for row in rows]

    def nearest(self, rows: Sequence[Row]) -> list[str]:
        return [self._search(self._image(row), row.turns[0].question) for row in rows]

    def _search(self, image: EncodedImage, question: str) -> str:
        assert self._model.memory is not None
        return self._model.memory.search(image, 1, question=question, floor=-1.0)[0].text

    def _ask(self, row: Row, advance: Any, **options: Any) -> str:
        said = self._model.ask(self._image(row), row.turns[0].question, **options).text
        advance()
        return said

    def _image(self, row: Row) -> EncodedImage:
        if row.path not in self._seen:
            self._seen[row.path] = self._model.encode(row.path)
        return self._seen[row.path]


def _pupil(target: Path, bank: Path, encode: Encode) -> Pupil:
    return BundlePupil(target, bank) if (target / MANIFEST).is_file() else TorchPupil(target, bank, encode)


def _some(rows: list[Row], limit: int | None) -> list[Row]:
    chosen = np.sort(np.random.default_rng(0).permutation(len(rows))[:limit])
    return [rows[i] for i in chosen]


def _examples(lessons: Sequence[Row], first: int, last: int) -> list[Row]:
    """The examples from number `first` up to `last` of each answer, in the order of the file."""
    count: Counter[str] = Counter()
    chosen = []
    for row in lessons:
        answer = row.turns[0].answer
        if first <= count[answer] < last:
            chosen.append(row)
        count[answer] += 1
    return chosen


def _right(rows: Sequence[Row], said: Sequence[str]) -> float:
    """The share of answers that are the reference, as `normalize` compares them."""
    wanted = [row.turns[0].answer for row in rows]
    return float(np.mean([normalize(a) == normalize(b) for a, b in zip(said, wanted, strict=True)]))


def main() -> None:
    """Measure one target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--record", action="store_true")
    given = parser.parse_args()
    found = teach_accuracies(given.target, limit=given.limit)
    if given.record:
        print(record("teach", f"{COMMAND} {given.target.name}", {"limit": given.limit, **found}))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
