"""Tiny random towers in Hugging Face format, and a training run of a few steps on them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MobileNetV2Config,
    MobileNetV2ImageProcessor,
    MobileNetV2Model,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tinyalign_edge.demo.texts import caption, questions
from tinyalign_edge.demo.world import make_scene

SIDE = 32


def save_vit(folder: Path) -> None:
    """A SigLIP tower of 16 patches."""
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=8
    )
    config.vision_use_head = False
    model = SiglipVisionModel(config)
    _scale_up(model, 3.0)
    model.save_pretrained(folder)
    SiglipImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)


def save_cnn(folder: Path) -> None:
    """A MobileNetV2 with a 1 x 1 grid of features."""
    torch.manual_seed(0)
    config = MobileNetV2Config(image_size=SIDE, depth_multiplier=0.35, finegrained_output=False)
    model = MobileNetV2Model(config)
    for weights in model.parameters():
        if weights.ndim == 4:
            torch.nn.init.kaiming_normal_(weights)  # as it is made at random, its features vanish
    model.save_pretrained(folder)
    processor = MobileNetV2ImageProcessor(size={"height": SIDE, "width": SIDE}, do_center_crop=False)
    processor.save_pretrained(folder)


def save_lm(folder: Path, model_type: str = "llama", *, steps: int = 200, **changes: Any) -> None:
    """A language model of two layers with a byte-level tokenizer of 300 tokens that puts <s> first.

    It has read the world's texts for a second or two: next to a random model, whose likeliest token is a matter of
    rounding, it knows what it wants to say.
    """
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**settings, **changes}))
    _read_texts(model, tokenizer, steps)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_tiny(
    world: Path,
    towers: Path,
    out: Path,
    *,
    vision: str = "vit",
    lm: str = "lm",
    data: Path | None = None,
    resume: bool = False,
    **options: Any,
) -> Path:
    """Train for a few steps and return the checkpoint's folder."""
    from tinyalign_edge.train.options import TrainOptions
    from tinyalign_edge.train.run import train

    chosen = {"steps": 4, "batch_size": 8, "visual_tokens": 4, "eval_every": 2, "device": "cpu", **options}
    train(
        data=data or world / "train.json",
        images=world,
        vision=str(towers / vision),
        lm=str(towers / lm),
        out=out,
        options=TrainOptions(**chosen),
        resume=resume,
    )
    return out


def _scale_up(model: torch.nn.Module, factor: float) -> None:
    """Fresh weights are so small that every output is the same; these are not."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "position" not in name:
                weight.mul_(factor)


def _read_texts(model: Any, tokenizer: PreTrainedTokenizerFast, steps: int) -> None:
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        lines = []
        for scene in (make_scene(rng) for _ in range(16)):
            question = questions(scene, rng)[0]
            lines.append(f"{caption(scene, rng)} Question: {question.text} Answer: {question.answer}</s>")
        batch = tokenizer(lines, padding=True, return_tensors="pt", return_token_type_ids=False)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["Question: What colour is the red circle? Answer: yes no one two three"] * 4, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
