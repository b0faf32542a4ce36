"""Whether the memory of a whole model ends up helping it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tinyalign_edge.train.batches import Collate, Example, without_memory
from tinyalign_edge.train.model import AlignModel
from tinyalign_edge.train.settings import TrainSettings
from tinyalign_edge.train.watcher import held_out_loss

LEAST = 0.001  # nats an answer token: less is no harm, nor seen in the figures


def warn_of_harm(model: AlignModel, collate: Collate, examples: Sequence[Example], settings: TrainSettings) -> None:
    """Say on stderr if the held-out loss is higher with the memory than without it, which is the model's own."""
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
