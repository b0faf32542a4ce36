"""Small pictures beside the texts: kept, told apart, decoded with care, and forgotten."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.memory_bank import read_bank
from tests.banks import make_bank, teach, unit
from tests.conftest import STORED_BUNDLE
from tests.test_build import make_data
from tinyalign_edge.errors import BundleError, InputError
from tinyalign_edge.memory import Bank, Record, copy_bank, make_thumbnail, open_thumbnail
from tinyalign_edge.memory import write as write_module
from tinyalign_edge.memory.record import MAX_THUMBNAIL_BYTES
from tinyalign_edge.runtime.build import BuildOptions, build
from tinyalign_edge.runtime.model import load


def picture(width: int = 300, height: int = 200) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def jpeg(width: int, height: int) -> bytes:
    file = io.BytesIO()
    picture(width, height).save(file, "JPEG")
    return file.getvalue()


def test_a_thumbnail_is_small_and_keeps_the_ratio() -> None:
    small = make_thumbnail(picture())
    assert len(small) < MAX_THUMBNAIL_BYTES / 2
    assert open_thumbnail(small, "entry 0").size == (64, 43)


@pytest.mark.parametrize("journalled", [True, False])
def test_it_comes_back_is_counted_apart_and_is_forgotten_with_its_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, journalled: bool
) -> None:
    bank = Bank(make_bank(tmp_path / "bank", 20))
    texts = bank.stats().record_bytes
    small = make_thumbnail(picture())
    number = bank.add(unit(1)[0], Record("cat", thumbnail=small), value=np.array([1]))
    if not journalled:
        monkeypatch.setattr(write_module, "JOURNAL_ENTRIES", 1)
        teach(bank, "kept")
    assert bank.entry(number).thumbnail == read_bank(bank.folder)[number][2]["thumbnail"] == small
    assert bank.entry(3).thumbnail == b""
    stats = bank.stats()
    assert stats.thumbnail_bytes == len(small) + 1
    assert texts < stats.record_bytes < texts + 200
    copy_bank(bank.folder, tmp_path / "copy")
    assert Bank(tmp_path / "copy").merge(bank) == ()
    piece = small[len(small) // 2 :][:64]
    assert piece in b"".join(path.read_bytes() for path in bank.folder.iterdir())
    assert bank.forget(id=number) == (number,)
    assert piece not in b"".join(path.read_bytes() for path in bank.folder.iterdir())
    assert bank.stats().thumbnail_bytes == 0


@pytest.mark.parametrize("data", [b"no picture", jpeg(20, 65), jpeg(40, 40)[:300], b"GIF89a" + bytes(99)])
def test_what_is_no_thumbnail_is_refused_when_it_is_decoded(data: bytes) -> None:
    with pytest.raises(BundleError, match="entry 7: its thumbnail"):
        open_thumbnail(data, "entry 7")


def test_a_thumbnail_that_is_too_large_is_not_kept(tmp_path: Path) -> None:
    bank = Bank(make_bank(tmp_path / "bank", 2))
    with pytest.raises(InputError, match="at most 16384 are kept"):
        bank.add(unit(1)[0], Record("x", thumbnail=bytes(MAX_THUMBNAIL_BYTES + 1)), value=np.array([1]))
    assert len(Bank(bank.folder)) == 2


def test_a_bank_is_built_and_taught_with_thumbnails(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", 11)
    options = BuildOptions(thumbnails=True)
    build(STORED_BUNDLE, data=data, images=data.parent, out=tmp_path / "bank", options=options)
    with load(STORED_BUNDLE, memory_dir=tmp_path / "bank") as model:
        assert model.memory is not None
        entries = [model.memory.entry(0), model.memory.add(picture(), "noise", thumbnail=True)]
        assert [open_thumbnail(entry.thumbnail, "it").size for entry in entries] == [(32, 32), (64, 43)]
        assert model.memory.add(picture(), "noise").thumbnail == b""
        with pytest.raises(InputError, match="give the picture"):
            model.memory.add(model.encode(picture()), "noise", thumbnail=True)
