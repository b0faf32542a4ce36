"""The bank: searched with the real USearch, taught, and made to forget."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.memory_bank import read_bank, search
from tests.banks import (
    VOCAB,
    contents,
    files,
    make_bank,
    named_files,
    records,
    reseal,
    some_latents,
    teach,
    tokens_of,
    unit,
)
from tests.conftest import ROOT
from tinyalign_edge.errors import BundleError, InputError
from tinyalign_edge.memory import Bank, Hybrid, Record, copy_bank, latents_of, reading_order, token_ids_of, write_bank
from tinyalign_edge.memory import check as check_module
from tinyalign_edge.memory import join as join_module
from tinyalign_edge.memory import write as write_module
from tinyalign_edge.memory.record import decode_record
from tinyalign_edge.memory.search import nearest, quantize_keys


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_bank(tmp_path / "bank")


@pytest.fixture
def small_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sealed after every fifth entry, so that few additions make many segments."""
    monkeypatch.setattr(write_module, "JOURNAL_ENTRIES", 5)


def latents_bank(folder: Path, latents: np.ndarray) -> Bank:
    count = len(latents)
    write_bank(folder, unit(count), records(count), fingerprint="f", vocab_size=9, latents=latents)
    return Bank(folder)


def hybrid_bank(folder: Path, latents: np.ndarray) -> Bank:
    """The entries of `make_bank` with latents, too."""
    count = len(latents)
    ids = [tokens_of(i).tolist() for i in range(count)]
    given: dict[str, Any] = {"fingerprint": "f", "vocab_size": VOCAB, "token_ids": ids, "latents": latents}
    write_bank(folder, unit(40)[:count], records(count), **given)
    return Bank(folder)


def test_an_entry_comes_back_as_it_was_written(folder: Path) -> None:
    entry = Bank(folder).entry(7)
    assert (entry.text, entry.question, entry.source, entry.time) == ("text ü 7", "question 7", "source-7", "")
    assert entry.value.tolist() == [7, 7, 7]
    with pytest.raises(InputError, match="no entry of the id 300"):
        Bank(folder).entry(300)


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
    assert bank.search(unit(300)[5], 4, floor=0.99)[0].id == 5


def test_more_neighbours_than_entries_leaves_empty_places() -> None:
    keys, scales = quantize_keys(unit(2))
    assert nearest(keys, scales, unit(1), 4).rows[0, 2:].tolist() == [-1, -1]


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_keys_that_are_zero_or_not_finite_are_refused(folder: Path, bad: float) -> None:
    with pytest.raises(InputError, match="zero or not finite"):
        quantize_keys(np.full((1, 4), bad, np.float32))
    with pytest.raises(InputError, match="not of length 1"):
        quantize_keys(1.01 * unit(1))
    bank = Bank(folder)
    with pytest.raises(InputError, match="zero or not finite"):
        bank.add(np.full(32, bad, np.float32), Record("x"), value=np.array([1]))
    assert len(Bank(folder)) == 300


@pytest.mark.parametrize("bad", [np.nan, np.inf, np.finfo(np.float32).max])
def test_latents_that_are_not_finite_are_refused(tmp_path: Path, bad: float) -> None:
    latents = np.ones((4, 3, 8), np.float32)
    latents[1, 2, 3] = bad
    with pytest.raises(InputError, match="latents: one is not finite"):
        latents_bank(tmp_path / "bank", latents)


def test_a_bank_of_no_values_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"token_ids and latents: .* give one"):
        write_bank(tmp_path / "bank", unit(2), records(2), fingerprint="f", vocab_size=VOCAB)
    assert not (tmp_path / "bank").exists()


def test_a_value_may_be_a_list(tmp_path: Path) -> None:
    tokens = Bank(make_bank(tmp_path / "tokens", 3))
    latents, given = Bank(make_bank(tmp_path / "latents", 3, "latents")), some_latents(1)[0]
    assert tokens.entry(tokens.add(unit(1)[0], Record("x"), value=[4, 5])).value.tolist() == [4, 5]  # type: ignore[arg-type]
    number = latents.add(unit(1)[0], Record("x"), value=given.tolist())
    np.testing.assert_allclose(latents_of(latents.entry(number).value), given, atol=np.abs(given).max() / 127)


