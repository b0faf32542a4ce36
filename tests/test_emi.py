"""What picture and memory tell, of checkpoints and bundles alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from tinyalign_edge.data import Picture, Row, Turn
from tinyalign_edge.emi import emi, measure
from tinyalign_edge.errors import InputError
from tinyalign_edge.evaluate import Asked, MemoryMode


def row(image: str) -> Row:
    return Row(image, (Picture(image, Path(image)),), (Turn("?", image),), None, image)


class Knowing:
    """Loses 1 nat a token where picture or memory help, 2 where another picture misleads, 4 where nothing helps."""

    has_memory = True

    def reference_losses(self, rows: Sequence[Row], *, memory: MemoryMode = "own") -> Iterator[tuple[float, int]]:
        for row in rows:
            right = row.image == row.turns[0].answer
            yield 2.0 * {"own": 1.0, "shuffled": 5.0, "none": 2.0 if right else 4.0}[memory], 2

    def ask_all(self, rows: Sequence[Row], *, memory: MemoryMode = "own") -> Iterator[Asked]:
        raise AssertionError("nothing is answered")


def test_information_is_the_loss_that_goes_with_it() -> None:
    found = measure(Knowing(), [row("a"), row("b"), row("c")])
    assert (found.n, found.tokens, found.image, found.memory, found.shuffled_memory) == (3, 6, 2.0, 1.0, -3.0)


def test_one_picture_cannot_be_exchanged() -> None:
    with pytest.raises(InputError, match="one picture"):
        measure(Knowing(), [row("a"), row("a")])


def test_a_bundle_tells_as_much_as_its_checkpoint(
    world: Path, checkpoints: dict[str, Path], bundles: dict[str, Path]
) -> None:
    torch, int8 = (emi(made["tokens"], data=world / "test.json", images=world) for made in (checkpoints, bundles))
    assert (torch.n, torch.tokens) == (int8.n, int8.tokens)
    for name in ("image", "memory", "shuffled_memory"):
        assert np.isclose(getattr(torch, name), getattr(int8, name), atol=0.05)


def test_without_a_memory_there_is_the_picture_alone(world: Path, checkpoints: dict[str, Path]) -> None:
    found = emi(checkpoints["none"], data=world / "test.json", images=world, limit=6)
    assert found.memory is None and found.nll_shuffled_memory is None
    assert found.image == pytest.approx(found.nll_other_image - found.nll_image)
