"""Packed weights: the same answers from files that are mapped, and a cache that trusts nobody."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import tinyalign_edge as ta
from tests.conftest import STORED_BUNDLE
from tests.test_prefix import PICTURE, QUESTIONS, drawn, logits_of
from tinyalign_edge.runtime import packed


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all graphs that are packed from now on."""
    names: list[str] = []
    pack = packed._pack

    def counted(source: Path, target: Path) -> None:
        names.append(target.name)
        pack(source, target)

    monkeypatch.setattr(packed, "_pack", counted)
    return names


def load(home: Path, bundle: Path = STORED_BUNDLE) -> ta.Model:
    return ta.load(bundle, threads=1, packed_dir=home)


def only_entry(home: Path) -> Path:
    (entry,) = (path for path in home.iterdir() if path.is_dir())
    return entry


def test_packed_weights_compute_the_same_bit_for_bit(tmp_path: Path, made: list[str]) -> None:
    with ta.load(STORED_BUNDLE, threads=1) as plain:
        for _ in range(2):  # made by the first, found by the second
            with load(tmp_path / "packed") as model:
                for picture in (PICTURE, drawn(1)):
                    np.testing.assert_array_equal(
                        model.encode(picture).visual_tokens, plain.encode(picture).visual_tokens
                    )
                    for one, other in zip(*(logits_of(m, picture, QUESTIONS[0]) for m in (model, plain)), strict=True):
                        np.testing.assert_array_equal(one, other)
    assert made == ["vision.onnx", "decoder.onnx"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_packed_files_are_mapped_and_nothing_else_of_their_graphs(tmp_path: Path) -> None:
    with load(tmp_path):
        maps = Path("/proc/self/maps").read_text()
        assert str(only_entry(tmp_path) / "decoder.onnx.data") in maps
    assert str(tmp_path) not in Path("/proc/self/maps").read_text(), "closing lets go of the maps"


def flip(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))


def other_name(entry: Path) -> None:
    record = json.loads((entry / "packed.json").read_text("utf-8"))
    (entry / "packed.json").write_text(json.dumps({**record, "entry": "f" * 65}), "utf-8")


def huge_claim(entry: Path) -> None:
    os.truncate(entry / "decoder.onnx.data", 2**40)
    record = json.loads((entry / "packed.json").read_text("utf-8"))
    record["files"]["decoder.onnx.data"]["bytes"] = 2**40
    (entry / "packed.json").write_text(json.dumps(record), "utf-8")


def link(entry: Path) -> None:
    (entry / "vision.onnx").rename(entry.parent / "elsewhere.onnx")
    (entry / "vision.onnx").symlink_to(entry.parent / "elsewhere.onnx")


def linked_folder(entry: Path) -> None:
    entry.rename(entry.parent / "elsewhere")
    entry.symlink_to(entry.parent / "elsewhere")


@pytest.mark.parametrize(
    "harm",
    [
        pytest.param(lambda entry: flip(entry / "vision.onnx"), id="a changed graph"),
        pytest.param(lambda entry: flip(entry / "decoder.onnx.data"), id="changed weights"),
        pytest.param(lambda entry: (entry / "packed.json").write_text("{", "utf-8"), id="a damaged record"),
        pytest.param(lambda entry: (entry / "packed.json").unlink(), id="no record"),
        pytest.param(lambda entry: (entry / "decoder.onnx").unlink(), id="a missing file"),
        pytest.param(lambda entry: (entry / "more.data").touch(), id="a stranger"),
        pytest.param(lambda entry: (entry / "decoder.onnx").chmod(0o666), id="others may write a file"),
        pytest.param(lambda entry: entry.chmod(0o777), id="others may write the folder"),
        pytest.param(other_name, id="another entry's"),
        pytest.param(huge_claim, id="too large"),
        pytest.param(link, id="a link"),
        pytest.param(linked_folder, id="a linked folder"),
    ],
)
def test_what_is_damaged_or_not_ours_is_made_anew(
    tmp_path: Path, made: list[str], harm: Callable[[Path], object]
) -> None:
    load(tmp_path).close()
    entry = only_entry(tmp_path)
    harm(entry)
    made.clear()
    with load(tmp_path) as model, ta.load(STORED_BUNDLE, threads=1) as plain:
        assert model.ask(PICTURE, QUESTIONS[0]).text == plain.ask(PICTURE, QUESTIONS[0]).text
    assert made == ["vision.onnx", "decoder.onnx"]
    load(tmp_path).close()
    assert len(made) == 2
    assert not entry.is_symlink()


def test_another_onnxruntime_or_bundle_has_an_entry_of_its_own(
    tmp_path: Path, made: list[str], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "packed"
    load(home).close()
    load(home, bundle).close()
    assert len(made) == 2, "the same bundle elsewhere"
    manifest = ta.open_bundle(bundle)
    entries = {path.name for path in home.iterdir()}
    monkeypatch.setattr(onnxruntime, "__version__", "0.0.1")
    packed.packed_graphs(bundle, manifest, home)
    assert len(made) == 4
    assert len(entries ^ {path.name for path in home.iterdir()}) == 2, "the older one is deleted"


def test_processes_and_threads_that_load_at_once_pack_once(tmp_path: Path, made: list[str]) -> None:
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda _: load(tmp_path), range(4)))
    assert made == ["vision.onnx", "decoder.onnx"]
    assert len({model.ask(PICTURE, QUESTIONS[0]).text for model in models}) == 1


def test_a_folder_that_cannot_be_written_says_so_and_a_finished_one_can_be_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ta.InputError, match=r"packed_dir .*file: cannot be written"):
        load(tmp_path / "file")
    with pytest.raises(ta.TinyAlignError, match=r"onnxruntime cannot pack .*encoder\.onnx"):
        monkeypatch.setattr(packed, "VISION", "missing/vision.onnx")  # where onnxruntime cannot create its file
        load(tmp_path / "packed")
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "packed").iterdir()] == ["lock"], "nothing half-written is left"
    load(tmp_path / "packed").close()
    (tmp_path / "packed" / "lock").unlink()
    shutil.copytree(tmp_path / "packed", tmp_path / "copy", symlinks=True)
    load(tmp_path / "copy").close()
    assert not (tmp_path / "copy" / "lock").exists(), "nothing was written"
