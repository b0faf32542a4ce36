"""Checkpoints of the benchmarks: trained where they are missing, gone on with where they were killed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from tinyalign_edge.errors import InputError
from tinyalign_edge.files import file_sha256
from tinyalign_edge.train.checkpoint import METRICS, Checkpoint, is_checkpoint, load_checkpoint
from tinyalign_edge.train.curves import read_evaluations
from tinyalign_edge.train.options import TrainOptions, copying_steps, episodes_share, memory_from, memory_settings
from tinyalign_edge.train.run import train
from tinyalign_edge.train.settings import ConnectorSettings, MemorySettings, TrainSettings
from tinyalign_edge.train.state import STATE

SAME = ("steps", "batch_size", "learning_rate", "warmup", "weight_decay", "dropout", "bf16", "fraction", "seed",
        "reconstruct", "freeze_values", "random_values")  # fmt: skip
KNOWN_LATER = ("floor", "fingerprint", "copy_end")  # of a memory: the others of its settings have to be the same, too


def trained(
    folder: Path, *, data: Path, images: Path, vision: str, lm: str, options: TrainOptions, label: str
) -> Checkpoint:
    """The checkpoint in `folder`, trained if it is not there; `options` name its steps.

    Raises:
        InputError: it was trained with other settings.
    """
    if not is_checkpoint(folder):
        resume = (folder / STATE).exists()
        train(data=data, images=images, vision=vision, lm=lm, out=folder, options=options, resume=resume, label=label)
    checkpoint = load_checkpoint(folder)
    config = checkpoint.config
    differing = difference(options, config.training, config.memory, config.connector, whole=config.whole)
    data_sha256 = tuple(source.sha256 for source in config.training.data)
    if data_sha256 != (file_sha256(data),):
        differing = ("data", data_sha256, (file_sha256(data),))
    if differing is not None:
        name, found, wanted = differing
        raise InputError(f"{folder}: was trained with {name} {found}, not {wanted} as wanted here; remove it")
    return checkpoint


def difference(
    options: TrainOptions,
    training: TrainSettings,
    memory: MemorySettings,
    connector: ConnectorSettings,
    *,
    whole: bool = False,
) -> tuple[str, object, object] | None:
    """The first setting of a run that is another one than `options` make: its name, what it is and what they make."""
    made = memory_settings(options, connector, whole=whole)
    wanted = {f"memory.{name}": value for name, value in asdict(made).items() if name not in KNOWN_LATER}
    wanted |= {name: getattr(options, name) for name in SAME}
    wanted |= {"episodes": episodes_share(options, made), "memory_from": memory_from(options, whole=whole)}
    if training.copying_steps:
        wanted["copying_steps"] = copying_steps(training.steps)
    if not whole:
        wanted["connector.kind"] = options.connector
        wanted["connector.visual_tokens"] = options.visual_tokens or connector.visual_tokens
    found = {f"memory.{name}": value for name, value in asdict(memory).items()} | asdict(training)
    found |= {f"connector.{name}": value for name, value in asdict(connector).items()}
    return next(((name, found[name], value) for name, value in wanted.items() if found[name] != value), None)


def loss_curve(folder: Path) -> list[dict[str, Any]]:
    """The evaluations of the training in `folder`, without its speed, which is a matter of the machine."""
    points = read_evaluations(folder / METRICS)
    return [{name: value for name, value in point.items() if name != "tokens_per_second"} for point in points]
