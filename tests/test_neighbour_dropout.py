"""Which rows of a training see all of their neighbours, some, none, or another row's."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.towers import train_tiny  # noqa: E402
from tinyalign_edge.data import Row, Turn  # noqa: E402
from tinyalign_edge.memory import Neighbours  # noqa: E402
from tinyalign_edge.prompt import Prompt  # noqa: E402
from tinyalign_edge.train import run  # noqa: E402
from tinyalign_edge.train.batches import Collate, Rows  # noqa: E402
from tinyalign_edge.train.neighbours import of_others  # noqa: E402
from tinyalign_edge.train.options import TrainOptions  # noqa: E402
from tinyalign_edge.train.start import start_align  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

K = 4
COUNT = 800


class BegunError(Exception):
    """All is prepared, and nothing is trained."""


@pytest.fixture(scope="module")
def prompt(towers: Path) -> Prompt:
    return start_align(str(towers / "vit"), str(towers / "lm"), TrainOptions(visual_tokens=4)).prompt


def rows_of(prompt: Prompt, **options: Any) -> Rows:
    """Rows with `K` neighbours each, number 4 i and those that follow it."""
    rows = [Row(f"{i}", (), (Turn("What?", "it"),), None, f"{i}") for i in range(COUNT)]
    near = np.arange(COUNT * K).reshape(COUNT, K)
    similarity = np.tile(np.array([0.9, 0.8, 0.7, 0.6], np.float32), (COUNT, 1))
    return Rows(rows, prompt, lambda some: [np.zeros((1, 2), np.float32)] * len(some), near, similarity, **options)


def kept(rows: Rows) -> list[int]:
    """How many neighbours each row sees, which are its first ones and have their own similarities."""
    examples = [rows[i] for i in range(len(rows))]
    for i, example in enumerate(examples):
        assert example.neighbours == tuple(range(i * K, i * K + len(example.neighbours)))
        assert example.similarity == tuple(rows.similarity[i, : len(example.neighbours)].tolist())
    return [len(example.neighbours) for example in examples]


@pytest.mark.parametrize(("dropout", "memory_dropout"), [(0.0, 0.3), (0.5, 0.0), (0.5, 0.3)])
def test_as_many_rows_see_no_neighbours_or_fewer_as_the_shares_say(
    dropout: float, memory_dropout: float, prompt: Prompt
) -> None:
    found = Counter(kept(rows_of(prompt, dropout=dropout, memory_dropout=memory_dropout, seed=3)))
    some = dropout * (1 - memory_dropout) / (K + 1)  # of these rows as many see none, one, two, three, and all
    wanted = {0: memory_dropout + some, 1: some, 2: some, 3: some, K: 1 - memory_dropout - K * some}
    for number, share in wanted.items():
        spread = (share * (1 - share) / COUNT) ** 0.5
        assert found[number] / COUNT == pytest.approx(share, abs=4 * spread), number


def test_with_no_dropout_every_row_sees_all_its_neighbours(prompt: Prompt) -> None:
    assert kept(rows_of(prompt, seed=3)) == [K] * COUNT


def test_which_neighbours_are_dropped_depends_on_seed_epoch_and_row_alone(prompt: Prompt) -> None:
    options = {"dropout": 0.5, "memory_dropout": 0.3}
    rows = rows_of(prompt, seed=3, **options)
    first = kept(rows)
    assert kept(rows) == first == kept(rows_of(prompt, seed=3, **options)) != kept(rows_of(prompt, seed=4, **options))
    rows.set_epoch(1)
    assert kept(rows) != first


def fitted(
    world: Path, towers: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[Rows, dict[str, Any]]:
    """The rows that a run trains on, and what else its loop gets."""
    given: dict[str, Any] = {}

    def fit(_: Any, **rest: Any) -> None:
        given.update(rest)
        raise BegunError

    monkeypatch.setattr(run, "fit", fit)
    with pytest.raises(BegunError):
        train_tiny(world, towers, out, steps=1, **options)
    return given["rows"], given


def test_a_run_with_memory_dropout_trains_on_batches_some_of_whose_rows_have_no_memory(
    world: Path, towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = {}
    for asked in (0.0, 0.6):
        rows, loop = fitted(world, towers, tmp_path / f"{asked}", monkeypatch, memory_dropout=asked)
        assert rows.memory_dropout == asked
        examples = []
        for epoch in range(4):
            rows.set_epoch(epoch)
            examples += [rows[i] for i in range(len(rows))]
        alone = [not example.neighbours for example in examples]
        shares[asked] = np.mean(alone)
        collate: Collate = loop["collate"]
        batch = collate(examples[:32])
        assert (batch["memory_mask"].sum(dim=1) == 0).tolist() == alone[:32]
        assert all(example.neighbours for example in loop["held_out"])  # in evaluation nothing is dropped
    assert shares[0.0] < 0.15
    assert shares[0.6] == pytest.approx(0.6 + 0.4 * shares[0.0], abs=0.08)


def test_what_is_given_to_a_row_was_found_for_another_one_and_is_not_its_own_entry() -> None:
    near = np.array([[i + 10, i + 20, (i + 1) % 7] for i in range(7)])  # the last is an entry that a row here became
    near[3, 1:] = -1
    similarity = np.where(near < 0, -1, 0.5 + near / 100).astype(np.float32)
    for seed in range(20):
        given = of_others(Neighbours(near, similarity), seed, [(i,) for i in range(7)], [(i,) for i in range(27)])
        source = given.rows[:, 0] - 10
        assert sorted(source) == list(range(7))
        assert not (source == np.arange(7)).any()
        for i, (row, alike) in enumerate(zip(given.rows, given.similarity, strict=True)):
            of = source[i]
            wanted = [(int(e), float(s)) for e, s in zip(near[of], similarity[of], strict=True) if e not in (-1, i)]
            found = [(int(e), float(s)) for e, s in zip(row, alike, strict=True) if e >= 0]
            assert found == wanted
            assert (row[len(found) :] == -1).all() and (alike[len(found) :] == -1).all()


def test_another_question_about_the_same_picture_is_no_other_row() -> None:
    """Rows and entries 0 to 3 are of picture 0, those from 4 to 7 of pictures 1 and 2; two more entries of others."""
    pictures = [(0,)] * 4 + [(1, 2)] * 2 + [(2,)] * 2
    entries = [*pictures, (3,), (4,)]
    near = np.array([[8, 7]] * 4 + [[9, 0]] * 4)
    neighbours = Neighbours(near, np.full(near.shape, 0.5, np.float32))
    for seed in range(20):
        given = of_others(neighbours, seed, pictures, entries)
        assert given.rows.tolist() == [[9, -1]] * 4 + [[8, -1]] * 4
    alone = of_others(neighbours, 0, [(0,)] * 8, [(1,)] * 10)
    assert (alone.rows == -1).all() and (alone.similarity == -1).all()
    nobody = Neighbours(np.empty((0, 2), np.int64), np.empty((0, 2), np.float32))
    assert of_others(nobody, 0, [], pictures).rows.shape == (0, 2)


@pytest.mark.parametrize("key", ["picture", "question", "fused"])
def test_a_run_with_shuffled_memory_gives_no_row_its_own_neighbours_nor_an_entry_of_its_picture(
    world: Path, towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    pairs = {}
    for shuffled in (False, True):
        rows, loop = fitted(world, towers, tmp_path / f"{shuffled}", monkeypatch, shuffle_memory=shuffled, key=key)
        held_out = [(example.turns, example.neighbours) for example in loop["held_out"]]
        pairs[shuffled] = rows, held_out
    (own, seen), (other, others_seen) = pairs[False], pairs[True]
    ids = [row.id for row in own.rows]
    assert [row.id for row in other.rows] == ids
    entries = ids if key == "question" else list(dict.fromkeys(ids))  # each picture has one row
    found: dict[str, set[tuple[int, ...]]] = {}
    for name, row in zip(ids, own.neighbours.tolist(), strict=True):
        found.setdefault(name, set()).add(tuple(row))
    for name, row in zip(ids, other.neighbours.tolist(), strict=True):
        assert name not in [entries[entry] for entry in row if entry >= 0]
        if key != "fused":  # where the same question about two pictures often finds the same
            assert tuple(row) not in found[name] or max(row) < 0
    assert (other.neighbours >= 0).mean() > 0.9 * (own.neighbours >= 0).mean()
    assert [turns for turns, _ in seen] == [turns for turns, _ in others_seen]
    assert [near for _, near in seen] != [near for _, near in others_seen]  # held-out rows read those of others, too
