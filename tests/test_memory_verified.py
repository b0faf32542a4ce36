"""A bank that was verified is not hashed again while its files are unchanged, and only then."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import Any

import pytest

from tests.banks import contents, make_bank, teach
from tinyalign_edge.errors import BundleError
from tinyalign_edge.memory import Bank, verified
from tinyalign_edge.memory import rebuild as rebuild_module
from tinyalign_edge.memory import segment as segment_module


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TINYALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(verified, "SETTLED_NS", 0)
    return tmp_path / "cache"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the segments that have been hashed."""
    names: list[str] = []
    check = segment_module.check_files
    monkeypatch.setattr(segment_module, "check_files", lambda *given: (names.extend(given[1]), check(*given)))
    return names


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_bank(tmp_path / "bank", 60)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    with path.open("r+b") as file:
        file.write(data)


def test_a_bank_is_hashed_once_and_the_record_lies_outside_of_it(folder: Path, cache: Path, hashed: list[str]) -> None:
    before = {path.name for path in folder.iterdir()}
    expected = contents(Bank(folder))
    assert contents(Bank(folder)) == expected
    assert hashed == ["segment-1-0.bin"]
    Bank(folder).verify()
    assert hashed == ["segment-1-0.bin"] * 2
    assert {path.name for path in folder.iterdir()} == before
    assert len(list(cache.rglob("*.json"))) == 1


def test_what_older_checks_passed_is_checked_again(
    folder: Path, cache: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Bank(folder)
    monkeypatch.setattr(segment_module, "CHECKS", segment_module.CHECKS + 1)
    for _ in range(2):
        Bank(folder)
    assert hashed == ["segment-1-0.bin"] * 2


def test_a_byte_that_changes_after_that_is_found(folder: Path, cache: Path) -> None:
    Bank(folder)
    path = folder / "segment-1-0.bin"
    times = path.stat()
    flip(path)
    with pytest.raises(BundleError, match="SHA-256"):
        Bank(folder)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # the time of its last change in state stays new
    with pytest.raises(BundleError, match="SHA-256"):
        Bank(folder)


def test_a_verified_bank_whose_bytes_change_without_a_trace_is_found_by_verify(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verified, "_mark", lambda path, meaning: path.name)  # a file system that keeps no times
    bank = Bank(folder)
    flip(folder / "segment-1-0.bin")
    Bank(folder)
    with pytest.raises(BundleError, match="SHA-256"):
        bank.verify()
    with pytest.raises(BundleError, match="SHA-256"):
        Bank(folder)


def test_a_copy_of_the_folder_is_hashed_anew(folder: Path, cache: Path, hashed: list[str], tmp_path: Path) -> None:
    Bank(folder)
    folder.rename(tmp_path / "elsewhere")
    Bank(tmp_path / "elsewhere")
    assert len(hashed) == 2


@pytest.mark.parametrize("damage", ["", "null", "[1]", "{", "[" * 100_000, '["' + "0" * 64 + '"]'])
def test_a_record_that_cannot_be_read_means_hashing_again(
    folder: Path, cache: Path, hashed: list[str], damage: str
) -> None:
    expected = contents(Bank(folder))
    (record,) = cache.rglob("*.json")
    record.write_text(damage)
    assert contents(Bank(folder)) == expected
    assert len(hashed) == 2
    Bank(folder)
    assert len(hashed) == 2  # it has been written anew


def test_a_cache_that_cannot_be_written_means_hashing_each_time(folder: Path, cache: Path, hashed: list[str]) -> None:
    cache.write_text("a file where the folder should be")
    for _ in range(3):
        Bank(folder)
    assert len(hashed) == 3


def test_a_file_that_was_only_just_written_is_hashed_again(
    folder: Path, cache: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verified, "SETTLED_NS", 10**12)
    for _ in range(2):
        Bank(folder)
    assert len(hashed) == 2
    assert not cache.exists()


def test_a_file_that_settles_only_while_it_is_hashed_is_hashed_again(
    folder: Path, cache: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verified, "SETTLED_NS", 10**12)
    check = segment_module.check_files
    late = time.time_ns() + 10**13

    def slowly(*given: Any) -> None:
        check(*given)
        monkeypatch.setattr(verified.time, "time_ns", lambda: late)

    monkeypatch.setattr(segment_module, "check_files", slowly)
    Bank(folder)
    assert not cache.exists()


def test_a_record_that_cannot_be_written_whole_leaves_nothing(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        Bank(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_the_graph_is_verified_like_the_segments(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebuild_module, "SWITCH_OVER", 50)
    bank = Bank(folder)
    bank.rebuild()
    teach(bank, "new")
    assert [Bank(folder).stats().graph_entries for _ in range(2)] == [60, 60]
    assert bank.manifest.graph is not None
    flip(folder / bank.manifest.graph.file)
    assert Bank(folder).stats().graph_entries == 0


def test_records_of_many_banks_do_not_pile_up(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verified, "MAX_RECORDS", 3)
    for i in range(5):
        Bank(make_bank(tmp_path / f"bank-{i}", 2))
    assert len(list(cache.rglob("*.json"))) == 3