def test_latents_come_back_within_a_step_of_their_scale(tmp_path: Path) -> None:
    latents = np.random.default_rng(0).normal(size=(20, 3, 8)).astype(np.float32)
    bank = latents_bank(tmp_path / "b", latents[:19])
    bank.add(unit(1)[0], Record("added"), value=latents[19])
    for number in range(20):
        step = np.abs(latents[number]).max(axis=1, keepdims=True) / 127
        assert np.all(np.abs(bank.entry(number).value - latents[number]) <= step * 0.51)


def test_what_is_added_is_found_at_once_here_and_by_others_when_they_look_again(folder: Path) -> None:
    bank, other = Bank(folder), Bank(folder)
    key = unit(1, seed=9)[0]
    number = bank.add(3 * key, Record("Tom", source="s"), value=np.array([4, 5]))
    found = bank.search(key, 1)[0]
    assert (number, found.id, found.text, found.value.tolist()) == (300, 300, "Tom", [4, 5])
    assert found.similarity == pytest.approx(1, abs=0.01)
    assert len(other) == 300
    other.refresh()
    assert contents(other) == contents(bank) == contents(Bank(folder))


def test_many_additions_make_few_segments_and_keep_ids_and_order(folder: Path, small_journal: None) -> None:
    bank = Bank(folder)
    before = contents(bank)
    taught = {teach(bank, f"new {i}"): f"new {i}" for i in range(60)}
    assert list(taught) == list(range(300, 360))
    after = contents(Bank(folder))
    assert list(after) == list(range(360))
    assert {number: after[number][0] for number in taught} == taught
    assert {number: after[number] for number in before} == before
    assert bank.stats().segments <= 4
    assert files(folder) == named_files(bank)


def test_equal_entries_of_several_files_come_in_the_order_of_their_ids(folder: Path, small_journal: None) -> None:
    bank = Bank(folder)
    key = unit(1, seed=9)[0]
    ids = [bank.add(key, Record("same"), value=np.array([1])) for _ in range(13)]
    assert [entry.id for entry in bank.search(key, 13)] == ids


@pytest.mark.parametrize("journalled", [True, False])
def test_no_byte_of_what_was_forgotten_is_left_in_any_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, journalled: bool
) -> None:
    bank = Bank(folder)
    key = unit(1, seed=9)[0]
    value = np.arange(20, 40)
    bank.add(key, Record("my secret cat", source="private album"), value=value)
    teach(bank, "kept")
    if not journalled:
        monkeypatch.setattr(write_module, "JOURNAL_ENTRIES", 1)
        teach(bank, "kept too")
        assert bank.stats().segments > 0
    pieces = [b"secret cat", b"private album", quantize_keys(key[None])[0].tobytes(), value.astype("<i4").tobytes()]
    stored = b"".join(path.read_bytes() for path in folder.iterdir())
    assert all(piece in stored for piece in pieces)
    assert bank.forget(text="my secret cat") == (300,)
    stored = b"".join(path.read_bytes() for path in folder.iterdir())
    assert not any(piece in stored for piece in pieces)
    assert 300 not in contents(bank) and 301 in contents(bank)
    assert contents(Bank(folder)) == contents(bank)
    assert files(folder) == named_files(bank)
    assert teach(bank, "next") > 301  # an id is never given twice


def test_forgetting_is_by_id_source_or_text_and_by_one_of_them(folder: Path) -> None:
    bank = Bank(folder)
    assert bank.forget(id=3) == (3,)
    assert bank.forget(source="source-4") == (4,)
    assert bank.forget(text="text ü 5") == (5,)
    assert bank.forget(text="text ü 5") == bank.forget(id=3) == bank.forget(id=-1) == bank.forget(id=1 << 70) == ()
    assert bank.ids == (0, 1, 2, *range(6, 300))
    for wrong in ({}, {"id": 1, "text": "text ü 1"}):
        with pytest.raises(InputError, match="give one of"):
            bank.forget(**wrong)


