"""The training loop: transformers' Trainer over the parts that train, with states that a killed run goes on from."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from tinyalign_edge.errors import TinyAlignError
from tinyalign_edge.progress import progress
from tinyalign_edge.train.batches import Collate, Example, Rows, without_memory
from tinyalign_edge.train.loaders import FORK, told_of
from tinyalign_edge.train.model import AlignModel
from tinyalign_edge.train.out_of_memory import out_of_memory
from tinyalign_edge.train.processes import Processes
from tinyalign_edge.train.settings import TrainSettings
from tinyalign_edge.train.watcher import Watcher

STATE_WEIGHTS = "trained.safetensors"
WHOLE = "whole"  # a file that says that all others beside it are written
LANGUAGE_PREFIX = "language."
PRECISION = "ACCELERATE_MIXED_PRECISION"


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
    processes: Processes,
    less: str,
    loaders: int = 0,
    before: int = 0,
) -> None:
    """Train what is not frozen; keeps resumable state in `state` and appends evaluations to `metrics`.

    Args:
        less: what takes less memory in the steps of a new run.
        loaders: processes that make batches ready, beside each that trains.
        before: steps that came before these, in a loop of their own.

    Raises:
        TinyAlignError: the loss is no longer finite, or there is not memory enough; the state can be resumed.
    """
    last = last_whole(state) if resume else None
    if last is not None and _step(last) >= settings.steps:  # the Trainer would make one step more
        load_trained(model, last)
        return
    with ExitStack() as stack:
        stack.enter_context(
            out_of_memory(f"with {settings.micro_batch} rows at once", _less_at_once(settings, processes, less))
        )
        stack.enter_context(told_of(loaders))
        stack.enter_context(_own_precision())
        arguments = _arguments(settings, state, processes, loaders)
        advance = stack.enter_context(progress(label, settings.steps, shown=processes.first))
        watcher = Watcher(collate, held_out, settings, metrics, advance, before)
        trainer = AlignTrainer(
            model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[watcher]
        )
        trainer.lm_learning_rate = settings.lm_learning_rate
        trainer.memory_from = min(settings.steps - 1, round(settings.memory_from * settings.steps))
        trainer.before = before
        trainer.own_losses = {}
        watcher.seen_tokens = trainer.take_tokens
        trainer.remove_callback(PrinterCallback)
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
        warnings.filterwarnings("ignore", message="mtime may not be reliable")  # states are ordered by their steps then
        trainer.train(resume_from_checkpoint=None if last is None else str(last))


def _arguments(settings: TrainSettings, state: Path, processes: Processes, loaders: int) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(state),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.micro_batch,
        gradient_accumulation_steps=settings.batch_size // (settings.micro_batch * processes.count),
        average_tokens_across_devices=True,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_ratio=settings.warmup,
        weight_decay=settings.weight_decay,
        max_grad_norm=1.0,
        seed=settings.seed,
        use_cpu=settings.device == "cpu",
        bf16=settings.bf16,
        logging_steps=math.gcd(10, settings.eval_every),
        logging_nan_inf_filter=False,
        save_steps=settings.eval_every * max(1, settings.steps // (10 * settings.eval_every)),
        save_total_limit=1,
        disable_tqdm=True,
        report_to=[],
        remove_unused_columns=False,
        ddp_find_unused_parameters=True,  # a batch without memories leaves the memory connector out
        dataloader_pin_memory=settings.device != "cpu",
        dataloader_num_workers=loaders,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # DataParallel would split a batch's memory at the wrong rows
    return arguments


class AlignTrainer(Trainer):
    """Saves and loads what trains only; the frozen language model is not written again and again."""

    lm_learning_rate = 0.0
    memory_from = 0  # the first step whose rows see their neighbours
    before = 0  # steps of loops that came before
    tokens = 0
    own_losses: dict[int, Any]  # of the latents, by step, since the last log

    def get_train_dataloader(self) -> Any:
        """The loader of the training rows. They are told each epoch before it begins, which accelerate leaves out where
        several processes train; the loader's own processes, if there are any, are forks made after that."""
        loader: Any = super().get_train_dataloader()
        rows: Any = self.train_dataset
        its_own = loader.set_epoch

        def set_epoch(epoch: int) -> None:
            its_own(epoch)
            rows.set_epoch(epoch)

        loader.set_epoch = set_epoch
        if loader.num_workers:
            loader.base_dataloader.multiprocessing_context = FORK
        return loader

    def create_optimizer(self) -> Any:
        """AdamW with a learning rate of its own for the language model, and no decay of norms and biases."""
        decaying = set(self.get_decay_parameter_names(self._own()))
        kinds: dict[tuple[bool, bool], list[Any]] = {}
        for name, weight in self._own().named_parameters():
            if weight.requires_grad:
                kinds.setdefault((name.startswith(LANGUAGE_PREFIX), name not in decaying), []).append(weight)
        groups = [
            {
                "params": weights,
                "weight_decay": 0.0 if plain else self.args.weight_decay,
                "lr": self.lm_learning_rate if language else self.args.learning_rate,
            }
            for (language, plain), weights in sorted(kinds.items())
        ]
        kind, options = self.get_optimizer_cls_and_kwargs(self.args)
        self.optimizer = kind(groups, **options)
        return self.optimizer

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **options: Any) -> Any:
        """The loss of a pass.

        Raises:
            TinyAlignError: it is not finite.
        """
        step = self.state.global_step
        if step < self.memory_from:
            inputs = without_memory(inputs)
        self.tokens = self.tokens + (inputs["block"] >= 0).sum()
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **options)
        if not torch.isfinite(loss):
            raise self._not_finite(f"the loss is {loss.item()} at step {self.before + step + 1}")
        if self._own().reconstruct:
            own = outputs["own_loss"] * self.args.world_size  # as the loss is
            self.own_losses[step] = self.own_losses.get(step, 0) + own
        return loss

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Tell the loss of the answers and the latents' own one apart."""
        weight = self._own().reconstruct
        if weight and "loss" in logs:
            own = torch.stack(list(self.own_losses.values())).mean()
            logs["own_loss"] = float(self._nested_gather(own).mean())
            logs["loss"] -= weight * logs["own_loss"]
        self.own_losses.clear()
        super().log(logs, *args, **options)

    def _inner_training_loop(self, batch_size: Any = None, *args: Any, **options: Any) -> Any:
        # a resumed run would take the rows of a pass from the state, and with other passes to a step another batch
        return super()._inner_training_loop(self.args.train_batch_size, *args, **options)

    def take_tokens(self) -> int:
        """How many tokens were computed since this was last asked."""
        count, self.tokens = int(self.tokens) * int(self.args.world_size), 0
        return count

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.contiguous() for name, tensor in self._own().trained_state().items()}
        for name, tensor in state.items():
            if not tensor.isfinite().all():
                step = self.before + self.state.global_step
                raise self._not_finite(f"weight {name!r} is no longer finite at step {step}")
        save_file(state, folder / STATE_WEIGHTS)

    def _not_finite(self, what: str) -> TinyAlignError:
        """The error that ends a run, with what is kept of it."""
        state = Path(str(self.args.output_dir))
        kept = last_whole(state) or (last_whole(state.parent) if self.before else None)
        told = "the last good state is kept, but --resume takes no other rate" if kept else "no state is kept yet"
        tuned = self.lm_learning_rate and not self.before  # the copy term trains alone
        rates = "--learning-rate or --lm-learning-rate" if tuned else "--learning-rate"
        return TinyAlignError(f"{what}; {told}: train anew with a lower {rates} and another --out, or remove this one")

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # then the first process says that the state is whole

    def _rotate_checkpoints(self, *args: Any, **options: Any) -> None:
        (Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}" / WHOLE).touch()
        super()._rotate_checkpoints(*args, **options)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Read by way of the processor: transformers reads straight to each process's device, and torch knows none of
        the name "cpu:0"."""
        parts: dict[str, Any] = {OPTIMIZER_NAME: self.optimizer, SCHEDULER_NAME: self.lr_scheduler}
        if checkpoint is not None:
            for name, part in parts.items():
                part.load_state_dict(torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained(self._own(), Path(resume_from_checkpoint))

    def _own(self) -> AlignModel:
        model: AlignModel = self.accelerator.unwrap_model(self.model)
        return model


def load_trained(model: AlignModel, folder: Path) -> None:
    """Take the weights of a state.

    Raises:
        TinyAlignError: they are of another model.
    """
    state = load_file(folder / STATE_WEIGHTS)
    if other := state.keys() ^ model.trained_state().keys():
        raise TinyAlignError(f"{folder}: weight {min(other)!r} is not of this run; train again")
    model.load_state_dict(state, strict=False)


def last_whole(state: Path) -> Path | None:
    """The newest state that was written to its end; None where there is none."""
    return max((path.parent for path in state.glob(f"checkpoint-*/{WHOLE}")), key=_step, default=None)


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


@contextmanager
def _own_precision() -> Iterator[None]:
    """transformers leaves a run's precision in the environment and takes it from there where a run has none of its own:
    every run that follows one in bf16 would be in bf16, too."""
    before = os.environ.pop(PRECISION, None)
    try:
        yield
    finally:
        os.environ.pop(PRECISION, None)
        if before is not None:
            os.environ[PRECISION] = before


def _less_at_once(settings: TrainSettings, processes: Processes, less: str) -> str:
    share = settings.batch_size // processes.count
    smaller = max((rows for rows in range(1, settings.micro_batch // 2 + 1) if share % rows == 0), default=None)
    if smaller is None:
        return f"in a new run use {less}"
    drops = settings.dropout or settings.lora_rank  # what is dropped depends on the passes
    same = "goes on" if drops else "gives the same results"
    return f"--resume --micro-batch {smaller} {same} in less (in a new run: {less})"
