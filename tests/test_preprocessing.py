"""Preprocessing equals the Hugging Face image processor of every encoder kind, bit for bit."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.conftest import shared

pytest.importorskip("transformers")
from tinyalign_edge.bench import preprocessing as bench

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers advises its processors for torchvision


def file(picture: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def drawn() -> list[bytes]:
    """Noise, where each rounding shows: upright, wide, long and thin, tiny, turned by EXIF, and in other modes."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (301, 217, 3), np.uint8))
    sizes = ((500, 90), (9, 700), (8, 5), (225, 223))
    pictures = [file(noise), *(file(noise.resize(size)) for size in sizes), bench.turned(noise)]
    return [
        *pictures,
        *(file(noise.convert(mode)) for mode in ("L", "RGBA", "P", "1")),
        file(noise.convert("CMYK"), "TIFF"),
    ]


@pytest.mark.parametrize("kind", bench.KINDS)
def test_drawn_pictures_are_the_same_bit_for_bit(kind: str) -> None:
    difference = bench.compare(kind, bench.KINDS[kind], drawn())
    assert (difference.equal, difference.largest_levels) == (1, 0)


@pytest.mark.parametrize("kind", bench.KINDS)
def test_photographs_are_the_same_bit_for_bit(kind: str) -> None:
    paths = [*sorted(shared("data", "caltech101", "images").glob("*.jpg"))[::1500]]
    paths += sorted(shared("data", "coco_cc", "images").glob("*.jpg"))[::44]
    difference = bench.compare(kind, bench.KINDS[kind], [path.read_bytes() for path in paths])
    assert (difference.equal, difference.largest_levels) == (1, 0)


def test_another_filter_shows() -> None:
    """The comparison sees what it is for."""
    other = bench.Kind("ViTImageProcessor", {"size": {"height": 64, "width": 64}, "resample": 3})
    settings = bench.read_settings
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "read_settings", lambda processor: replace(settings(processor), resample="bilinear"))
        difference = bench.compare("vit", other, drawn()[:1])
    assert difference.equal < 0.5
    assert difference.largest_levels > 1


def test_the_page_holds_every_kind_and_the_largest_difference() -> None:
    row = bench.Difference("siglip", "SiglipImageProcessor", 2, 100, 0.99, 0.5)
    text = bench.page([row], [(10, 20)])
    assert "| siglip | `SiglipImageProcessor` | 99.000% | 0.5 |" in text
    assert "edges from 10 to 20 pixels" in text
