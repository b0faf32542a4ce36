"""What can be said and asked about a scene: captions in several forms, and questions with their answers."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from itertools import product

from tinyalign_edge.demo.world import COLOURS, SHAPES, Scene

COUNTS = ("zero", "one", "two", "three")
NAMES = tuple(f"{colour} {shape}" for colour, shape in product(COLOURS, SHAPES))
RELATIONS = {"row": ("left of", "right of"), "column": ("above", "below")}
SIDES = {"row": ("on the left", "on the right"), "column": ("at the top", "at the bottom")}
FARTHER = {"row": ("farther left", "farther right"), "column": ("higher", "lower")}
ENDS = {"row": ("left", "right"), "column": ("top", "bottom")}


@dataclass(frozen=True)
class Question:
    """A question with its only right answer; `kind` is one of `KINDS_OF_QUESTION`."""

    text: str
    answer: str
    kind: str


KINDS_OF_QUESTION = ("count", "exists", "colour", "shape", "relation", "beside")


def caption(scene: Scene, rng: random.Random) -> str:
    """One English sentence that names every object with its size and the order they stand in."""
    things = [f"a {item.size} {item.name}" for item in scene.objects]
    return rng.choice((_one, _two, _three)[len(things) - 1](things, scene.axis)) + "."


def _one(things: list[str], axis: str) -> list[str]:
    (thing,) = things
    return [thing, f"there is {thing}", f"{thing} and nothing else"]


def _two(things: list[str], axis: str) -> list[str]:
    first, last = things
    before, _ = RELATIONS[axis]
    start, end = ENDS[axis]
    return [
        f"{first} {before} {last}",
        f"{first} {SIDES[axis][0]} and {last} {SIDES[axis][1]}",
        f"from {start} to {end}: {first} and {last}",
    ]


def _three(things: list[str], axis: str) -> list[str]:
    first, middle, last = things
    before, _ = RELATIONS[axis]
    start, end = ENDS[axis]
    return [
        f"{first} {before} {middle}, then {last}",
        f"{first} {SIDES[axis][0]}, then {middle} and {last}",
        f"from {start} to {end}: {first}, {middle} and {last}",
    ]


def questions(scene: Scene, rng: random.Random) -> list[Question]:
    """At most one question of each kind, in random order, each with exactly one right answer."""
    asked = [_count(scene, rng), _exists(scene, rng)]
    asked += _attribute(scene, rng)
    if len(scene.objects) > 1:
        asked += [_relation(scene, rng), _beside(scene, rng)]
    rng.shuffle(asked)
    return asked


def _count(scene: Scene, rng: random.Random) -> Question:
    text = rng.choice(("How many objects are there?", "How many objects are in the picture?"))
    return Question(text, COUNTS[len(scene.objects)], "count")


def _exists(scene: Scene, rng: random.Random) -> Question:
    """Yes half the time."""
    names = {item.name for item in scene.objects}
    absent = [name for name in NAMES if name not in names]
    told = rng.random() < 0.5
    name = rng.choice(scene.objects).name if told else rng.choice(absent)
    return Question(rng.choice((f"Is there a {name}?", f"Can you see a {name}?")), "yes" if told else "no", "exists")


def _attribute(scene: Scene, rng: random.Random) -> list[Question]:
    """The colour of an object whose shape is unique, and the shape of one whose colour is."""
    shapes = Counter(item.shape for item in scene.objects)
    colours = Counter(item.colour for item in scene.objects)
    by_shape = [item for item in scene.objects if shapes[item.shape] == 1]
    by_colour = [item for item in scene.objects if colours[item.colour] == 1]
    asked = []
    if by_shape:
        item = rng.choice(by_shape)
        asked.append(Question(f"What colour is the {item.shape}?", item.colour, "colour"))
    if by_colour:
        item = rng.choice(by_colour)
        asked.append(Question(f"What shape is the {item.colour} object?", item.shape, "shape"))
    return asked


def _relation(scene: Scene, rng: random.Random) -> Question:
    """Which of two objects stands farther to one end; the one named first half the time."""
    i, j = rng.sample(range(len(scene.objects)), 2)
    end = rng.randrange(2)
    winner = scene.objects[max(i, j) if end else min(i, j)]
    text = f"Which is {FARTHER[scene.axis][end]}, the {scene.objects[i].name} or the {scene.objects[j].name}?"
    return Question(text, winner.name, "relation")


def _beside(scene: Scene, rng: random.Random) -> Question:
    """The only object on one side of another."""
    step = rng.choice((1, -1))
    ordered = scene.objects[::step]
    before, after = RELATIONS[scene.axis]
    relation = before if step == 1 else after
    return Question(f"What is {relation} the {ordered[1].name}?", ordered[0].name, "beside")
