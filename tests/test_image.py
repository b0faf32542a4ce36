"""Pictures: opened within bounds, and preprocessed as the Hugging Face processors do."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tinyalign_edge.bundle import ImageConfig
from tinyalign_edge.errors import InputError, UnsupportedError
from tinyalign_edge.image import image_config, open_image, preprocess, resized


def png(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def noise(width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def test_path_bytes_picture_and_array_are_the_same_picture(tmp_path: Path) -> None:
    image = noise()
    image.save(tmp_path / "a.png")
    forms = [tmp_path / "a.png", str(tmp_path / "a.png"), png(image), image, np.asarray(image)]
    assert len({open_image(form).tobytes() for form in forms}) == 1


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    assert open_image(png(noise(40, 30), exif=exif)).size == (30, 40)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "I;16"])
def test_every_colour_mode_becomes_rgb(mode: str) -> None:
    image = Image.new(mode, (8, 8)) if mode == "I;16" else noise(8, 8).convert(mode)
    assert open_image(image).mode == "RGB"


def test_a_palette_with_transparency_is_read_without_a_warning() -> None:
    image, buffer = Image.new("P", (2, 2), 1), io.BytesIO()
    image.putpalette([0, 0, 0, 9, 99, 199])
    image.save(buffer, "PNG", transparency=bytes([255, 7]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(buffer.getvalue()).getpixel((1, 1)) == (9, 99, 199)


def test_of_an_animation_the_first_frame_is_taken_and_transparency_is_dropped() -> None:
    frames, buffer = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime")], io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    assert open_image(buffer.getvalue()).getpixel((0, 0)) == (255, 0, 0)
    assert open_image(png(Image.new("RGBA", (2, 2), (9, 99, 199, 0)))).getpixel((1, 1)) == (9, 99, 199)


def test_pictures_of_one_pixel_and_long_thin_ones_are_squeezed() -> None:
    config = ImageConfig(8, 8, "bicubic")
    assert preprocess(open_image(png(Image.new("L", (1, 1), 51))), config).max() == pytest.approx(0.2)
    assert preprocess(open_image(png(Image.new("L", (20_000, 1), 51))), config).shape == (1, 3, 8, 8)


def test_what_is_not_a_picture_is_refused(tmp_path: Path) -> None:
    whole = png(noise(200, 200))
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"half\.png: truncated or damaged"):
        open_image(tmp_path / "half.png")
    with pytest.raises(InputError, match="not a picture in a known format"):
        open_image(b"<svg></svg>")
    with pytest.raises(InputError, match="no such image file"):
        open_image(tmp_path / "gone.png")
    with pytest.raises(InputError, match=r"need .height, width, 3. uint8"):
        open_image(np.zeros((4, 4), np.uint8))


def test_too_many_pixels_are_refused_before_they_are_decoded() -> None:
    with pytest.raises(InputError, match="8000 x 8000 pixels, more than"):
        open_image(png(Image.new("1", (8000, 8000))))


def test_an_image_processor_this_package_cannot_follow_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="do_pad"):
        image_config({"do_pad": True, "size": {"height": 4, "width": 4}})
    with pytest.raises(UnsupportedError, match="many sizes"):
        image_config({"size": {"shortest_edge": 4}, "do_center_crop": False})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("side", [32, 400])
def test_convnext_pictures_lose_their_margin_unless_they_are_large(side: int) -> None:
    transformers = pytest.importorskip("transformers")
    processor = transformers.ConvNextImageProcessor(size={"shortest_edge": side})
    expected = processor(images=noise(90, 70), return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(preprocess(noise(90, 70), image_config(processor.to_dict())), expected)


def test_another_size_keeps_the_share_that_is_cropped_away() -> None:
    config = ImageConfig(224, 224, "bilinear", resize="shortest_edge", resize_to=256, center_crop=True)
    larger = resized(config, 448)
    assert (larger.height, larger.width, larger.resize_to) == (448, 448, 512)
    assert resized(config, 224) == config
    with pytest.raises(UnsupportedError, match="takes 8 x 8 pixels as they come, not 16"):
        resized(ImageConfig(8, 8, "bilinear", resize="none"), 16)


def test_a_long_thin_picture_is_refused_before_it_is_blown_up() -> None:
    config = ImageConfig(224, 224, "bilinear", resize="shortest_edge", resize_to=256, center_crop=True)
    with pytest.raises(InputError, match="too long and thin"):
        preprocess(Image.new("RGB", (1, 40_000)), config)


def test_a_damaged_pil_picture_is_our_error() -> None:
    whole = png(noise(200, 200))
    with Image.open(io.BytesIO(whole[: len(whole) // 2])) as half, pytest.raises(InputError, match="truncated"):
        open_image(half)
