"""Preprocessing beside the Hugging Face image processors, on photographs.

    python -m tinyalign_edge.bench.preprocessing

Writes `bench/results/preprocessing.json` and `docs/preprocessing.md`. Needs `TINYALIGN_SHARED`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import transformers
from PIL import Image
from transformers.image_utils import load_image

from tinyalign_edge.bench.record import RESULTS, record, shared
from tinyalign_edge.bundle import ImageConfig
from tinyalign_edge.export.card import markdown_table
from tinyalign_edge.image import image_config, open_image, preprocess, tile_config
from tinyalign_edge.progress import progress

COMMAND = "python -m tinyalign_edge.bench.preprocessing"
PAGE = RESULTS.parents[1] / "docs" / "preprocessing.md"
PHOTOGRAPHS = {"caltech101": 40, "coco_cc": 24}  # of each set
SHEET = (8, 6)  # photographs side by side in the large picture
CELL = (320, 320)
TURNED = 6  # EXIF: to be turned by 90 degrees
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


@dataclass(frozen=True)
class Kind:
    """How one encoder's pictures are made: transformers' class by name, and settings that differ from its own."""

    processor: str
    settings: dict[str, Any]


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def _cropped(shortest: int, side: int) -> dict[str, Any]:
    return {"size": {"shortest_edge": shortest}, "crop_size": _square(side), "do_center_crop": True}


def _tile(longest: int, side: int) -> dict[str, Any]:
    sizes = {"size": {"longest_edge": longest}, "max_image_size": {"longest_edge": side}}
    return {**sizes, "do_image_splitting": False}


KINDS = {
    "siglip, 224": Kind("SiglipImageProcessor", {"size": _square(224)}),
    "siglip, 384": Kind("SiglipImageProcessor", {"size": _square(384)}),
    "siglip 2, 256": Kind("SiglipImageProcessor", {"size": _square(256), "resample": Image.Resampling.BILINEAR}),
    "clip, 224": Kind("CLIPImageProcessor", _cropped(224, 224)),
    "clip, 336": Kind("CLIPImageProcessor", _cropped(336, 336)),
    "dinov2 (with registers too)": Kind("BitImageProcessor", {**_cropped(256, 224), **IMAGENET}),
    "vit": Kind("ViTImageProcessor", {"size": _square(224)}),
    "mobilenet_v2": Kind("MobileNetV2ImageProcessor", _cropped(256, 224)),
    "convnext, 224": Kind("ConvNextImageProcessor", {"size": {"shortest_edge": 224}, "crop_pct": 0.875, **IMAGENET}),
    "convnext, 384": Kind("ConvNextImageProcessor", {"size": {"shortest_edge": 384}, **IMAGENET}),
    "idefics3, one tile of 364": Kind("Idefics3ImageProcessor", _tile(1456, 364)),
    "smolvlm, one tile of 512": Kind("SmolVLMImageProcessor", _tile(2048, 512)),
}


@dataclass(frozen=True)
class Difference:
    """Of one kind, over all pictures.

    Attributes:
        values: numbers compared.
        equal: share of them that are the same bit for bit.
        largest_levels: largest difference, in steps of 1/255 of the range from black to white.
    """

    kind: str
    processor: str
    pictures: int
    values: int
    equal: float
    largest_levels: float


def main() -> None:
    """Compare, record, write the page."""
    pictures = list(photographs())
    rows = []
    with progress("Comparing kinds", len(KINDS)) as advance:
        for name, kind in KINDS.items():
            rows.append(compare(name, kind, pictures))
            advance()
    sizes = [open_image(picture).size for picture in pictures]
    result = {
        "sizes": sorted({f"{width} x {height}" for width, height in sizes}),
        "rows": [asdict(row) for row in rows],
    }
    print(record("preprocessing", COMMAND, result))
    PAGE.write_text(page(rows, sizes), "utf-8")


def photographs() -> Iterator[bytes]:
    """Files of pictures: photographs of many shapes, one of them turned by its EXIF, and a large sheet of them."""
    paths: list[Path] = []
    for folder, count in PHOTOGRAPHS.items():
        found = sorted(shared("data", folder, "images").glob("*.jpg"), key=_shape)
        paths += [found[i] for i in np.linspace(0, len(found) - 1, count).round().astype(int)]
    for path in paths:
        yield path.read_bytes()
    yield turned(open_image(paths[0]))
    sheet = Image.new("RGB", (SHEET[0] * CELL[0], SHEET[1] * CELL[1]))
    for i in range(SHEET[0] * SHEET[1]):
        at = (i % SHEET[0] * CELL[0], i // SHEET[0] * CELL[1])
        sheet.paste(open_image(paths[i]).resize(CELL), at)
    yield _jpeg(sheet)


def turned(picture: Image.Image) -> bytes:
    """A JPEG that its EXIF turns by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = TURNED
    return _jpeg(picture, exif=exif)


def compare(name: str, kind: Kind, pictures: Sequence[bytes]) -> Difference:
    """The largest difference to the processor's own `pixel_values`."""
    processor = getattr(transformers, kind.processor)(**kind.settings)
    config = read_settings(processor)
    values, equal, largest = 0, 0, 0.0
    for picture in pictures:
        expected = reference(processor, picture)
        found = preprocess(open_image(picture), config)[0]  # (3, height, width)
        if expected.shape != found.shape:
            raise AssertionError(f"{name}: {found.shape}, the processor gives {expected.shape}")
        std = np.array(config.std).reshape(3, 1, 1)
        levels = np.abs(found.astype(np.float64) - expected) * std / config.rescale
        values, equal = values + found.size, equal + int((found == expected).sum())
        largest = max(largest, float(levels.max()))
    return Difference(name, kind.processor, len(pictures), values, equal / values, largest)


def read_settings(processor: Any) -> ImageConfig:
    """What a bundle would hold of the processor's settings."""
    settings = processor.to_dict()
    return (tile_config if "max_image_size" in settings else image_config)(settings)


def reference(processor: Any, picture: bytes) -> npt.NDArray[np.float32]:
    """`pixel_values` (3, height, width) as transformers opens and prepares a picture."""
    opened = load_image(Image.open(io.BytesIO(picture)))
    found = np.asarray(processor(images=[opened], return_tensors="np")["pixel_values"])
    return found.reshape(found.shape[-3:])


def page(rows: Sequence[Difference], sizes: Sequence[tuple[int, int]]) -> str:
    """The page as Markdown."""
    edges = [edge for size in sizes for edge in size]
    lines = [
        (r.kind, f"`{r.processor}`", "all" if r.equal == 1 else f"{r.equal:.3%}", f"{r.largest_levels:.2g}")
        for r in rows
    ]
    return f"""# Preprocessing

Made by `{COMMAND}`; do not edit. The raw figures are in
[`bench/results/preprocessing.json`](../bench/results/preprocessing.json).

`pixel_values` as the runtime makes them, beside those of the encoder's own image processor in transformers, from the
same files: {len(sizes)} pictures with edges from {min(edges)} to {max(edges)} pixels, one of them turned by its EXIF.
The largest difference is in steps of 1/255 of the range from black to white; 0: the same bit for bit.

{markdown_table(("encoder", "processor", "equal values", "largest difference"), lines)}

The reference are the processors without "Fast" in their name, which resize with Pillow as the runtime does.
"""


def _shape(path: Path) -> tuple[float, str]:
    with Image.open(path) as opened:
        return opened.width / opened.height, path.name


def _jpeg(picture: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
