"""The bank: a real USearch search over a folder that is checked before it is mapped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tinyalign_edge.errors import BundleError, InputError
from tinyalign_edge.memory import Bank, write_bank
from tinyalign_edge.memory.search import nearest, quantize_keys
from tinyalign_edge.memory.write import Record

DIM = 32


def unit(count: int, seed: int = 0) -> np.ndarray:
    """Unit rows in a few clusters, as keys of real pictures are."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(12, DIM))
    keys = centres[rng.integers(0, 12, count)] + 0.4 * rng.normal(size=(count, DIM))
    return (keys / np.linalg.norm(keys, axis=1, keepdims=True)).astype(np.float32)


def records(count: int) -> list[Record]:
    return [Record(f"text ü {i}", f"question {i}", f"source-{i}") for i in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ids = [[i % 50] * (i % 4) for i in range(300)]
    write_bank(tmp_path / "bank", unit(300), records(300), fingerprint="f", vocab_size=50, token_ids=ids)
    return tmp_path / "bank"


def test_an_entry_comes_back_as_it_was_written(folder: Path) -> None:
    entry = Bank(folder).entry(7)
    assert (entry.text, entry.question, entry.source) == ("text ü 7", "question 7", "source-7")
    assert entry.value.tolist() == [7, 7, 7]


def test_search_finds_what_exact_float32_search_finds(folder: Path) -> None:
    keys, queries = unit(300), unit(40, seed=1)
    found = Bank(folder).nearest(queries, 4)
    exact = np.sort(queries @ keys.T, axis=1)[:, ::-1][:, :4]
    own = np.take_along_axis(queries @ keys.T, found.rows, axis=1)
    assert np.all(own >= exact - 0.01)
    np.testing.assert_allclose(found.similarity, own, atol=0.01)
    assert np.all(np.diff(found.similarity, axis=1) <= 0)


def test_equal_keys_come_in_the_order_of_their_rows() -> None:
    keys, scales = quantize_keys(np.tile(unit(1), (100, 1)))
    assert nearest(keys, scales, unit(1), 5).rows.tolist() == [[0, 1, 2, 3, 4]]


def test_the_floor_keeps_the_memory_silent(folder: Path) -> None:
    bank = Bank(folder)
    assert bank.search(-unit(300)[0], 4, floor=0.99) == ()
    assert bank.search(unit(300)[5], 4, floor=0.99)[0].row == 5


def test_more_neighbours_than_entries_leaves_empty_places() -> None:
    keys, scales = quantize_keys(unit(2))
    assert nearest(keys, scales, unit(1), 4).rows[0, 2:].tolist() == [-1, -1]


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_keys_that_are_zero_or_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite and not zero"):
        quantize_keys(np.full((1, 4), bad, np.float32))


def test_latents_come_back_within_a_step_of_their_scale(tmp_path: Path) -> None:
    latents = np.random.default_rng(0).normal(size=(20, 3, 8)).astype(np.float32)
    write_bank(tmp_path / "b", unit(20), records(20), fingerprint="f", vocab_size=9, latents=latents)
    bank = Bank(tmp_path / "b")
    for row in range(20):
        step = np.abs(latents[row]).max(axis=1, keepdims=True) / 127
        assert np.all(np.abs(bank.entry(row).value - latents[row]) <= step * 0.51)


@pytest.mark.parametrize("count", [0, -1, 299, 1 << 40])
def test_a_count_that_does_not_fit_the_files_is_refused(folder: Path, count: int) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**manifest, "count": count}), "utf-8")
    with pytest.raises(BundleError, match=r"bytes for|out of bounds|do not fit"):
        Bank(folder)


def test_what_is_not_a_bank_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a memory bank"):
        Bank(tmp_path)
