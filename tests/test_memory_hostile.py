"""Damaged and hostile bank folders: refused with our error, or opened with the right content."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.banks import contents, make_bank, reseal, teach, unit
from tinyalign_edge.config import to_json
from tinyalign_edge.errors import BundleError, TinyAlignError
from tinyalign_edge.memory import Bank, Record, journal, write_bank
from tinyalign_edge.memory import check as check_module
from tinyalign_edge.memory import rebuild as rebuild_module
from tinyalign_edge.memory import write as write_module
from tinyalign_edge.memory.layout import BankSpec
from tinyalign_edge.memory.search import quantize_keys
from tinyalign_edge.memory.segment import write_segment
from tinyalign_edge.memory.table import Row

Mutation = Callable[[Path, random.Random], None]
HOSTILE_NAMES = ("../outside.bin", "/etc/passwd", "", "lock", "manifest.json", "segment-1-0.bin", "a\0b", "x" * 5000)
HOSTILE_VALUES = (0, -1, 1, 2, 63, 1 << 31, 1 << 40, 1 << 63, 10**300, 1.5, True, None, "1", [], {}, *HOSTILE_NAMES)
PEAK_BYTES = 16 * 2**20


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two segments, a journal and a graph."""
    before = write_module.JOURNAL_ENTRIES, rebuild_module.SWITCH_OVER
    write_module.JOURNAL_ENTRIES, rebuild_module.SWITCH_OVER = 5, 50
    bank = Bank(make_bank(tmp_path_factory.mktemp("original") / "bank", 60))
    for i in range(8):
        teach(bank, f"new {i}")
    bank.rebuild()
    teach(bank, "newer")
    write_module.JOURNAL_ENTRIES, rebuild_module.SWITCH_OVER = before
    stats = bank.stats()
    assert (stats.segments, stats.journal_entries, stats.graph_entries) == (2, 4, 68)
    return bank.folder


def some_file(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(path for path in folder.iterdir() if path.name != "lock"))


def flip_a_bit(folder: Path, rng: random.Random) -> None:
    path = some_file(folder, rng)
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(folder: Path, rng: random.Random) -> None:
    path = some_file(folder, rng)
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


def lengthen(folder: Path, rng: random.Random) -> None:
    with some_file(folder, rng).open("ab") as file:
        file.write(rng.randbytes(rng.randrange(1, 300)))


def overwrite(folder: Path, rng: random.Random) -> None:
    path = some_file(folder, rng)
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    size = min(rng.randrange(1, 200), len(data) - at)
    data[at : at + size] = rng.choice([bytes(size), rng.randbytes(size)])
    path.write_bytes(data)


def swap(folder: Path, rng: random.Random) -> None:
    first, second = some_file(folder, rng), some_file(folder, rng)
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)


def replace(folder: Path, rng: random.Random) -> None:
    """By nothing, a folder, a link to itself kept elsewhere, or a pipe that nobody writes to."""
    path = some_file(folder, rng)
    aside = path.rename(folder.parent / f"aside-{path.name}")
    rng.choice([lambda: None, path.mkdir, lambda: path.symlink_to(aside), lambda: os.mkfifo(path)])()


def lie(folder: Path, rng: random.Random) -> None:
    """One value of the manifest, with the right digest."""
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    places = list(leaves(manifest))
    parent, key = rng.choice([place for place in places if place[1] != "self_sha256"])
    value = rng.choice(HOSTILE_VALUES)
    if not (key == "journal" and value is None) and not (key == "segments" and value == []):  # an older, smaller bank
        parent[key] = value
    reseal(folder, manifest)


