"""Damaged and hostile bank folders: refused with our error, or opened with the right content."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.banks import VOCAB, contents, make_bank, reseal, teach, unit
from tinyalign_edge.config import WITH_LATENTS, WITH_TOKENS, to_json
from tinyalign_edge.errors import BundleError, TinyAlignError
from tinyalign_edge.memory import Bank, Record, journal
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
KINDS = ("tokens", "latents", "hybrid")
JUST_TOO_LARGE = float(np.finfo(np.float32).max / np.float32(127))  # times 127 it is finite, times -128 it is not


@pytest.fixture(scope="module", params=["tokens", "hybrid"])
def original(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Two segments, a journal and a graph."""
    before = write_module.JOURNAL_ENTRIES, rebuild_module.SWITCH_OVER
    write_module.JOURNAL_ENTRIES, rebuild_module.SWITCH_OVER = 5, 50
    bank = Bank(make_bank(tmp_path_factory.mktemp("original") / "bank", 60, request.param))
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


@pytest.mark.parametrize("kind", WITH_LATENTS)
@pytest.mark.parametrize("scale", [np.nan, np.inf, 3e38, JUST_TOO_LARGE])
def test_a_segment_with_a_latent_that_is_not_finite_is_refused(tmp_path: Path, kind: str, scale: float) -> None:
    folder = make_bank(tmp_path / "bank", 10, kind)
    table = Bank(folder)._snapshot.segments[0]
    scales, latents = np.array(table.value_scales), np.array(table.latents)
    scales[3, 1], latents[3, 1, 2] = scale, -128
    put_segment(folder, value_scales=scales, latents=latents)
    with pytest.raises(BundleError, match="a value is not finite"):
        Bank(folder)


@pytest.mark.parametrize("kind", WITH_TOKENS)
@pytest.mark.parametrize("wrong", [VOCAB, -1, (1 << 31) - 1])
def test_a_token_id_outside_the_vocabulary_is_refused_wherever_it_is_stored(
    tmp_path: Path, kind: str, wrong: int
) -> None:
    journal_bank, segment_bank = (make_bank(tmp_path / name, 10, kind) for name in ("journal", "segment"))
    put_journal(journal_bank, [a_row(kind, 10, token=wrong)])
    ids = np.array(Bank(segment_bank)._snapshot.segments[0].token_ids)
    ids[3] = wrong
    put_segment(segment_bank, token_ids=ids)
    for folder in (journal_bank, segment_bank):
        with pytest.raises(BundleError, match="a token id is outside the vocabulary"):
            Bank(folder)


@pytest.mark.parametrize("sealed", [40, 0])
@pytest.mark.parametrize(
    "lie",
    [
        {"latents": 2}, {"latents": 4}, {"latents": 6, "latent_dim": 4}, {"latents": 1, "latent_dim": 24},
        {"latent_dim": 7}, {"latent_dim": 9}, {"latents": 0}, {"latent_dim": 0}, {"latents": 1 << 16},
        {"kind": "latents"}, {"kind": "tokens"}, {"kind": "tokens", "latents": 0, "latent_dim": 0},
    ],
    ids=str,
)  # fmt: skip
def test_a_hybrid_bank_that_lies_about_what_an_entry_holds_is_refused(
    tmp_path: Path, lie: dict[str, Any], sealed: int
) -> None:
    """The segment as its sections do not fit, the journal once its entries are read."""
    folder = make_bank(tmp_path / "bank", sealed, "hybrid")
    put_journal(folder, [a_row("hybrid", 40 + i) for i in range(2)])
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    manifest["spec"] |= lie
    reseal(folder, manifest)
    with pytest.raises(BundleError):
        contents(Bank(folder))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [-59, -1, 1, 16, 1 << 40])
def test_a_segment_that_lies_about_its_token_ids_is_refused(tmp_path: Path, kind: str, change: int) -> None:
    folder = make_bank(tmp_path / "bank", 40, kind)
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    manifest["segments"][0]["token_count"] += change
    reseal(folder, manifest)
    with pytest.raises(BundleError):
        Bank(folder)


def put_segment(folder: Path, **columns: Any) -> None:
    """Put other columns in the place of those of the only segment, with the right digests."""
    table = dataclasses.replace(Bank(folder)._snapshot.segments[0], **columns)
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    entry = write_segment(folder / "segment-2-0.bin", table, BankSpec(**manifest["spec"]))
    manifest["segments"] = [to_json(entry)]
    reseal(folder, manifest)


