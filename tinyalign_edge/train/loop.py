"""The training loop: transformers' Trainer over the trained parts, with held-out evaluation and a progress bar."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from tinyalign_edge.errors import TinyAlignError
from tinyalign_edge.progress import progress
from tinyalign_edge.train.batches import Collate, Example, Rows
from tinyalign_edge.train.model import AlignModel
from tinyalign_edge.train.settings import TrainSettings

STATE_WEIGHTS = "trained.safetensors"
EVAL_BATCH = 64


def fit(
    model: AlignModel,
    rows: Rows,
    collate: Collate,
    held_out: Sequence[Example],
    settings: TrainSettings,
    *,
    state: Path,
    metrics: Path,
    resume: bool,
    label: str,
) -> None:
    """Train what is not frozen; keeps resumable state in `state` and appends evaluations to `metrics`.

    Raises:
        TinyAlignError: the loss is no longer finite.
    """
    arguments = TrainingArguments(
        output_dir=str(state),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_ratio=settings.warmup,
        weight_decay=0.01,
        max_grad_norm=1.0,
        seed=settings.seed,
        use_cpu=settings.device == "cpu",
        logging_steps=math.gcd(10, settings.eval_every),
        save_steps=max(settings.eval_every, settings.steps // 10),
        save_total_limit=1,
        disable_tqdm=True,
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=settings.device != "cpu",
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # DataParallel would split a batch's memory at the wrong rows
    with ExitStack() as stack:
        advance = stack.enter_context(progress(label, settings.steps))
        watcher = Watcher(collate, held_out, settings.eval_every, metrics, advance)
        trainer = AlignTrainer(
            model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[watcher]
        )
        trainer.remove_callback(PrinterCallback)
        last = get_last_checkpoint(str(state)) if resume and state.is_dir() else None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
            trainer.train(resume_from_checkpoint=last)


class AlignTrainer(Trainer):
    """Saves and loads the trained parts only; the frozen language model is not written again and again."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.contiguous() for name, tensor in self._own().own_state().items()}
        save_file(state, folder / STATE_WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._own().load_own_state(load_file(Path(resume_from_checkpoint) / STATE_WEIGHTS))

    def _own(self) -> AlignModel:
        model: AlignModel = self.accelerator.unwrap_model(self.model)
        return model


class Watcher(TrainerCallback):
    """Evaluates on the held-out examples, writes `metrics.jsonl`, moves the bar, stops at a loss that is not finite."""

    def __init__(self, collate: Collate, held_out: Sequence[Example], every: int, metrics: Path, advance: Any) -> None:
        self.collate, self.held_out, self.every = collate, held_out, every
        self.metrics, self.advance = metrics, advance
        self.loss = float("nan")

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any = None, **_: Any) -> None:
        """Count the steps a resumed run has behind it; forget later lines of the interrupted one."""
        self.advance(state.global_step)
        kept = []
        if self.metrics.exists() and state.global_step:
            lines = self.metrics.read_text("utf-8").splitlines()
            kept = [line for line in lines if json.loads(line)["step"] <= state.global_step]
        self.metrics.write_text("".join(line + "\n" for line in kept), "utf-8")
        if state.global_step == 0:
            self._evaluate(0, model)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the bar."""
        self.advance(1, f"loss {self.loss:.3f}")

    def on_log(self, args: Any, state: Any, control: Any, *, logs: Any = None, model: Any = None, **_: Any) -> None:
        """Note the training loss; evaluate when it is time."""
        if "loss" not in (logs or {}):
            return
        self.loss = float(logs["loss"])
        if not math.isfinite(self.loss):
            raise TinyAlignError(f"the loss is {self.loss} at step {state.global_step}; lower the learning rate")
        if state.global_step % self.every == 0:
            self._evaluate(state.global_step, model)

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: Any = None, **_: Any) -> None:
        """Evaluate at the last step, whatever the interval."""
        if state.global_step % self.every:
            self._evaluate(state.global_step, model)

    def _evaluate(self, step: int, model: Any) -> None:
        if not self.held_out:
            return
        point = {
            "step": step,
            "held_out_loss": round(held_out_loss(model, self.collate, self.held_out), 6),
            "train_loss": round(self.loss, 6) if math.isfinite(self.loss) else None,
        }
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(point) + "\n")


def held_out_loss(model: AlignModel, collate: Collate, examples: Sequence[Example]) -> float:
    """Mean negative log-likelihood an answer token, in nats, over all examples."""
    training = model.training
    device = next(model.parameters()).device
    model.eval()
    losses = []
    with torch.inference_mode():
        for start in range(0, len(examples), EVAL_BATCH):
            batch = to_device(collate(examples[start : start + EVAL_BATCH]), device)
            losses.append(model.answer_losses(**batch))
    model.train(training)
    return float(torch.cat(losses).mean())


def to_device(value: Any, device: torch.device) -> Any:
    """Move the tensors of a nested batch."""
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    return value.to(device) if isinstance(value, torch.Tensor) else value
