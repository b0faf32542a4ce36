"""What is said of a finished run that could have gone better."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tinyalign_edge.train.batches import Collate, Example, without_memory
from tinyalign_edge.train.curves import lowest, read_points
from tinyalign_edge.train.model import AlignModel
from tinyalign_edge.train.settings import TrainSettings
from tinyalign_edge.train.watcher import held_out_loss

LEAST = 0.001  # nats an answer token: less is no harm, nor seen in the figures
RISEN = 0.1  # of the lowest loss: less is within what evaluations differ by


def warn_of_harm(model: AlignModel, collate: Collate, examples: Sequence[Example], settings: TrainSettings) -> None:
    """Say on stderr if the held-out loss is higher with the memory of a whole model than without it, which is the
    model's own."""
    if not examples:
        return
    own = held_out_loss(model, lambda some: without_memory(collate(some)), examples, settings)
    reminded = held_out_loss(model, collate, examples, settings)
    if reminded > own + LEAST:
        print(
            f"warning: the held-out loss is {reminded:.3f} with the memory and {own:.3f} without: the memory makes the "
            "model worse; train longer, with more data or a lower --learning-rate",
            file=sys.stderr,
        )


def note_overfitting(metrics: Path, steps: int) -> None:
    """Say on stderr if the held-out loss had been clearly lower than after `steps` (the copy term's own follow)."""
    points = read_points(metrics, "held_out_loss", until=steps)
    if not points:
        return
    (best_step, best), (last_step, last) = lowest(points), points[-1]
    if last > best * (1 + RISEN):
        print(
            f"note: the held-out loss was {best:.3f} after step {best_step} and {last:.3f} after step {last_step}: the "
            "training data are learnt by heart; more data, fewer --steps, --dropout or a higher --weight-decay may end "
            "lower",
            file=sys.stderr,
        )
