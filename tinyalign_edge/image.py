"""Pictures from anywhere to `pixel_values`, the same code for training and on the device.

Follows the Hugging Face image processors (resize with Pillow on uint8, rescale, normalise), without them.
"""

from __future__ import annotations

import io
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from tinyalign_edge.bundle import ImageConfig
from tinyalign_edge.errors import InputError, UnsupportedError

ImageLike = str | Path | bytes | Image.Image | npt.NDArray[np.uint8]

MAX_FILE_BYTES = 64 * 2**20
MAX_PIXELS = 50_000_000
LARGEST_EDGE = 4096  # above it, Idefics3's processor resizes once more
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
CONVNEXT_UNCROPPED = 384  # from this side on, its processor does not crop
RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


def read_picture(image: ImageLike) -> bytes | npt.NDArray[np.uint8]:
    """What identifies a picture: the bytes of its file, or upright RGB pixels (height, width, 3) uint8.

    Raises:
        InputError: missing, over 64 MiB, no picture at all, an array of another kind, or a PIL picture that cannot be
            decoded.
    """
    if isinstance(image, np.ndarray):
        _check_array(image)
        return image
    if isinstance(image, Image.Image):
        return np.asarray(open_image(image))
    return _file_bytes(image)


def open_image(image: ImageLike, *, name: str | None = None) -> Image.Image:
    """Decode to an upright RGB picture: EXIF orientation applied, first frame of animations, alpha dropped.

    Args:
        image: a path, the bytes of a file, a PIL picture, or an array (height, width, 3) uint8.
        name: what messages call it; None: the path, where there is one.

    Raises:
        InputError: missing, truncated, not a picture, or over 64 MiB or 50 megapixels.
    """
    if isinstance(image, np.ndarray):
        _check_array(image)
        return Image.fromarray(image)
    name = name or ("image" if isinstance(image, bytes | Image.Image) else str(image))
    try:
        if isinstance(image, Image.Image):
            return _upright_rgb(image, name)
        with Image.open(io.BytesIO(_file_bytes(image)), formats=FORMATS) as opened:
            return _upright_rgb(opened, name)
    except UnidentifiedImageError:
        raise InputError(f"{name}: not a picture in a known format ({', '.join(FORMATS)})") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # a warning where warnings are errors
        raise InputError(f"{name}: more than the {MAX_PIXELS} pixels allowed; make it smaller") from None
    except (OSError, SyntaxError, ValueError, TypeError, EOFError, struct.error) as error:
        raise InputError(f"{name}: truncated or damaged picture ({error})") from None


def _check_array(image: npt.NDArray[Any]) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise InputError(f"image array: need (height, width, 3) uint8, got {image.shape} {image.dtype}")


def _file_bytes(image: str | Path | bytes) -> bytes:
    if not isinstance(image, str | Path | bytes):
        raise InputError(
            f"image: {type(image).__name__} is no picture; give a path, the bytes of a file, a PIL picture or an array"
        )
    if isinstance(image, bytes):
        if len(image) > MAX_FILE_BYTES:
            raise InputError(f"image: {len(image)} bytes, more than the {MAX_FILE_BYTES} allowed; make it smaller")
        return image
    path = Path(image)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(f"{path}: {path.stat().st_size} bytes, more than the {MAX_FILE_BYTES} allowed")
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such image file") from None
    except (OSError, ValueError) as error:  # ValueError: no file system takes such a name
        raise InputError(f"{str(path)!r:.200}: cannot be read ({getattr(error, 'strerror', error)})") from None


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(f"{name}: {width} x {height} pixels, more than the {MAX_PIXELS} allowed; make it smaller")
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "P" and isinstance(upright.info.get("transparency"), bytes):
        upright = upright.convert("RGBA")  # Pillow warns where it is converted at once
    return upright.convert("RGB")


def preprocess(image: Image.Image, config: ImageConfig) -> npt.NDArray[np.float32]:
    """An RGB picture to `pixel_values` (1, 3, height, width) float32."""
    resample = Image.Resampling(RESAMPLE[config.resample])
    if config.resize == "exact":
        image = image.resize((config.width, config.height), resample)
    elif config.resize == "shortest_edge":
        image = image.resize(_shortest_edge_size(image.size, config.resize_to), resample)
    elif config.resize == "longest_edge":
        image = image.resize(_longest_edge_size(image.size, config.resize_to), resample)
        image = image.resize((config.width, config.height), resample)
    if config.center_crop:
        image = _center_crop(image, config.width, config.height)
    if image.size != (config.width, config.height):
        raise InputError(
            f"image is {image.size[0]} x {image.size[1]}, the encoder takes {config.width} x {config.height}"
        )
    pixels = (np.asarray(image, np.float64) * config.rescale).astype(np.float32)  # (height, width, 3)
    mean, std = np.array(config.mean, np.float32), np.array(config.std, np.float32)
    return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1)[None], np.float32)