RECORD = Record("taught").encode()


def a_row(
    kind: str, number: int, *, scale: float | None = None, value_scale: float = 0.1, token: int = 1, tokens: int = 1,
    record: bytes = RECORD,
) -> Row:  # fmt: skip
    keys, scales = quantize_keys(unit(1))
    own = scales[0] if scale is None else np.float32(scale)
    ids = np.full(tokens, token, np.int32) if kind in WITH_TOKENS else None
    count, width = (3, 8) if kind in WITH_LATENTS else (0, 0)
    latents = np.full((count, width), -128, np.int8)
    return Row(number, own, keys[0], ids, latents, np.full(count, value_scale, np.float32), record)


JOURNALS: dict[str, list[dict[str, Any]]] = {
    "ids that fall": [{"number": 45}, {"number": 41}],
    "an id twice": [{"number": 41}, {"number": 41}],
    "an id of the segment": [{"number": 39}],
    "a scale that is no number": [{"number": 40, "scale": np.nan}],
    "an infinite scale": [{"number": 40}, {"number": 41, "scale": np.inf}],
    "a key far from 1": [{"number": 40, "scale": 1e30}],
    "a zero key": [{"number": 40, "scale": 0}],
    "a record as large as the journal": [{"number": 40, "record": b"x" * ((1 << 21) + 1)}],
}
OF_TOKENS = {"a value as large as the journal": [{"number": 40, "tokens": (1 << 18) + 1}]}
OF_LATENTS = {
    "a value that is no number": [{"number": 40, "value_scale": np.nan}],
    "an infinite value": [{"number": 40}, {"number": 41, "value_scale": -np.inf}],
    "a value just too large": [{"number": 40, "value_scale": JUST_TOO_LARGE}],
}
IMPOSSIBLE = [
    *((kind, what, rows) for kind in KINDS for what, rows in JOURNALS.items()),
    *((kind, what, rows) for kind in WITH_TOKENS for what, rows in OF_TOKENS.items()),
    *((kind, what, rows) for kind in WITH_LATENTS for what, rows in OF_LATENTS.items()),
]


@pytest.mark.parametrize(("kind", "rows"), [pytest.param(k, rows, id=f"{k}, {what}") for k, what, rows in IMPOSSIBLE])
def test_a_journal_that_says_the_impossible_is_refused_though_its_digests_are_right(
    tmp_path: Path, kind: str, rows: list[dict[str, Any]]
) -> None:
    folder = make_bank(tmp_path / "bank", 40, kind)
    put_journal(folder, [a_row(kind, 40), a_row(kind, 43)])
    assert Bank(folder).ids[-2:] == (40, 43)
    put_journal(folder, [a_row(kind, **row) for row in rows])
    with pytest.raises(BundleError, match=r"do not rise|not of length 1|too long|not finite"):
        Bank(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("at", "what"), [(0, "size"), (16, "items")])
@pytest.mark.parametrize("value", [0, 19, 100, 1 << 20, (1 << 32) - 1])
def test_a_journal_entry_that_does_not_hold_what_it_counts_is_refused(
    tmp_path: Path, kind: str, at: int, what: str, value: int
) -> None:
    folder = make_bank(tmp_path / "bank", 40, kind)

    def lie(data: bytearray) -> None:
        struct.pack_into("<I", data, at, value)

    put_journal(folder, [a_row(kind, 40, tokens=2)], change=lie)
    with pytest.raises(BundleError, match=r"journal-9\.bin.*checksum is not right|its record cannot be read"):
        contents(Bank(folder))


def test_a_journal_that_goes_on_with_a_lesser_id_is_refused_by_one_who_reads_on(tmp_path: Path) -> None:
    folder = make_bank(tmp_path / "bank", 40)
    put_journal(folder, [a_row("tokens", 45)])
    bank = Bank(folder)
    put_journal(folder, [a_row("tokens", 45), a_row("tokens", 41)])
    with pytest.raises(BundleError, match="do not rise"):
        bank.refresh()
    assert bank.ids[-1] == 45


def put_journal(folder: Path, rows: list[Row], *, change: Callable[[bytearray], object] = lambda _: None) -> None:
    """Make `rows` the journal, each after `change`, with the right digests."""
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    data, digest = b"", journal.FIRST_DIGEST
    for row in rows:
        entry = bytearray(journal.encode(row, digest)[0][:-32])
        change(entry)
        digest = hashlib.sha256(digest + entry).digest()
        data += entry + digest
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
