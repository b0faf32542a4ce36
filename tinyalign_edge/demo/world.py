"""The small world of the demo: scenes of one to three coloured shapes, drawn with Pillow.

The objects of a scene stand in a row or in a column and never overlap, so every relation between two of them is
plain to see. A scene is a value: the same scene always gives the same pixels, the same seed the same scenes.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

Axis = Literal["row", "column"]

AXES: tuple[Axis, ...] = ("row", "column")
SIDE = 96  # pixels, width and height of a picture
SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (214, 48, 49),
    "green": (46, 160, 67),
    "blue": (41, 98, 216),
    "yellow": (240, 190, 30),
}
RADII = {"small": 8, "large": 14}  # pixels
LATTICE = 6  # pixels between the places where an object may stand: few, to be learnt in a minute
STRAY = 12  # pixels, the most that an object of several stands off the middle line
KINDS = tuple(product(RADII, COLOURS, SHAPES))  # every (size, colour, shape)
COUNT_WEIGHTS = (3, 5, 2)  # of scenes with one, two and three objects
SMOOTHING = 4  # a picture is painted this many times larger, then reduced


@dataclass(frozen=True)
class Object:
    """One shape; `x` and `y` are its centre in pixels from the top left corner."""

    size: str
    colour: str
    shape: str
    x: int
    y: int

    @property
    def radius(self) -> int:
        """Pixels from the centre to the farthest border of its square box."""
        return RADII[self.size]

    @property
    def name(self) -> str:
        """Colour and shape, unique in its scene: "red circle"."""
        return f"{self.colour} {self.shape}"

    @property
    def kind(self) -> int:
        """Its index in `KINDS`."""
        return KINDS.index((self.size, self.colour, self.shape))


@dataclass(frozen=True)
class Scene:
    """Objects from left to right (`axis` "row") or from top to bottom ("column") on a tinted ground."""

    objects: tuple[Object, ...]
    axis: Axis
    tint: tuple[int, int, int] = (240, 240, 240)


def make_scenes(count: int, *, seed: int) -> list[Scene]:
    """`count` scenes; no two objects of one scene share both colour and shape."""
    rng = random.Random(seed)
    return [make_scene(rng) for _ in range(count)]


def make_scene(rng: random.Random, weights: tuple[int, int, int] = COUNT_WEIGHTS) -> Scene:
    """One scene with everything drawn from `rng`, its number of objects by `weights`."""
    (count,) = rng.choices((1, 2, 3), weights)
    axis = rng.choice(AXES)
    names = rng.sample([*product(COLOURS, SHAPES)], count)
    sizes = rng.choices([*RADII], k=count)
    objects = []
    for slot, ((colour, shape), size) in enumerate(zip(names, sizes, strict=True)):
        along, across = _place(rng, slot, count, RADII[size])
        x, y = (along, across) if axis == "row" else (across, along)
        objects.append(Object(size, colour, shape, x, y))
    tint = (rng.randint(226, 250), rng.randint(226, 250), rng.randint(226, 250))
    return Scene(tuple(objects), axis, tint)


def _place(rng: random.Random, slot: int, count: int, radius: int) -> tuple[int, int]:
    """A centre in slot number `slot` of `count`: (along the axis, across it), wider apart along than across."""
    width = SIDE / count
    along = _lattice(slot * width + radius, (slot + 1) * width - radius)
    across = _lattice(radius, SIDE - radius) if count == 1 else _lattice(SIDE / 2 - STRAY, SIDE / 2 + STRAY)
    return rng.choice(along), rng.choice(across)


def _lattice(low: float, high: float) -> range:
    return range(math.ceil(low / LATTICE) * LATTICE, math.floor(high) + 1, LATTICE)


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB picture of `SIDE` x `SIDE` pixels."""
    image = Image.new("RGB", (SIDE * SMOOTHING, SIDE * SMOOTHING), scene.tint)
    pen = ImageDraw.Draw(image)
    for item in scene.objects:
        _paint(pen, item, COLOURS[item.colour], SMOOTHING)
    return image.reduce(SMOOTHING)


def kind_map(scene: Scene, cells: int) -> np.ndarray:
    """What covers each of `cells` x `cells` patches: (cells, cells) int64, 0 for the ground, else 1 + kind.

    A patch belongs to an object that covers a fifth of it.
    """
    image = Image.new("L", (SIDE, SIDE), 0)
    pen = ImageDraw.Draw(image)
    for item in scene.objects:
        _paint(pen, item, 1 + item.kind, 1)
    patch = SIDE // cells
    pixels = np.asarray(image, np.int64).reshape(cells, patch, cells, patch).swapaxes(1, 2)
    ordered = np.sort(pixels.reshape(cells, cells, patch * patch), axis=-1)
    return ordered[..., patch * patch * 4 // 5]  # type: ignore[no-any-return]


def _paint(pen: ImageDraw.ImageDraw, item: Object, fill: int | tuple[int, int, int], scale: int) -> None:
    x, y, radius = item.x * scale, item.y * scale, item.radius * scale
    if item.shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        return
    pen.polygon([(x + radius * dx, y + radius * dy) for dx, dy in _corners(item.shape)], fill=fill)


def _corners(shape: str) -> list[tuple[float, float]]:
    """Corners of a shape within the square from -1 to 1, y downwards."""
    if shape == "square":
        return [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]
    if shape == "triangle":
        return [(0, -0.95), (1, 0.85), (-1, 0.85)]
    reach = [1.0 if i % 2 == 0 else 0.42 for i in range(10)]
    return [(r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5)) for i, r in enumerate(reach)]