def test_what_forgetting_takes_of_memory_does_not_grow_with_the_bank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (check_module, join_module):
        monkeypatch.setattr(module, "BLOCK", 64)
    peaks = []
    for count in (600, 6000):
        bank = Bank(make_bank(tmp_path / str(count), count))
        tracemalloc.start()
        assert bank.forget(id=7) == (7,)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert bank.ids == (*range(7), *range(8, count))
    size = (tmp_path / "6000" / "segment-2-0.bin").stat().st_size
    assert peaks[1] - peaks[0] < size / 4


def test_a_bank_can_forget_everything_and_be_taught_again(tmp_path: Path) -> None:
    bank = Bank(make_bank(tmp_path / "bank", 2))
    assert [bank.forget(id=i) for i in range(2)] == [(0,), (1,)]
    assert len(bank) == len(Bank(bank.folder)) == 0
    assert bank.search(unit(1)[0], 4) == ()
    assert teach(bank, "again") == 2
    assert [entry.text for entry in bank.search(unit(1)[0], 4)] == ["again"]


def test_one_who_reads_while_others_forget_keeps_what_is_open(folder: Path) -> None:
    reader, writer = Bank(folder), Bank(folder)
    before = contents(reader)
    writer.forget(source="source-7")
    assert contents(reader) == before
    reader.refresh()
    assert 7 not in contents(reader)


@pytest.mark.parametrize(
    ("value", "text", "message"),
    [
        (np.array([50]), "x", "token ids from 0 to 49"),
        (np.array([-1]), "x", "token ids from 0 to 49"),
        (np.array([1]), "\ud800", "not valid Unicode"),
        (np.array([1]), "x" * 2**21, "give a shorter text"),
    ],
)
def test_what_cannot_be_kept_is_refused(folder: Path, value: np.ndarray, text: str, message: str) -> None:
    bank = Bank(folder)
    with pytest.raises(InputError, match=message):
        bank.add(unit(1)[0], Record(text), value=value)
    with pytest.raises(InputError, match="of the shape"):
        bank.add(unit(1)[0][:5], Record("x"), value=np.array([1]))
    assert len(Bank(folder)) == 300


def test_texts_that_are_not_unicode_are_refused_where_they_are_read(folder: Path) -> None:
    table = Bank(folder)._snapshot.segments[0]
    good = table.record(3)
    assert b"text \xc3\xbc 3" in good
    with pytest.raises(BundleError, match="entry 3: its record cannot be read"):
        decode_record(good.replace(b"\xc3\xbc", b"\\ud800"), "entry 3")


def test_more_neighbours_than_there_are_entries_are_all_entries(folder: Path) -> None:
    bank = Bank(folder)
    for k in (300, 10**12):
        assert len(bank.search(unit(1)[0], k)) == 300
    assert bank.search(unit(1)[0], 0) == ()
    assert bank.nearest(unit(2), 302).rows.shape == (2, 302)


def test_a_query_of_another_shape_or_a_negative_count_is_refused(folder: Path) -> None:
    bank = Bank(folder)
    with pytest.raises(InputError, match=r"k -1: must be at least 0"):
        bank.search(unit(1)[0], -1)
    for wrong in (np.ones(5, np.float32), np.ones((1, 32), np.float32)):
        with pytest.raises(InputError, match=r"of the shape .*, this bank is asked by \(queries, 32\)"):
            bank.search(wrong, 4)
    with pytest.raises(InputError, match=r"of the shape \(32,\)"):
        bank.nearest(unit(1)[0], 4)


def test_white_space_around_a_text_does_not_keep_it_from_being_forgotten(folder: Path) -> None:
    bank = Bank(folder)
    number = teach(bank, " padded ")
    assert bank.forget(text="  padded") == (number,)
    assert bank.forget(text="text ü 5\n") == (5,)