def leaves(value: Any) -> Any:
    """(container, key) of everything in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from leaves(item)


MUTATIONS: tuple[Mutation, ...] = (flip_a_bit, cut, lengthen, overwrite, swap, replace, lie, lie, lie)


@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_mutated_bank_is_refused_or_has_the_right_content(original: Path, tmp_path: Path, count: int) -> None:
    whole = Bank(original)
    expected, query = contents(whole), unit(1, seed=3)[0]
    nearest = [entry.id for entry in whole.search(query, 5)]
    rng = random.Random("mutations")
    refused = 0
    for number in range(count):
        mutation = rng.choice(MUTATIONS)
        folder = Path(shutil.copytree(original, tmp_path / str(number) / "bank"))
        mutation(folder, rng)
        found, peak_bytes = _open(folder, query)
        if peak_bytes >= PEAK_BYTES:  # the first time may import what is loaded when it is wanted
            found, peak_bytes = _open(folder, query)
        refused += found is None
        assert found in (None, (expected, nearest)), f"{number}: {mutation.__name__}"
        assert peak_bytes < PEAK_BYTES, f"{number}: {mutation.__name__}"
        shutil.rmtree(tmp_path / str(number))
    assert count / 2 < refused < count


def _open(folder: Path, query: Any) -> tuple[Any, int]:
    """What a bank holds and finds, None where it is refused, and the most memory that took."""
    tracemalloc.start()
    try:
        bank = Bank(folder)
        return (contents(bank), [entry.id for entry in bank.search(query, 5)]), tracemalloc.get_traced_memory()[1]
    except TinyAlignError as error:
        assert "\n" not in str(error)
        return None, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("what", ["value_offsets", "record_offsets"])
def test_an_entry_as_large_as_its_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.setattr(check_module, "MAX_ENTRY_BYTES", 1 << 10)
    monkeypatch.setattr(check_module, "MAX_RECORD_BYTES", 1 << 10)
    folder = make_bank(tmp_path / "bank", 600)
    offsets = np.array(getattr(Bank(folder)._snapshot.segments[0], what))
    offsets[1:-1] = 0  # the last entry is all there is
    put_segment(folder, **{what: offsets})
    with pytest.raises(BundleError, match="offsets do not fit"):
        Bank(folder)


@pytest.mark.parametrize(
    ("scale", "times"), [(np.nan, 1), (np.inf, 1), (3e38, 1), (0.0, 1), (-1.0, 1), (None, 0), (np.inf, 0)]
)
def test_a_segment_with_a_key_that_no_picture_has_is_refused(tmp_path: Path, scale: float | None, times: int) -> None:
    folder = make_bank(tmp_path / "bank", 40)
    table = Bank(folder)._snapshot.segments[0]
    scales, keys = np.array(table.key_scales), np.array(table.keys)
    scales[3] = scales[3] if scale is None else scale
    keys[3] *= times
    put_segment(folder, key_scales=scales, keys=keys)
    with pytest.raises(BundleError, match="not of length 1"):
        Bank(folder)


@pytest.mark.parametrize("scale", [np.nan, np.inf, 3e38])
def test_a_segment_with_a_latent_that_is_not_finite_is_refused(tmp_path: Path, scale: float) -> None:
    folder, latents = tmp_path / "bank", np.ones((10, 3, 8), np.float32)
    write_bank(folder, unit(10), [Record("a")] * 10, fingerprint="f", vocab_size=9, latents=latents)
    scales = np.array(Bank(folder)._snapshot.segments[0].value_scales)
    scales[3, 1] = scale
    put_segment(folder, value_scales=scales)
    with pytest.raises(BundleError, match="a value is not finite"):
        Bank(folder)


def put_segment(folder: Path, **columns: Any) -> None:
    """Put other columns in the place of those of the only segment, with the right digests."""
    table = dataclasses.replace(Bank(folder)._snapshot.segments[0], **columns)
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    entry = write_segment(folder / "segment-2-0.bin", table, BankSpec(**manifest["spec"]))
    manifest["segments"] = [to_json(entry)]
    reseal(folder, manifest)


def a_row(number: int, *, scale: float | None = None, tokens: int = 1, record: bytes = b"{}") -> Row:
    keys, scales = quantize_keys(unit(1))
    own = scales[0] if scale is None else np.float32(scale)
    return Row(
        number, own, keys[0], np.ones(tokens, np.int32), np.zeros((0, 0), np.int8), np.zeros(0, np.float32), record
    )


JOURNALS = {
    "ids that fall": [a_row(45), a_row(41)],
    "an id twice": [a_row(41), a_row(41)],
    "an id of the segment": [a_row(39)],
    "a scale that is no number": [a_row(40, scale=np.nan)],
    "an infinite scale": [a_row(40), a_row(41, scale=np.inf)],
    "a key far from 1": [a_row(40, scale=1e30)],
    "a zero key": [a_row(40, scale=0)],
    "a value as large as the journal": [a_row(40, tokens=(1 << 18) + 1)],
    "a record as large as the journal": [a_row(40, record=b"x" * ((1 << 21) + 1))],
}


@pytest.mark.parametrize("what", JOURNALS)
def test_a_journal_that_says_the_impossible_is_refused_though_its_digests_are_right(tmp_path: Path, what: str) -> None:
    folder = make_bank(tmp_path / "bank", 40)
    put_journal(folder, [a_row(40), a_row(43)])
    assert Bank(folder).ids[-2:] == (40, 43)
    put_journal(folder, JOURNALS[what])
    with pytest.raises(BundleError, match=r"do not rise|not of length 1|too long"):
        Bank(folder)


def test_a_journal_that_goes_on_with_a_lesser_id_is_refused_by_one_who_reads_on(tmp_path: Path) -> None:
    folder = make_bank(tmp_path / "bank", 40)
    put_journal(folder, [a_row(45)])
    bank = Bank(folder)
    put_journal(folder, [a_row(45), a_row(41)])
    with pytest.raises(BundleError, match="do not rise"):
        bank.refresh()
    assert bank.ids[-1] == 45


def put_journal(folder: Path, rows: list[Row]) -> None:
    """Make `rows` the journal, with the right digests."""
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    data, digest = b"", journal.FIRST_DIGEST
    for row in rows:
        entry, digest = journal.encode(row, digest)
        data += entry
    (folder / "journal-9.bin").write_bytes(data)
    manifest["journal"] = {"file": "journal-9.bin", "bytes": len(data), "count": len(rows), "digest": digest.hex()}
    manifest["generation"] += 1
    manifest["next_id"] = 100
    reseal(folder, manifest)


def test_a_writer_follows_no_link_that_a_stranger_left(original: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(original, tmp_path / "bank"))
    precious = tmp_path / "precious"
    precious.write_text("untouched")
    (folder / "lock").unlink()
    (folder / "lock").symlink_to(precious)
    with pytest.raises(TinyAlignError, match="cannot be written"):
        teach(Bank(folder), "new")
    (folder / "lock").unlink()
    (folder / "manifest.json.new").symlink_to(precious)
    teach(Bank(folder), "new")
    assert precious.read_text() == "untouched"
