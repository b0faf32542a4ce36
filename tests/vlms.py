"""Tiny whole vision-language models in Hugging Face format, saved with their processors."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from tests.towers import SIDE, _read_texts, _scale_up, _tokenizer

KINDS = ("llava-clip", "llava-siglip", "idefics3", "smolvlm")
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
    """One of `KINDS`. Its vision weights are so large that the picture shows, its language model has read texts."""
    torch.manual_seed(0)
    tokenizer, language = _language()
    text = LlamaConfig(**{**language.config.to_dict(), "tie_word_embeddings": kind == "idefics3"})
    model, processor = (_llava if kind.startswith("llava") else _tiled)(kind, text, tokenizer)
    parts = dict(model.model.named_children())
    body = parts.pop("language_model", None) or parts.pop("text_model")
    body.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    for part in parts.values():
        _scale_up(part, 4.0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


@functools.cache
def _language() -> tuple[PreTrainedTokenizerFast, LlamaForCausalLM]:
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    _read_texts(model, tokenizer)
    return tokenizer, model


def load_vlm(folder: Path, kind: str) -> Any:
    """The model by transformers' own class, for `generate`."""
    classes = {"idefics3": Idefics3ForConditionalGeneration, "smolvlm": SmolVLMForConditionalGeneration}
    return classes.get(kind, LlavaForConditionalGeneration).from_pretrained(folder).eval()


def load_processor(folder: Path, kind: str) -> Any:
    """The processor that `save_vlm` saved; one tile a picture. SmolVLM's own class needs packages for films."""
    return (LlavaProcessor if kind.startswith("llava") else Idefics3Processor).from_pretrained(folder)


def processor_inputs(processor: Any, kind: str, picture: Image.Image, question: str) -> Any:
    """What transformers would have the model read."""
    content: Any = [{"type": "image"}, {"type": "text", "text": question}]
    if kind == "llava-siglip":
        content = f"<image>\n{question}"
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    starts = text.startswith(processor.tokenizer.bos_token)
    return processor(images=[picture], text=text, return_tensors="pt", add_special_tokens=not starts)


def _llava(kind: str, text: LlamaConfig, tokenizer: PreTrainedTokenizerFast) -> tuple[Any, Any]:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 2, "image_size": SIDE, "patch_size": PATCH}
    clip = kind == "llava-clip"
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