def _shortest_edge_size(size: tuple[int, int], shortest: int) -> tuple[int, int]:
    width, height = size
    longest = int(shortest * max(size) / min(size))
    if shortest * longest > MAX_PIXELS:
        raise InputError(f"image: {width} x {height} pixels is too long and thin for this encoder; crop it")
    return (shortest, longest) if width <= height else (longest, shortest)


def _longest_edge_size(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """The other edge keeps the ratio, rounded down and then up to an even number."""
    width, height = size
    ratio = width / height
    other = int(longest / ratio) if width >= height else int(longest * ratio)
    other = max(other + other % 2, 1)
    return (longest, other) if width >= height else (other, longest)


def _center_crop(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def image_config(processor: dict[str, Any]) -> ImageConfig:
    """Read the settings of a Hugging Face image processor, its `to_dict()`.

    Raises:
        UnsupportedError: a kind of resizing or padding that `preprocess` does not do.
    """
    size = processor.get("size") or {}
    crop = processor.get("crop_size") or {}
    if processor.get("do_pad"):
        raise UnsupportedError(
            "image processor: do_pad is not supported; known: resize, center crop, rescale, normalise"
        )
    do_resize, do_crop = processor.get("do_resize", True), bool(processor.get("do_center_crop", False))
    resize: Literal["exact", "shortest_edge", "none"]
    if str(processor.get("image_processor_type")).startswith("ConvNext"):
        size, crop = _convnext_sizes(size["shortest_edge"], processor["crop_pct"])
        do_crop = bool(crop)
    if "shortest_edge" in size:
        resize, side = "shortest_edge", size["shortest_edge"]
        target = {"height": side, "width": side}
        if not do_crop:
            raise UnsupportedError("image processor: shortest_edge without center crop gives pictures of many sizes")
    elif {"height", "width"} <= set(size):
        resize, target, side = "exact", size, 0
    else:
        raise UnsupportedError(
            f"image processor: size {size!r} is not supported; known: height and width, shortest_edge"
        )
    target = crop if do_crop else target
    return ImageConfig(
        height=int(target["height"]),
        width=int(target["width"]),
        resize=resize if do_resize else "none",
        resize_to=int(side),
        center_crop=do_crop,
        **_resample_and_norm(processor, resample=2),
    )


def _convnext_sizes(side: int, share: float) -> tuple[dict[str, int], dict[str, int]]:
    """`size` and `crop_size` of a ConvNeXT processor: small pictures lose their margin, large ones are squeezed."""
    square = {"height": side, "width": side}
    return (square, {}) if side >= CONVNEXT_UNCROPPED else ({"shortest_edge": int(side / share)}, square)


def resized(config: ImageConfig, side: int) -> ImageConfig:
    """The same preprocessing to `side` x `side` pixels; what is cropped away keeps its share.

    Raises:
        UnsupportedError: a processor that does not resize.
    """
    if (config.height, config.width) == (side, side):
        return config
    if config.resize == "none":
        raise UnsupportedError(
            f"image processor: takes {config.height} x {config.width} pixels as they come, not {side}"
        )
    shortest = round(config.resize_to * side / min(config.height, config.width))
    return replace(config, height=side, width=side, resize_to=shortest)


def tile_config(processor: dict[str, Any]) -> ImageConfig:
    """Read a `preprocessor_config.json` of Idefics3 or SmolVLM as one tile: `do_image_splitting` switched off.

    Raises:
        UnsupportedError: no resizing, or sizes that are not those of a longest edge.
    """
    size, tile = processor.get("size") or {}, processor.get("max_image_size") or {}
    side, edge = int(tile.get("longest_edge", 0)), int(size.get("longest_edge", 0))
    if not processor.get("do_resize", True) or not side or not 0 < edge <= LARGEST_EDGE:
        raise UnsupportedError(
            f"image processor: size {size!r} with max_image_size {tile!r} is not supported; known: longest_edge in "
            f"both, at most {LARGEST_EDGE}"
        )
    return ImageConfig(
        height=side,
        width=side,
        resize="longest_edge",
        resize_to=edge,
        **_resample_and_norm(processor, resample=1),
    )


def _resample_and_norm(processor: dict[str, Any], *, resample: int) -> dict[str, Any]:
    names = {code: name for name, code in RESAMPLE.items()}
    normalise = processor.get("do_normalize", True)
    return {
        "resample": names[int(processor.get("resample", resample))],
        "rescale": float(processor["rescale_factor"]) if processor.get("do_rescale", True) else 1.0,
        "mean": tuple(float(x) for x in processor["image_mean"]) if normalise else (0.0, 0.0, 0.0),
        "std": tuple(float(x) for x in processor["image_std"]) if normalise else (1.0, 1.0, 1.0),
    }
