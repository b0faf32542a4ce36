"""Tiny whole vision-language models in Hugging Face format, saved with their processors."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    Gemma2Config,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from tests.towers import SIDE, _scale_up, _tokenizer
from tinyalign_edge.demo.texts import questions
from tinyalign_edge.demo.world import draw, make_scene

KINDS = ("llava-clip", "llava-siglip", "llava-gemma2", "idefics3", "smolvlm")
SPECIAL = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
PATCH = 8

# Messages as lists of parts, pictures before the text whatever their order, the assistant's words marked.
PARTS_TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for p in m['content'] if p['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for p in m['content'] if p['type'] == 'text' %}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ p['text'] + ' ' }}{% endgeneration %}"
    "{% else %}{{ p['text'] + ' ' }}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# Messages as text that holds the picture's token, a system prompt, the beginning-of-text token written out.
TEXT_TEMPLATE = (
    "{{ bos_token }}A chat. {% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'].strip() }} "
    "{% else %}ASSISTANT: {{ m['content'].strip() }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TILE_TEMPLATE = (
    "<s>{% for m in messages %}{{ m['role'] | capitalize }}"
    "{% if m['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}"
    "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}"
    "{% elif p['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def save_vlm(folder: Path, kind: str) -> None:
    """One of `KINDS`. It has seen the world for a second or two: it knows what it wants to say, from the picture."""
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    capped = {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 0.5, "head_dim": 16}  # they would show
    text = (partial(Gemma2Config, **capped) if kind == "llava-gemma2" else LlamaConfig)(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=kind == "idefics3",
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model, processor = (_llava if kind.startswith("llava") else _tiled)(kind, text, tokenizer)
    tower = model.model.vision_tower if kind.startswith("llava") else model.model.vision_model
    _scale_up(tower, 3.0)
    tower.requires_grad_(False)
    _see_world(model, processor, kind)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _see_world(model: Any, processor: Any, kind: str, *, steps: int = 80, batches: int = 4) -> None:
    rng = random.Random(0)
    end = "</s>" if kind.startswith("llava") else "<end_of_utterance>"
    prepared = []
    for _ in range(batches):
        texts, images = [], []
        for scene in (make_scene(rng) for _ in range(16)):
            question = questions(scene, rng)[0]
            texts.append(f"{prompt_text(processor, kind, question.text)} {question.answer}{end}")
            images.append([draw(scene)])
        batch = processor(images=images, text=texts, padding=True, return_tensors="pt", return_token_type_ids=False)
        ignored = (batch["attention_mask"] == 0) | (batch["input_ids"] == model.config.image_token_id)
        prepared.append((batch, batch["input_ids"].masked_fill(ignored, -100)))
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for step in range(steps):
        batch, labels = prepared[step % batches]
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def prompt_text(processor: Any, kind: str, question: str) -> str:
    """A question about a picture as the processor's chat template renders it."""
    content: Any = [{"type": "image"}, {"type": "text", "text": question}]
    if kind == "llava-siglip":
        content = f"<image>\n{question}"
    rendered = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return str(rendered)


def load_vlm(folder: Path, kind: str) -> Any:
    """The model by transformers' own class, for `generate`."""
    classes = {"idefics3": Idefics3ForConditionalGeneration, "smolvlm": SmolVLMForConditionalGeneration}
    return classes.get(kind, LlavaForConditionalGeneration).from_pretrained(folder, attn_implementation="eager").eval()


def load_processor(folder: Path, kind: str) -> Any:
    """The processor that `save_vlm` saved; one tile a picture. SmolVLM's own class needs packages for films."""
    return (LlavaProcessor if kind.startswith("llava") else Idefics3Processor).from_pretrained(folder)


def processor_inputs(processor: Any, kind: str, picture: Image.Image, question: str) -> Any:
    """What transformers would have the model read."""
    text = prompt_text(processor, kind, question)
    starts = text.startswith(processor.tokenizer.bos_token)
    options = {"add_special_tokens": not starts, "return_token_type_ids": False}
    return processor(images=[picture], text=text, return_tensors="pt", **options)


def _llava(kind: str, text: LlamaConfig, tokenizer: PreTrainedTokenizerFast) -> tuple[Any, Any]:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 2, "image_size": SIDE, "patch_size": PATCH}
    clip = kind in ("llava-clip", "llava-gemma2")
    config = LlavaConfig(
        CLIPVisionConfig(**sizes) if clip else SiglipVisionConfig(**sizes, vision_use_head=False),
        text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2 if clip else [-3, -1],
        vision_feature_select_strategy="default" if clip else "full",
    )
    size = {"height": SIDE, "width": SIDE}
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size) if clip else SiglipImageProcessor(size=size),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(clip),
        chat_template=PARTS_TEMPLATE if clip else TEXT_TEMPLATE,
    )
    return LlavaForConditionalGeneration(config), processor


def _tiled(kind: str, text: LlamaConfig, tokenizer: PreTrainedTokenizerFast) -> tuple[Any, Any]:
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 2 * SIDE, "patch_size": PATCH}
    config_class, model_class = {
        "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration),
        "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration),
    }[kind]
    config = config_class(
        vision_config=vision,
        text_config=text.to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    images = Idefics3ImageProcessor(
        size={"longest_edge": 96}, max_image_size={"longest_edge": 2 * SIDE}, do_image_splitting=False
    )
    patches = 2 * SIDE // PATCH
    processor = Idefics3Processor(images, tokenizer, image_seq_len=patches**2 // 4, chat_template=TILE_TEMPLATE)
    model = model_class(config)
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids("<end_of_utterance>"), 2]
    return model, processor