def test_a_hybrid_entry_keeps_its_token_ids_as_they_are_and_its_latents_within_a_step(
    tmp_path: Path, small_journal: None
) -> None:
    latents = some_latents(40)
    bank = hybrid_bank(tmp_path / "bank", latents[:20])
    for i in range(20, 40):
        bank.add(unit(40)[i], Record(f"added {i}"), value=Hybrid(tokens_of(i), latents[i]))
    bank.forget(id=7)
    assert bank.manifest.segments
    assert bank.manifest.journal is not None
    assert bank.ids == (*range(7), *range(8, 40))
    for number in bank.ids:
        value = Bank(bank.folder).entry(number).value
        assert token_ids_of(value).tolist() == tokens_of(number).tolist()
        step = np.abs(latents[number]).max(axis=1, keepdims=True) / 127
        assert np.all(np.abs(latents_of(value) - latents[number]) <= step * 0.51)
        assert len(value) == 3 + len(tokens_of(number))


def test_a_value_of_another_kind_or_size_is_refused(tmp_path: Path) -> None:
    banks = {
        "tokens": Bank(make_bank(tmp_path / "tokens", 3)),
        "latents": latents_bank(tmp_path / "latents", some_latents(3)),
        "hybrid": hybrid_bank(tmp_path / "hybrid", some_latents(3)),
    }
    ids, latents = np.array([1]), some_latents(1)[0]
    values: dict[str, Any] = {"tokens": ids, "latents": latents, "hybrid": Hybrid(ids, latents), "0-d": np.array(1)}
    for kind, bank in banks.items():
        for other in values.keys() - {kind}:
            with pytest.raises(InputError, match=f"value: it is of kind {other}, and this bank holds {kind}"):
                bank.add(unit(1)[0], Record("x"), value=values[other])
    key, hybrid = unit(1)[0], banks["hybrid"]
    for wrong in (Hybrid(ids, latents[:2]), Hybrid(ids, latents * np.nan)):
        with pytest.raises(InputError, match=r"value: need finite latents of the shape \(3, 8\)"):
            hybrid.add(key, Record("x"), value=wrong)
    with pytest.raises(InputError, match="value: need token ids from 0 to 49"):
        hybrid.add(key, Record("x"), value=Hybrid(np.array([50]), latents))
    assert [len(bank) for bank in banks.values()] == [3, 3, 3]


def test_hybrid_banks_are_merged_by_what_both_parts_say(tmp_path: Path) -> None:
    latents = some_latents(12)
    first, second = hybrid_bank(tmp_path / "a", latents[:10]), hybrid_bank(tmp_path / "b", latents)
    first.add(unit(40)[11], Record("text ü 11", "question 11", "source-11"), value=Hybrid(tokens_of(11), latents[0]))
    assert first.merge(second) == (11, 12)
    assert [first.entry(i).text for i in (11, 12)] == ["text ü 10", "text ü 11"]
    np.testing.assert_array_equal(first.entry(12).value.latents, second.entry(11).value.latents)  # type: ignore[union-attr]


def test_hybrid_entries_are_read_one_after_another_the_latents_of_each_first() -> None:
    assert reading_order(2, np.array([1, 0, 3])).tolist() == [0, 1, 6, 2, 3, 4, 5, 7, 8, 9]
    assert reading_order(0, np.array([1, 2])).tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", ["tokens", "latents", "hybrid"])
