"""The graph of a large bank: the same answers, never a byte too many, and never one that was not verified."""

from __future__ import annotations

import json
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.banks import contents, files, make_bank, named_files, reseal, teach, unit
from tinyalign_edge.errors import UnsupportedError
from tinyalign_edge.memory import Bank, Neighbours, Record, copy_bank
from tinyalign_edge.memory import graph as graph_module
from tinyalign_edge.memory import rebuild as rebuild_module
from tinyalign_edge.memory import write as write_module
from tinyalign_edge.memory.lookup import CANDIDATES
from tinyalign_edge.memory.search import quantize_keys

QUERIES = unit(60, seed=1)


@pytest.fixture(autouse=True)
def small_switch_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebuild_module, "SWITCH_OVER", 50)
    monkeypatch.setattr(graph_module, "MIN_WIDTH", 64)  # random keys have no near neighbours that lead to each other


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    """Three hundred entries, all of them in the graph."""
    bank = Bank(make_bank(tmp_path / "bank"))
    assert bank.graph_due
    assert bank.rebuild() == 300
    assert not bank.graph_due
    return bank


def exact(bank: Bank, queries: np.ndarray, k: int) -> Neighbours:
    """By a plain sort of all similarities."""
    keys = {
        int(table.ids[i]): table.keys[i] * table.key_scales[i]
        for table in bank._snapshot.tables
        for i in range(len(table))
    }
    ids = np.array(list(keys))
    scores = (queries.astype(np.float64) @ np.array(list(keys.values()), np.float64).T).astype(np.float32)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return Neighbours(ids[order], np.take_along_axis(scores, order, axis=1))


def graph_file(bank: Bank) -> Path:
    assert bank.manifest.graph is not None
    return bank.folder / bank.manifest.graph.file


def assert_finds_the_same(bank: Bank, k: int = 5) -> None:
    found, expected = bank.nearest(QUERIES, k), exact(bank, QUERIES, k)
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_allclose(found.similarity, expected.similarity, atol=1e-6)


def test_by_the_graph_and_without_it_the_same_entries_are_found(bank: Bank) -> None:
    assert Bank(bank.folder).stats().graph_entries == 300
    assert_finds_the_same(bank)
    graph_file(bank).unlink()
    without = Bank(bank.folder)
    assert without.stats().graph_entries == 0
    assert_finds_the_same(without)
    assert without.rebuild() == 300
    assert without.stats().graph_entries == 300
    assert files(bank.folder) == named_files(without)


