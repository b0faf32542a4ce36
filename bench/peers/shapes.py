"""The measured shapes, from the models' public configurations, and checkpoints of random weights in them.

Speed does not depend on the values of weights; whether an engine computes the right thing can be seen with random
ones too, if the next-token distributions are neither flat nor a copy of the last token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tinyalign_edge.bench.peers.check import REFERENCE, check_ids, checked_positions

LOGITS_DEVIATION = 3.0  # nats: standard deviation of the logits of random weights


@dataclass(frozen=True)
class LanguageShape:
    """A causal language model. `rounds` is how often each phase is measured with 1 and with 2 threads.

    resident: all engines are loaded at the same time; otherwise one after another, once a round.
    """

    config: dict[str, Any]
    rounds: dict[int, int]
    resident: bool = True


@dataclass(frozen=True)
class EncoderShape:
    """A vision encoder; `rounds` as for `LanguageShape`."""

    model: Callable[..., nn.Module]
    config: dict[str, Any]
    rounds: dict[int, int]


LANGUAGE = {
    "smollm2-135m": LanguageShape(
        {
            "model_type": "llama",
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "rope_theta": 100000.0,
            "tie_word_embeddings": True,
        },
        rounds={1: 3, 2: 5},
    ),
    "qwen2.5-0.5b": LanguageShape(
        {
            "model_type": "qwen2",
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": True,
        },
        rounds={1: 2, 2: 3},
    ),
    "tinyllama-1.1b": LanguageShape(
        {
            "model_type": "llama",
            "vocab_size": 32000,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 22,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "max_position_embeddings": 2048,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
        },
        rounds={2: 1},
        resident=False,
    ),
    "smoke-lm": LanguageShape(  # for tests of the benchmark itself
        {
            "model_type": "llama",
            "vocab_size": 320,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
        },
        rounds={1: 2, 2: 2},
    ),
}

SIGLIP = {"vision_use_head": False}
ENCODERS = {
    "siglip-b16-224": EncoderShape(
        lambda **c: SiglipVisionModel(SiglipVisionConfig(**c)),
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
         "image_size": 224, "patch_size": 16, **SIGLIP},
        rounds={1: 7, 2: 15},
    ),
    "clip-b32": EncoderShape(
        lambda **c: CLIPVisionModel(CLIPVisionConfig(**c)),
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
         "image_size": 224, "patch_size": 32},
        rounds={1: 7, 2: 15},
    ),
    "siglip-so400m-384": EncoderShape(
        lambda **c: SiglipVisionModel(SiglipVisionConfig(**c)),
        {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
         "image_size": 384, "patch_size": 14, **SIGLIP},
        rounds={1: 2, 2: 3},
    ),
    "smoke-encoder": EncoderShape(
        lambda **c: SiglipVisionModel(SiglipVisionConfig(**c)),
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "image_size": 32, "patch_size": 8, **SIGLIP},
        rounds={1: 2, 2: 2},
    ),
}  # fmt: skip


def write_language(name: str, folder: Path) -> None:
    """Write the checkpoint, a small tokenizer and the logits that torch gives in float32 into `folder`."""
    settings = {**LANGUAGE[name].config, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "rms_norm_eps": 1e-5}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model: Any = AutoModelForCausalLM.from_config(config)
    model = model.float().eval()
    _fill_language(model)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    with torch.inference_mode():
        logits = model(torch.from_numpy(check_ids(config.vocab_size)).unsqueeze(0)).logits[0, checked_positions()]
    np.save(folder / REFERENCE, logits.numpy())


def write_encoder(name: str, folder: Path) -> None:
    """Write the checkpoint and its image processor into `folder`."""
    shape = ENCODERS[name]
    torch.manual_seed(0)
    model: Any = shape.model(**shape.config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2 and len(weight) != (shape.config["image_size"] // shape.config["patch_size"]) ** 2:
                weight.normal_(std=weight.shape[1] ** -0.5)
    model.save_pretrained(folder)
    side = shape.config["image_size"]
    kind = CLIPImageProcessor if isinstance(model, CLIPVisionModel) else SiglipImageProcessor
    size = {"shortest_edge": side} if kind is CLIPImageProcessor else {"height": side, "width": side}
    kind(size=size).save_pretrained(folder)


def _fill_language(model: nn.Module) -> None:
    """Random weights whose logits have the deviation `LOGITS_DEVIATION`.

    Products keep the scale of their input; the layers' sum outweighs the embedding by sqrt(D), so that a tied head
    does not just find the last token again; biases are of the size of what they are added to.
    """
    config: Any = model.config
    spread = LOGITS_DEVIATION / math.sqrt(config.hidden_size)
    update = LOGITS_DEVIATION / math.sqrt(2 * config.num_hidden_layers)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.fill_(1)
            elif "embed_tokens" in name or "lm_head" in name:
                weight.normal_(std=spread, generator=generator)
            elif weight.ndim == 1:
                weight.normal_(std=0.5, generator=generator)
            else:
                gain = update if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                weight.normal_(std=gain * weight.shape[1] ** -0.5, generator=generator)


def _tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and three marks: some engines want a tokenizer to be there, none is given text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["a picture of a red circle"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
