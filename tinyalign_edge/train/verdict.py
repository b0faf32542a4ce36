"""What is said of a finished run that could have gone better."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tinyalign_edge.train.batches import Collate, Example, without_memory
from tinyalign_edge.train.curves import losses_in, lowest, read_evaluations
from tinyalign_edge.train.model import AlignModel
from tinyalign_edge.train.settings import TrainSettings
from tinyalign_edge.train.watcher import held_out_loss

LEAST = 0.001  # nats an answer token: less is no harm, nor seen in the figures
RISEN = 0.1  # of the lowest loss: less is within what evaluations differ by


def warn_of_harm(model: AlignModel, collate: Collate, examples: Sequence[Example], settings: TrainSettings) -> bool:
    """Say on stderr if the held-out loss is higher with the memory of a whole model than without it, which is the
    model's own; returns whether it is."""
    if not examples:
        return False
    own = held_out_loss(model, lambda some: without_memory(collate(some)), examples, settings)
    reminded = held_out_loss(model, collate, examples, settings)
    if reminded <= own + LEAST:
        return False
    print(
        f"warning: the held-out loss is {reminded:.3f} with the memory and {own:.3f} without: the memory makes the "
        "model worse; train longer, with more data or a lower --learning-rate",
        file=sys.stderr,
    )
    return True


def note_rise(metrics: Path, settings: TrainSettings, *, whole: bool) -> None:
    """Say on stderr if the held-out loss ends clearly above its lowest point, and what may help: the training loss
    tells data that are learnt by heart from a training that goes astray. The copy term's own steps are left out.

    Args:
        whole: the connector is a whole model's own and has no dropout.
    """
    evaluations = read_evaluations(metrics)
    held_out, trained = (losses_in(evaluations, name, until=settings.steps) for name in ("held_out_loss", "train_loss"))
    if not held_out:
        return
    (best_step, best), (last_step, last) = lowest(held_out), held_out[-1]
    if last <= best * (1 + RISEN) or last <= best + LEAST:
        return
    since = [loss for step, loss in trained if step >= best_step]
    if len(since) > 1 and since[-1] < since[0]:
        dropout = " or --dropout" if settings.stage == "align" and not whole else ""
        why = f"the training data are being learnt by heart; more of them, fewer steps{dropout} may end lower"
    else:
        rate = "--lm-learning-rate" if settings.stage == "instruct" else "--learning-rate"
        why = f"a lower {rate} may end lower"
    print(
        f"note: the held-out loss was {best:.3f} after step {best_step} and {last:.3f} after step {last_step}: {why}",
        file=sys.stderr,
    )
