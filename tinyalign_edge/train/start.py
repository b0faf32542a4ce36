"""Where a run begins: at two frozen towers (stage "align"), or at an aligned checkpoint (stage "instruct")."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from tinyalign_edge.prompt import Prompt
from tinyalign_edge.train.checkpoint import load_checkpoint
from tinyalign_edge.train.lora import add_adapters
from tinyalign_edge.train.model import AlignModel
from tinyalign_edge.train.options import TrainOptions, connector_settings, memory_settings
from tinyalign_edge.train.settings import ConnectorSettings, MemorySettings
from tinyalign_edge.train.towers import LanguageTower, VisionTower, image_settings, load_language, load_vision


@dataclass(frozen=True)
class Start:
    """Towers, and the model as it is before the first step.

    Attributes:
        fitted: the key's projection is known and stays.
        merge: to be called after the last step: adapters become part of the weights.
    """

    vision: VisionTower
    language: LanguageTower
    prompt: Prompt
    connector: ConnectorSettings
    memory: MemorySettings
    model: AlignModel
    fitted: bool = False
    merge: Callable[[], None] = lambda: None


def start_align(vision: str, lm: str, options: TrainOptions) -> Start:
    """New connectors between two towers, which stay frozen.

    Raises:
        InputError: as `load_vision` and `load_language`.
    """
    eye = load_vision(vision, image=image_settings(vision, options.image_size))
    tongue = load_language(lm)
    connector = connector_settings(options, eye.grid, tongue.model.config.hidden_size)
    memory = memory_settings(options, connector)
    model = AlignModel(tongue.model, connector, memory)
    if options.bf16:
        tongue.model.to(torch.bfloat16)  # it is only read: half the memory, and autocast would round it anyway
    prompt = Prompt(tongue.prompt, Tokenizer.from_str(tongue.tokenizer_json))
    return Start(eye, tongue, prompt, connector, memory, model)


def start_instruct(checkpoint: Path, options: TrainOptions) -> Start:
    """The parts of a checkpoint, its language model free to train; connector and memory are as they were made.

    Raises:
        InputError, BundleError: as `load_checkpoint`.
        MissingExtraError: adapters are wanted and peft is not installed.
    """
    begun = load_checkpoint(checkpoint)
    config, language = begun.config, begun.language.model
    parts = begun.vision, begun.language, begun.prompt, config.connector, config.memory, begun.model
    if options.lora_rank:
        alpha = options.lora_alpha or 2 * options.lora_rank
        return Start(*parts, fitted=True, merge=add_adapters(language, rank=options.lora_rank, alpha=alpha))
    language.requires_grad_(True)
    return Start(*parts, fitted=True)
