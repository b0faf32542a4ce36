"""A bank survives killed writers, full disks and competing processes."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.banks import contents, files, make_bank, named_files, teach, unit
from tests.conftest import ROOT
from tinyalign_edge.errors import BundleError, TinyAlignError
from tinyalign_edge.memory import Bank, copy_bank
from tinyalign_edge.memory import rebuild as rebuild_module
from tinyalign_edge.memory.lock import exclusive
from tinyalign_edge.memory.publish import publish
from tinyalign_edge.memory.snapshot import open_snapshot


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.memory_children", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty sealed entries and two in the journal."""
    bank = Bank(make_bank(tmp_path / "bank", 40))
    teach(bank, "first")
    teach(bank, "second")
    return bank.folder


@pytest.mark.parametrize("points", [25, pytest.param(200, marks=pytest.mark.slow)])
def test_a_writer_killed_anywhere_leaves_all_it_acknowledged_and_nothing_half(folder: Path, points: int) -> None:
    result = json.loads(finish(start("crash", folder, points, "seed")))
    assert result["points"] == points
    assert result["different_ends"] > 5  # it died early and late


@pytest.mark.parametrize("points", [12, pytest.param(100, marks=pytest.mark.slow)])
def test_a_writer_killed_while_it_replaces_the_bank_leaves_the_old_or_the_new_one(folder: Path, points: int) -> None:
    result = json.loads(finish(start("replace", folder, points, "seed")))
    assert result["lines"] > 50
    assert result["found"] == [0, 1]  # it died before the new one stood, and after


def test_a_process_that_was_forked_off_while_one_wrote_does_not_keep_the_lock(folder: Path) -> None:
    with exclusive(folder):
        child = os.fork()
        if child == 0:
            signal.pause()
            os._exit(0)
    try:
        with (folder / "lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_bytes_after_what_counts_are_ignored_and_swept_away(folder: Path) -> None:
    before = contents(Bank(folder))
    journal = folder / json.loads((folder / "manifest.json").read_text("utf-8"))["journal"]["file"]
    with journal.open("ab") as file:
        file.write(b"half an entry that was never acknowledged")
    (folder / "segment-99-0.bin").write_bytes(b"left by a writer that died")
    (folder / "manifest.json.new").write_bytes(b"{")
    bank = Bank(folder)
    assert contents(bank) == before
    teach(bank, "third")
    assert contents(Bank(folder)).keys() == {*before, 42}
    assert files(folder) == named_files(bank)
    assert b"half an entry" not in journal.read_bytes()


def test_a_bank_is_replaced_where_a_writer_died_and_a_graph_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebuild_module, "SWITCH_OVER", 20)
    Bank(folder).rebuild()
    (folder / "manifest.json.new").write_bytes(b"{")
    (folder / "graph-99.usearch").write_bytes(b"left by a writer that died")
    new = open_snapshot(make_bank(folder.with_name("new"), 30))
    publish(folder, new.manifest.spec, [(table, np.ones(len(table), np.bool_)) for table in new.segments])
    bank = Bank(folder)
    assert (bank.ids, bank.manifest.generation) == (tuple(range(42, 72)), 100)
    assert files(folder) == named_files(bank) == {"manifest.json", "segment-100-0.bin"}


def test_a_journal_that_lost_its_end_is_refused(folder: Path) -> None:
    journal = folder / json.loads((folder / "manifest.json").read_text("utf-8"))["journal"]["file"]
    journal.write_bytes(journal.read_bytes()[:-1])
    with pytest.raises(BundleError, match="cut or changed"):
        Bank(folder)


@pytest.mark.parametrize("full", ["nothing", "journal", "manifest"])
def test_a_full_disk_is_an_error_of_one_line_and_leaves_the_old_bank(tmp_path: Path, full: str) -> None:
    folder = make_bank(tmp_path / "bank", 40)
    teach(Bank(folder), "first")
    before = contents(Bank(folder))
    journal_bytes = Bank(folder).stats().total_bytes - (folder / "segment-1-0.bin").stat().st_size
    manifest_bytes = (folder / "manifest.json").stat().st_size
    assert 2 * journal_bytes + 60 < manifest_bytes  # so that the manifest is what does not fit
    limit_bytes = {"nothing": 0, "journal": journal_bytes + 10, "manifest": manifest_bytes - 20}[full]
    errors = json.loads(finish(start("full", folder, limit_bytes)))
    assert len(errors) == 4
    assert all("cannot be written (File too large" in error and "\n" not in error for error in errors)
    bank = Bank(folder)
    assert contents(bank) == before
    teach(bank, "with room again")


