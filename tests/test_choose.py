"""Which entries a small bank keeps: planted structure, and what is found afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.banks import DIM, VOCAB, records
from tinyalign_edge.memory import Record, write_bank
from tinyalign_edge.memory import coverage as coverage_module
from tinyalign_edge.memory.choose import answer_numbers, content_numbers, entry_costs, within_budget
from tinyalign_edge.memory.coverage import Keys, by_worth
from tinyalign_edge.memory.search import quantize_keys
from tinyalign_edge.memory.snapshot import open_snapshot
from tinyalign_edge.memory.table import Table


def normalised(keys: np.ndarray) -> np.ndarray:
    return np.asarray(keys / np.linalg.norm(keys, axis=1, keepdims=True), np.float32)


def clusters(counts: list[int], *, spread: float = 0.25, seed: int = 0, draw: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unit keys around one centre for each count, and the number of each one's centre."""
    centres = np.random.default_rng(seed).normal(size=(len(counts), DIM))
    which = np.repeat(np.arange(len(counts)), counts)
    noise = np.random.default_rng((seed, draw)).normal(size=(len(which), DIM))
    return normalised(normalised(centres)[which] + spread * noise / np.sqrt(DIM) * 2), which


def as_keys(keys: np.ndarray) -> Keys:
    return Keys(*quantize_keys(keys))


def order_of(keys: np.ndarray, answers: np.ndarray) -> np.ndarray:
    return by_worth(as_keys(keys), answers, np.full(len(keys), 100))


def farthest_first(keys: np.ndarray, count: int) -> list[int]:
    """The usual farthest-point order (Gonzalez, 1985), to compare with."""
    chosen, nearest = [0], keys @ keys[0]
    while len(chosen) < count:
        chosen.append(int(nearest.argmin()))
        nearest = np.maximum(nearest, keys @ keys[chosen[-1]])
    return chosen


def nearest_similarity(queries: np.ndarray, keys: np.ndarray) -> float:
    return float((queries @ keys.T).max(axis=1).mean())


@pytest.mark.parametrize("cell", [64, 512])
def test_planted_near_duplicates_are_merged_and_only_those_of_the_same_answer(
    monkeypatch: pytest.MonkeyPatch, cell: int
) -> None:
    monkeypatch.setattr(coverage_module, "CELL", cell)
    keys, _ = clusters([1] * 300)
    noise = np.random.default_rng(1).normal(size=(300, DIM)) * 1e-4
    answers = np.arange(300)
    planted = np.concatenate([keys, normalised(keys + noise), normalised(keys + 2 * noise)])
    order = order_of(planted, np.concatenate([answers, answers, answers + 300 * (answers < 50)]))
    assert len(order) == len(set(order.tolist())) == 350
    assert set((order[:300] % 300).tolist()) == set(range(300))  # every picture once before any of them twice


def test_the_first_entries_cover_all_of_the_space_before_they_repeat_a_part_of_it() -> None:
    keys, which = clusters([400, 40, 4, 4])
    order = order_of(keys, np.arange(len(keys)))
    assert sorted(which[order[:4]].tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("cell", [64, 512])
def test_what_is_found_for_new_pictures_is_nearer_than_with_a_random_or_farthest_point_choice(
    monkeypatch: pytest.MonkeyPatch, cell: int
) -> None:
    monkeypatch.setattr(coverage_module, "CELL", cell)
    counts = np.random.default_rng(5).geometric(0.04, 60).tolist()  # some kinds of pictures are common, some rare
    keys, which = clusters(counts)
    queries, _ = clusters(counts, draw=1)
    order = order_of(keys, which)
    rng = np.random.default_rng(0)
    for kept in (30, 100, 300):
        mask = within_budget(order, which, np.full(len(keys), 100), 100 * kept)
        assert mask.sum() == kept
        chance = [nearest_similarity(queries, keys[rng.permutation(len(keys))[:kept]]) for _ in range(20)]
        found = nearest_similarity(queries, keys[mask])
        assert found > max(*chance, nearest_similarity(queries, keys[farthest_first(keys, kept)]))


def test_rare_answers_keep_an_entry_and_common_ones_no_more_than_their_quota() -> None:
    rng = np.random.default_rng(0)
    keys, _ = clusters([1000], spread=1.0)
    answers = np.where(np.arange(1000) < 970, rng.integers(0, 2, 1000), np.arange(1000))
    mask = within_budget(order_of(keys, answers), answers, np.full(1000, 100), 100 * 100)
    assert mask.sum() == 100
    assert set(answers[mask].tolist()) == set(answers.tolist())


def test_with_more_answers_than_room_the_most_worthwhile_are_kept() -> None:
    order, costs = np.array([3, 0, 2, 1, 4]), np.array([10, 20, 10, 10, 10])
    assert np.flatnonzero(within_budget(order, np.arange(5), costs, 40)).tolist() == [0, 2, 3]
    assert np.flatnonzero(within_budget(order, np.zeros(5, np.int64), costs, 10)).tolist() == [3]
    assert not within_budget(order, np.arange(5), costs, 9).any()
    assert within_budget(order[:0], np.arange(5), costs, 9).sum() == 0


def test_equal_keys_in_any_number_are_cut_into_cells() -> None:
    keys = np.tile(clusters([1])[0], (3000, 1))
    assert len(order_of(keys, np.zeros(3000, np.int64))) <= -(-3000 // coverage_module.CELL) * 2
    assert len(order_of(keys, np.arange(3000))) == 3000


def table_of(folder: Path, texts: list[str], *, kind: str = "tokens") -> Table:
    count = len(texts)
    keys, _ = clusters([count])
    latents, token_ids = np.ones((count, 3, 8), np.float32), [[1] * (i % 5) for i in range(count)]
    value: dict[str, Any] = {"latents": latents, "token_ids": token_ids}
    if kind != "hybrid":
        del value[{"tokens": "latents", "latents": "token_ids"}[kind]]
    write_bank(folder, keys, [Record(text) for text in texts], fingerprint="f", vocab_size=VOCAB, **value)
    return open_snapshot(folder).segments[0]


@pytest.mark.parametrize("kind", ["tokens", "latents", "hybrid"])
def test_the_costs_of_the_entries_are_what_the_file_takes(tmp_path: Path, kind: str) -> None:
    table = table_of(tmp_path, [record.text for record in records(500)], kind=kind)
    segment = json.loads((tmp_path / "manifest.json").read_text("utf-8"))["segments"][0]
    assert 0 <= segment["bytes"] - entry_costs(table).sum() <= 8 * 64 + 16  # the sections' alignment


def test_contents_are_the_same_where_the_model_reads_the_same(tmp_path: Path) -> None:
    for kind in ("tokens", "hybrid"):
        numbers = content_numbers(table_of(tmp_path / kind, ["yes"] * 6, kind=kind))  # 0, 1, 2, 3, 4, 0 tokens
        assert len(set(numbers.tolist())) == 5 and numbers[0] == numbers[5]
    numbers = content_numbers(table_of(tmp_path / "latents", ["a", "a", "b"], kind="latents"))
    assert numbers[0] == numbers[1] != numbers[2]


def test_answers_are_the_same_but_for_case_and_white_space(tmp_path: Path) -> None:
    numbers = answer_numbers(table_of(tmp_path, ["A cat", "a  cat ", "a dog"]))
    assert numbers[0] == numbers[1] != numbers[2]
