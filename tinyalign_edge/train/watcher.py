"""What is seen of a run while it goes: the bar, `metrics.jsonl`, TensorBoard."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from tinyalign_edge.train.batches import Collate, Example
from tinyalign_edge.train.model import AlignModel
from tinyalign_edge.train.settings import TrainSettings

BOARD = "tensorboard"


class Watcher(TrainerCallback):
    """Evaluates on the held-out examples, writes `metrics.jsonl`, moves the bar; in the first process only.

    TensorBoard's files are written beside `metrics`, where that package is installed.

    The training loss is that of the answers; that of the latents' own stands beside it where there is one.

    Args:
        before: steps that came before the loop's first one; the loss of rows with made-up names, which are trained
            after others, is not that of training and not noted in `metrics`.
    """

    def __init__(
        self,
        collate: Collate,
        held_out: Sequence[Example],
        settings: TrainSettings,
        metrics: Path,
        advance: Any,
        before: int,
    ) -> None:
        self.collate, self.held_out, self.settings = collate, held_out, settings
        self.metrics, self.advance, self.before = metrics, advance, before
        self.loss, self.own_loss, self.tokens_per_second = float("nan"), float("nan"), 0.0
        self.seen_tokens: Callable[[], int] = lambda: 0
        self.since = time.monotonic()
        self.board: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any = None, **_: Any) -> None:
        """Count the steps a resumed run has behind it; forget later lines of the interrupted one."""
        if not state.is_world_process_zero:
            return
        self.advance(state.global_step)
        step = self.before + state.global_step
        kept = _points(self.metrics, step) if step else []
        self.metrics.write_text("".join(line + "\n" for line in kept), "utf-8")
        self.board = _board(self.metrics.parent / BOARD, step + 1 if step else 0)
        self.since = time.monotonic()
        if step == 0:
            self._evaluate(0, model)

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any = None, **_: Any) -> None:
        """Move the bar. The last step is logged, whatever the interval."""
        self.advance()
        control.should_log |= state.global_step >= state.max_steps

    def on_log(self, args: Any, state: Any, control: Any, *, logs: Any = None, model: Any = None, **_: Any) -> None:
        """Note the training losses and the speed; evaluate when it is time, before the step's state is written."""
        if "loss" not in (logs or {}) or not state.is_world_process_zero:
            return
        self.loss = float(logs["loss"])
        speed = self.tokens_per_second = self.seen_tokens() / max(time.monotonic() - self.since, 1e-9)
        own = ""
        if "own_loss" in logs:
            self.own_loss = float(logs["own_loss"])
            own = f"own loss {self.own_loss:.3f}, "
        self.advance(0, f"loss {self.loss:.3f}, {own}{speed:,.0f} tokens/s")
        self._show(state.global_step, train_loss=self.loss, tokens_per_second=speed, **_figures(logs))
        if state.global_step % self.settings.eval_every == 0 or state.global_step >= state.max_steps:
            self._evaluate(state.global_step, model)
        self.since = time.monotonic()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close what is open."""
        if self.board:
            self.board.close()

    def _evaluate(self, step: int, model: Any) -> None:
        loss = None
        if self.held_out:
            found = held_out_loss(model, self.collate, self.held_out, self.settings)
            self._show(step, held_out_loss=found)
            loss = _figure(found)
        known = not self.before
        point = {
            "step": self.before + step,
            "held_out_loss": loss,
            "train_loss": _figure(self.loss) if known else None,
            "tokens_per_second": round(self.tokens_per_second) if known and math.isfinite(self.loss) else None,
        }
        if self.settings.reconstruct:
            point["own_loss"] = _figure(self.own_loss) if known else None
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(point) + "\n")

    def _show(self, step: int, **figures: float) -> None:
        if self.board:
            for name, value in figures.items():
                self.board.add_scalar(name, value, self.before + step)


def held_out_loss(
    model: AlignModel,
    collate: Callable[[Sequence[Example]], dict[str, Any]],
    examples: Sequence[Example],
    settings: TrainSettings,
) -> float:
    """Mean negative log-likelihood an answer token, in nats, over all examples; as many at once as in training."""
    training = model.training
    device = next(model.parameters()).device
    model.eval()
    losses = []
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
        for start in range(0, len(examples), settings.micro_batch):
            batch = to_device(collate(examples[start : start + settings.micro_batch]), device)
            losses.append(model.answer_losses(**batch))
    model.train(training)
    return float(torch.cat(losses).mean())


def to_device(value: Any, device: torch.device) -> Any:
    """Move the tensors of a nested batch."""
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _figure(loss: float) -> float | None:
    """A loss as `metrics` keeps it: JSON knows no NaN."""
    return round(loss, 6) if math.isfinite(loss) else None


def _figures(logs: dict[str, Any]) -> dict[str, float]:
    return {name: float(logs[name]) for name in ("own_loss", "learning_rate", "grad_norm") if name in logs}


def _points(metrics: Path, last: int) -> list[str]:
    """The lines up to a step; a line that a kill cut short is left out."""
    kept = []
    for line in metrics.read_text("utf-8").splitlines() if metrics.exists() else ():
        try:
            if json.loads(line)["step"] <= last:
                kept.append(line)
        except ValueError:
            continue
    return kept


def _board(folder: Path, purge: int) -> Any:
    """A writer of TensorBoard's files, which forgets those of steps from `purge` on; None without the package."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=purge)