def test_a_read_only_folder_is_an_error_of_one_line_and_can_still_be_read(folder: Path) -> None:
    before = contents(Bank(folder))
    try:
        errors = json.loads(finish(start("read-only", folder)))
    finally:
        folder.chmod(0o755)
    assert len(errors) == 4
    assert all("cannot be written (Permission denied" in error and "--memory-dir" in error for error in errors)
    assert contents(Bank(folder)) == before


def test_a_copy_goes_into_an_empty_folder_whose_parent_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "mount" / "memory"
    target.mkdir(parents=True)
    try:
        done, refused = json.loads(finish(start("copy", folder, target)))
    finally:
        target.parent.chmod(0o755)
    assert done is None
    assert "cannot be written (Permission denied" in refused and "\n" not in refused
    assert contents(Bank(target)) == contents(Bank(folder))
    assert [path.name for path in target.parent.iterdir()] == ["memory"]


def test_a_copy_is_made_where_one_that_died_left_a_part(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "memory"
    target.mkdir()
    for name in ("lock", "segment-4-0.bin", "graph-2.usearch", "manifest.json.new"):
        (target / name).write_bytes(b"half")
    copy_bank(folder, target)
    assert contents(Bank(target)) == contents(Bank(folder))
    assert files(target) == named_files(Bank(target))


@pytest.mark.parametrize("there", [True, False])
def test_a_copy_that_does_not_fit_on_the_disk_leaves_nothing(folder: Path, tmp_path: Path, there: bool) -> None:
    target = tmp_path / "new" / "memory"
    if there:
        target.mkdir(parents=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(TinyAlignError, match=r"memory: cannot be written \(File too large"):
            copy_bank(folder, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (files(target) == set()) if there else not target.parent.exists()


def test_a_new_folder_is_on_the_disk_before_the_bank_in_it_counts(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brought, fsync = list[int](), os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (brought.append(os.fstat(file).st_ino), fsync(file)))
    new = open_snapshot(folder)
    target = tmp_path / "a" / "b"
    publish(target, new.manifest.spec, [(table, np.ones(len(table), np.bool_)) for table in new.segments])
    assert {tmp_path.stat().st_ino, (tmp_path / "a").stat().st_ino} <= set(brought)


def test_a_file_that_cannot_be_read_is_an_error_of_one_line(folder: Path) -> None:
    errors = json.loads(finish(start("unreadable", folder)))
    assert len(errors) == 3
    assert all("cannot be read" in error and "Permission denied" in error and "\n" not in error for error in errors)


def test_one_who_looks_again_does_not_wait_for_a_writer_elsewhere(folder: Path) -> None:
    bank = Bank(folder)
    with ThreadPoolExecutor(2) as pool, exclusive(folder):
        adding = pool.submit(teach, bank, "third")
        with pytest.raises(TimeoutError):
            adding.result(0.2)  # it waits for the lock
        pool.submit(bank.refresh).result(10)
    assert adding.result(20) == 42


def test_processes_that_add_and_forget_at_once_lose_nothing_while_others_read(folder: Path) -> None:
    before, reader = contents(Bank(folder)), Bank(folder)
    writers = [start("add", folder, name, 30) for name in ("left", "right")]
    seen = set[int]()
    while any(writer.poll() is None for writer in writers):
        reader.refresh()
        now = contents(reader)
        assert {number: now[number] for number in before} == before
        assert reader.search(unit(1)[0], 1)
        seen.add(len(reader))
    for writer in writers:
        finish(writer)
    after = contents(Bank(folder))
    kept = sorted(entry[0] for number, entry in after.items() if number not in before)
    assert kept == sorted(f"{name} {i}" for name in ("left", "right") for i in range(30) if i % 5)
    assert {number: after[number] for number in before} == before
    assert len(seen) > 2
