"""A folder appears whole or not at all."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinyalign_edge.errors import InputError, TinyAlignError
from tinyalign_edge.folders import whole_folder


def old_folder(path: Path) -> Path:
    path.mkdir()
    (path / "marker").write_text("old")
    return path


def test_the_new_folder_takes_the_place_of_the_old(tmp_path: Path) -> None:
    target = old_folder(tmp_path / "out")
    with whole_folder(target, marker="marker") as folder:
        (folder / "marker").write_text("new")
        assert (target / "marker").read_text() == "old"
    assert (target / "marker").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    target = old_folder(tmp_path / "out")
    with pytest.raises(error), whole_folder(target, marker="marker") as folder:
        (folder / "half").write_text("written")
        raise error
    assert (target / "marker").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is not ours"), whole_folder(target, marker="marker"):
        pass
    assert (target / "thesis.txt").exists()


def test_a_full_disk_is_an_error_of_one_line_and_leaves_the_old_folder(tmp_path: Path) -> None:
    target = old_folder(tmp_path / "out")
    with pytest.raises(TinyAlignError, match="No space left on device"), whole_folder(target, marker="marker"):
        raise OSError(28, "No space left on device")
    assert (target / "marker").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_terminated_process_removes_what_it_began(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from tinyalign_edge.folders import whole_folder\n"
        "with whole_folder(Path(sys.argv[1]), marker='marker') as folder:\n"
        "    (folder / 'half').write_text('written'); print('ready', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE, stderr=-3)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=20) != 0
    child.stdout.close()
    assert [path.name for path in tmp_path.iterdir()] == []