def test_where_usearch_does_not_load_the_same_entries_are_found(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("usearch", "usearch.index", "usearch.compiled"):
        monkeypatch.setitem(sys.modules, name, None)
    without = Bank(bank.folder)
    assert without.stats().graph_entries == 0
    assert_finds_the_same(without)
    with pytest.raises(UnsupportedError, match="install usearch"):
        without.rebuild()
    assert graph_file(without).is_file()  # for those that can use it


def test_what_was_added_since_is_found_too_and_equal_entries_come_by_id(
    bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_module, "JOURNAL_ENTRIES", 5)
    for i in range(12):
        teach(bank, f"new {i}")
    again = [bank.add(unit(300)[7], Record("again"), value=np.array([1])) for _ in range(3)]
    assert bank.stats().graph_entries == 300
    assert_finds_the_same(bank)
    assert [entry.id for entry in bank.search(unit(300)[7], 4)] == [7, *again]
    assert_finds_the_same(Bank(bank.folder))
    assert bank.search(-unit(300)[7], 4, floor=0.99) == ()


def test_more_equal_entries_than_candidates_come_in_the_order_of_their_ids(tmp_path: Path) -> None:
    bank = Bank(make_bank(tmp_path / "bank"))
    ids = [bank.add(unit(1, seed=9)[0], Record("same"), value=np.array([1])) for _ in range(CANDIDATES + 20)]
    bank.rebuild()
    assert [entry.id for entry in bank.search(unit(1, seed=9)[0], 4)] == ids[:4]


def test_a_small_bank_has_no_graph(tmp_path: Path) -> None:
    bank = Bank(make_bank(tmp_path / "bank", 40))
    assert bank.rebuild() == 0
    assert not bank.graph_due
    assert bank.manifest.generation == 1


def test_forgetting_leaves_no_byte_in_the_graph_and_keeps_a_graph_that_never_had_it(bank: Bank) -> None:
    new = teach(bank, "new")
    bank.forget(id=new)
    assert bank.stats().graph_entries == 300
    key = quantize_keys(unit(300)[8:9])[0].tobytes()
    assert key in graph_file(bank).read_bytes()
    reader = Bank(bank.folder)
    bank.forget(id=8)
    assert not any(key in path.read_bytes() for path in bank.folder.iterdir())
    assert files(bank.folder) == named_files(bank)
    assert_finds_the_same(bank)
    assert reader.search(unit(300)[8], 1)[0].id == 8  # until it refreshes, it sees what it had open
    reader.refresh()
    assert_finds_the_same(reader)
    assert bank.rebuild() == 299
    assert_finds_the_same(bank)


def test_what_is_forgotten_while_the_graph_is_built_is_not_in_it(bank: Bank) -> None:
    other, key = Bank(bank.folder), quantize_keys(unit(300)[8:9])[0].tobytes()
    calls = []

    def advance(_: int) -> None:
        if not calls:
            other.forget(id=8)
        calls.append(_)

    assert bank.rebuild(advance) == 299
    assert len(calls) == 2
    assert not any(key in path.read_bytes() for path in bank.folder.iterdir())
    assert_finds_the_same(Bank(bank.folder))


def test_a_graph_with_any_changed_byte_is_not_used(bank: Bank) -> None:
    path, rng = graph_file(bank), random.Random(0)
    whole = path.read_bytes()
    for _ in range(60):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(rng.choice([data, data[: rng.randrange(len(data))], data + b"x", b""]))
        changed = Bank(bank.folder)
        assert changed.stats().graph_entries == 0
        assert_finds_the_same(changed)
    changed.verify()
    assert changed.rebuild() == 300
    assert_finds_the_same(Bank(bank.folder))


def test_where_usearch_fails_on_a_graph_all_entries_are_compared(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    from usearch.index import Index

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a node has more links than there are")

    teach(bank, "new")
    monkeypatch.setattr(Index, "search", fail)
    assert bank.stats().graph_entries == 300
    assert_finds_the_same(bank)


@pytest.mark.parametrize(("name", "value"), [("count", 299), ("last_id", 300)])
def test_a_manifest_that_lies_about_its_graph_hides_no_entry(bank: Bank, name: str, value: int) -> None:
    teach(bank, "new")
    manifest = json.loads((bank.folder / "manifest.json").read_text("utf-8"))
    manifest["graph"][name] = value
    reseal(bank.folder, manifest)
    assert_finds_the_same(Bank(bank.folder))


def test_another_banks_graph_is_not_used(bank: Bank, tmp_path: Path) -> None:
    other = Bank(make_bank(tmp_path / "other", 200))
    other.rebuild()
    manifest = json.loads((bank.folder / "manifest.json").read_text("utf-8"))
    foreign = json.loads((other.folder / "manifest.json").read_text("utf-8"))["graph"]
    graph_file(bank).write_bytes(graph_file(other).read_bytes())
    manifest["graph"] |= {"bytes": foreign["bytes"], "sha256": foreign["sha256"]}
    reseal(bank.folder, manifest)
    changed = Bank(bank.folder)
    assert changed.stats().graph_entries == 0
    assert_finds_the_same(changed)


def test_a_graph_of_more_entries_than_the_manifest_says_is_not_mapped(
    bank: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from usearch.index import Index

    mapped: list[object] = []
    view = Index.view
    monkeypatch.setattr(Index, "view", lambda self, path: (mapped.append(path), view(self, path)))
    Bank(bank.folder)
    assert len(mapped) == 1
    test_another_banks_graph_is_not_used(bank, tmp_path)
    assert {Path(str(path)).parent for path in mapped[1:]} <= {tmp_path / "other"}


def test_a_copy_takes_the_graph_along(bank: Bank, tmp_path: Path) -> None:
    teach(bank, "new")
    copy_bank(bank.folder, tmp_path / "copy")
    copy = Bank(tmp_path / "copy")
    assert copy.stats().graph_entries == 300
    assert contents(copy) == contents(bank)
    assert_finds_the_same(copy)


def test_merged_entries_are_found_and_make_a_new_graph_due(bank: Bank, tmp_path: Path) -> None:
    other = Bank(make_bank(tmp_path / "other", 60))
    assert len(bank.merge(other)) == 60
    assert bank.stats().graph_entries == 300
    assert_finds_the_same(bank)
    assert bank.graph_due
    assert bank.rebuild() == 360
    assert_finds_the_same(bank)


def test_several_threads_search_one_graph(bank: Bank) -> None:
    expected = exact(bank, QUERIES, 4).rows.tolist()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda query: bank.nearest(query[None], 4).rows[0].tolist(), [*QUERIES] * 5))
    assert found == expected * 5
