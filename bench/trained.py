"""Checkpoints of the benchmarks: trained where they are missing, gone on with where they were killed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tinyalign_edge.errors import InputError
from tinyalign_edge.files import file_sha256
from tinyalign_edge.train.checkpoint import METRICS, Checkpoint, is_checkpoint, load_checkpoint
from tinyalign_edge.train.options import TrainOptions, copying_steps, episodes_share, memory_from, memory_settings
from tinyalign_edge.train.run import train
from tinyalign_edge.train.state import STATE

SAME = ("steps", "batch_size", "learning_rate", "warmup", "weight_decay", "dropout", "bf16", "fraction", "seed")
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
    memory = memory_settings(options, config.connector)
    share = episodes_share(options, memory)
    wanted = {f"memory.{name}": value for name, value in asdict(memory).items() if name not in KNOWN_LATER}
    wanted |= {name: getattr(options, name) for name in SAME} | {"data": (file_sha256(data),)}
    wanted |= {"episodes": share, "memory_from": memory_from(options, whole=config.whole)}
    if config.training.copying_steps:
        wanted["copying_steps"] = copying_steps(config.training.steps)
    found = {f"memory.{name}": value for name, value in asdict(config.memory).items()} | asdict(config.training)
    found["data"] = tuple(source.sha256 for source in config.training.data)
    for name, value in wanted.items():
        if found[name] != value:
            raise InputError(f"{folder}: was trained with {name} {found[name]}, not {value} as wanted here; remove it")
    return checkpoint


def loss_curve(folder: Path) -> list[dict[str, Any]]:
    """The evaluations of the training in `folder`, without its speed, which is a matter of the machine."""
    points = [json.loads(line) for line in (folder / METRICS).read_text("utf-8").splitlines()]
    return [{name: value for name, value in point.items() if name != "tokens_per_second"} for point in points]
