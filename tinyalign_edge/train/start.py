"""Where a run begins: at two frozen towers or a whole model, or at an aligned checkpoint (stage "instruct")."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from tinyalign_edge.errors import InputError, UnsupportedError
from tinyalign_edge.prompt import Prompt
from tinyalign_edge.train.checkpoint import load_checkpoint
from tinyalign_edge.train.lora import add_adapters
from tinyalign_edge.train.model import AlignModel
from tinyalign_edge.train.options import TrainOptions, connector_settings, memory_settings
from tinyalign_edge.train.settings import ConnectorSettings, MemorySettings
from tinyalign_edge.train.towers import LanguageTower, VisionTower, image_settings, load_language, load_vision
from tinyalign_edge.train.vlm import load_vlm


@dataclass(frozen=True)
class Start:
    """Towers, and the model as it is before the first step.

    Attributes:
        fitted: the key's projection is known and stays.
        merge: to be called after the last step: adapters become part of the weights.
        whole: the towers are a whole model's, whose connector stays as it is.
    """

    vision: VisionTower
    language: LanguageTower
    prompt: Prompt
    connector: ConnectorSettings
    memory: MemorySettings
    model: AlignModel
    fitted: bool = False
    merge: Callable[[], None] = lambda: None
    whole: bool = False

    def room(self, pictures: int) -> int:
        """How many tokens of text the context holds beside so many pictures and all memories."""
        seen = pictures * self.connector.visual_tokens
        return self.prompt.config.max_context_tokens - self.memory.max_memory_tokens - seen


def start_align(vision: str, lm: str, options: TrainOptions) -> Start:
    """New connectors between two towers, which stay frozen.

    Raises:
        InputError: as `load_vision` and `load_language`.
    """
    eye = load_vision(vision, image=image_settings(vision, options.image_size))
    tongue = load_language(lm)
    connector = connector_settings(options, eye.grid, tongue.model.config.hidden_size)
    prompt = Prompt(tongue.prompt, Tokenizer.from_str(tongue.tokenizer_json))
    memory = with_end(memory_settings(options, connector, whole=False), prompt)
    model = AlignModel(tongue.model, connector, memory, dropout=options.dropout)
    if options.bf16:
        round_weights(tongue.model)
    return Start(eye, tongue, prompt, connector, memory, model)


def start_whole(folder: Path, options: TrainOptions, *, template: str | None) -> Start:
    """A memory for a whole vision-language model, which stays as it is.

    Raises:
        InputError, UnsupportedError: as `load_vlm`; nothing is to be trained; or the prompt has no place that is the
            same for every question.
    """
    if options.memory == "none":
        raise InputError("--memory none: with --vlm only the memory is trained; use tokens, latents or hybrid")
    if options.visual_tokens or options.image_size:
        raise InputError("--visual-tokens and --image-size: with --vlm they are the model's own; leave them out")
    whole = load_vlm(folder, template=template)
    eye, tongue, connector = whole.vision, whole.language, whole.connector
    prompt = Prompt(tongue.prompt, Tokenizer.from_str(tongue.tokenizer_json))
    memory = with_end(memory_settings(options, connector, whole=True), prompt)
    model = AlignModel(tongue.model, connector, memory, projector=whole.projector)
    if options.bf16:
        round_weights(tongue.model)
    if prompt.question("a").before != prompt.question("b").before:
        raise UnsupportedError(
            f"{folder}: its chat template writes the question before the picture, where memories stand; give one that "
            "writes it after with --chat-template FILE"
        )
    return Start(eye, tongue, prompt, connector, memory, model, whole=True)


def with_end(memory: MemorySettings, prompt: Prompt) -> MemorySettings:
    """The settings, with the end of an answer among what a copy term copies."""
    return replace(memory, copy_end=prompt.answer("?", "a")[-1]) if memory.copy_dim else memory


def start_instruct(checkpoint: Path, options: TrainOptions) -> Start:
    """The parts of a checkpoint, its language model free to train; connector and memory are as they were made.

    Raises:
        InputError, BundleError: as `load_checkpoint`.
        MissingExtraError: adapters are wanted and peft is not installed.
    """
    begun = load_checkpoint(checkpoint)
    config, language = begun.config, begun.language.model
    parts = begun.vision, begun.language, begun.prompt, config.connector, config.memory, begun.model
    fixed: dict[str, Any] = {"fitted": True, "whole": config.whole}
    if options.lora_rank:
        alpha = options.lora_alpha or 2 * options.lora_rank
        return Start(*parts, **fixed, merge=add_adapters(language, rank=options.lora_rank, alpha=alpha))
    language.requires_grad_(True)
    return Start(*parts, **fixed)


def round_weights(frozen: nn.Module) -> None:
    """Keep weights that are only read in bfloat16: half the memory, and autocast would round them anyway.

    Buffers stay as they are: rotary frequencies with eight bits would turn distant positions by the wrong angle.
    """
    for weight in frozen.parameters():
        weight.data = weight.data.to(torch.bfloat16)