def test_a_reader_that_knows_the_document_alone_reads_and_searches_the_same(
    tmp_path: Path, kind: str, small_journal: None
) -> None:
    if kind == "tokens":
        bank = Bank(make_bank(tmp_path / "bank", 40))
        for i in range(9):
            teach(bank, f"neu {i}")
    else:
        latents = some_latents(40)
        bank = (latents_bank if kind == "latents" else hybrid_bank)(tmp_path / "bank", latents)
        for i in range(9):
            value: Any = latents[i] if kind == "latents" else Hybrid(tokens_of(i), latents[i])
            bank.add(unit(9, seed=4)[i], Record(f"neu {i}"), value=value)
    bank.forget(id=11)
    assert bank.manifest.journal is not None
    read = read_bank(bank.folder)
    assert list(read) == list(bank.ids)
    for number, (_, value, record) in read.items():
        entry = bank.entry(number)
        tokens, numbers = value if kind == "hybrid" else (value, value)
        np.testing.assert_array_equal(tokens if kind != "latents" else [], token_ids_of(entry.value))
        np.testing.assert_array_equal(numbers if kind != "tokens" else np.zeros((0, 0)), latents_of(entry.value))
        assert record == {name: getattr(entry, name) for name in ("text", "question", "source", "time")}
    for query in unit(20, seed=5):
        assert search(read, query, 5) == [entry.id for entry in bank.search(query, 5)]


def test_the_plain_reader_stays_as_short_as_the_document_says() -> None:
    source = (ROOT / "examples" / "memory_bank.py").read_text("utf-8")
    assert sum(bool(line.strip()) for line in source.splitlines()) <= 60
    assert "tinyalign" not in source


def test_a_copy_begins_with_the_same_entries_and_goes_its_own_way(folder: Path, tmp_path: Path) -> None:
    source = Bank(folder)
    teach(source, "before")
    copy_bank(folder, tmp_path / "copy")
    copy = Bank(tmp_path / "copy")
    assert contents(copy) == contents(source)
    teach(copy, "after")
    copy.forget(id=0)
    copy_bank(folder, tmp_path / "copy")  # there is one: it stays
    assert contents(Bank(tmp_path / "copy")) == contents(copy) != contents(Bank(folder))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is not a memory bank"):
        copy_bank(folder, tmp_path / "other")
    assert {path.name for path in tmp_path.iterdir()} == {"bank", "copy", "other"}


def test_merged_banks_hold_every_entry_once(folder: Path, tmp_path: Path) -> None:
    copy_bank(folder, tmp_path / "copy")
    here, there = Bank(folder), Bank(tmp_path / "copy")
    for name in ("both", "here"):
        teach(here, name)
    for name in ("there", "both", "there"):
        teach(there, name)
    there.forget(id=4)
    before = contents(here)
    assert here.merge(there) == (302,)
    assert contents(here) == contents(Bank(folder)) == {**before, 302: contents(there)[300]}
    assert here.merge(there) == ()
    assert here.search(unit(300)[7], 1)[0].id == 7
    assert teach(here, "afterwards") == 303


def test_banks_of_different_encoders_or_kinds_are_not_merged(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_bank(other, unit(2), records(2), fingerprint="g", vocab_size=50, token_ids=[[1], [2]])
    with pytest.raises(InputError, match=r"of the encoder g, those of .* of f"):
        Bank(folder).merge(Bank(other))
    bank = latents_bank(tmp_path / "latents", np.ones((2, 3, 8), np.float32))
    with pytest.raises(InputError, match="merge banks of one kind"):
        bank.merge(Bank(folder))


def test_the_statistics_count_keys_and_values_apart_from_texts(folder: Path) -> None:
    bank = Bank(folder)
    teach(bank, "new")
    stats = bank.stats()
    tokens = sum(len(entry[-1]) for entry in contents(bank).values())
    assert (stats.entries, stats.segments, stats.journal_entries) == (301, 1, 1)
    assert stats.entry_bytes == pytest.approx(32 + 4 + 8 + 4 * tokens / 301, abs=0.1)
    assert stats.total_bytes == sum((folder / name).stat().st_size for name in files(folder) - {"manifest.json"})


@pytest.mark.parametrize("count", [0, -1, 299, 1 << 40])
def test_a_count_that_does_not_fit_the_files_is_refused(folder: Path, count: int) -> None:
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    manifest["segments"][0]["count"] = count
    reseal(folder, manifest)
    with pytest.raises(BundleError, match=r"cannot hold|out of bounds|do not fit"):
        Bank(folder)


def test_what_is_not_a_bank_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a memory bank"):
        Bank(tmp_path)
