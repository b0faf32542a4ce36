"""A whole vision-language model in Hugging Face format, taken apart into towers and the connector between them.

Taken are LLaVA (CLIP or SigLIP, a projector, a language model) and Idefics3 / SmolVLM, these with one tile a picture.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Idefics3ForConditionalGeneration,
    LlavaForConditionalGeneration,
    SmolVLMForConditionalGeneration,
)
from transformers.image_processing_utils import get_size_dict

from tinyalign_edge.bundle import ImageConfig
from tinyalign_edge.config import read_json
from tinyalign_edge.errors import InputError, UnsupportedError, first_line
from tinyalign_edge.image import image_config, tile_config
from tinyalign_edge.train.model import body_name
from tinyalign_edge.train.pretrained import attention_options, load_model, load_pretrained, tower_ref
from tinyalign_edge.train.settings import ConnectorSettings
from tinyalign_edge.train.towers import LanguageTower, VisionTower
from tinyalign_edge.train.vlm_eye import Idefics3Eye, LlavaEye
from tinyalign_edge.train.vlm_prompt import find_chat_template, fit_prompt

WHAT = "vision-language model"
LLAVA_TOWERS = ("clip_vision_model", "siglip_vision_model")
CLASSES = {
    kind.__name__: kind
    for kind in (LlavaForConditionalGeneration, Idefics3ForConditionalGeneration, SmolVLMForConditionalGeneration)
}
HARMLESS = ("rotary_emb.inv_freq", "position_ids")  # buffers that old checkpoints carry


@dataclass(frozen=True)
class WholeModel:
    """A whole model and its parts, which share its weights; all is frozen.

    Attributes:
        model: of transformers' own class, in float32.
        tokenizer: transformers' own.
        connector: sizes of the visual path.
        projector: what `Patches(connector)` gives, (..., input_dim), to visual tokens (..., D).
    """

    model: Any
    tokenizer: Any
    vision: VisionTower
    language: LanguageTower
    connector: ConnectorSettings
    projector: nn.Module


def is_whole_model(folder: Path) -> bool:
    """Whether the folder is a model in Hugging Face format, of whatever kind, and not a checkpoint of `train`."""
    if (folder / "adapter_config.json").is_file():
        return True
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else None
    return isinstance(config, dict) and "model_type" in config


def load_vlm(folder: Path, *, template: str | None = None) -> WholeModel:
    """Load the model.

    Args:
        template: a Jinja chat template to use in place of the folder's.

    Raises:
        InputError: a part of the model is missing, or disagrees with another.
        UnsupportedError: a model, vision tower or preprocessing of a kind that is not known.
    """
    kind = _class_of(folder)
    image = _image(folder, kind)
    tokenizer = load_pretrained(AutoTokenizer, str(folder), WHAT, use_fast=True)
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedError(f"{WHAT} {folder}: its tokenizer has no fast form (tokenizer.json); convert it first")
    template = template or find_chat_template(folder, tokenizer)
    settings = load_pretrained(AutoConfig, str(folder), WHAT)
    _check_config(folder, settings, image, tokenizer)
    model = _load_whole(kind, folder, attention_options(settings.text_config))
    llava = kind is LlavaForConditionalGeneration
    eye = (LlavaEye if llava else Idefics3Eye)(model).eval()
    with torch.inference_mode():
        _, height, width, channels = eye(torch.zeros(1, 3, image.height, image.width)).shape
    language = _language(model)
    connector = ConnectorSettings(
        height, width, channels,
        visual_tokens=height * width // (1 if llava else model.config.scale_factor**2),
        width=language.config.hidden_size,
        kind="mlp" if llava else "pixel_shuffle",
    )  # fmt: skip
    prompt = fit_prompt(folder, template, tokenizer, model, visual_tokens=connector.visual_tokens)
    ref = tower_ref(str(folder), model.config)
    return WholeModel(
        model,
        tokenizer,
        VisionTower(eye, image, (height, width, channels), ref),
        LanguageTower(language, tokenizer.backend_tokenizer.to_str(), prompt, ref),
        connector,
        model.model.multi_modal_projector if llava else model.model.connector.modality_projection,
    )


def _class_of(folder: Path) -> Any:
    if not is_whole_model(folder):
        raise InputError(f"{WHAT} {folder}: no such model in Hugging Face format (no config.json with a model_type)")
    if (folder / "adapter_config.json").is_file():
        raise UnsupportedError(
            f"{folder}: is a PEFT adapter, not a whole model; merge it into its base model (merge_and_unload) first"
        )
    config = read_json(folder / "config.json")
    names = config.get("architectures")
    name = str(names[0] if isinstance(names, list) and names else config["model_type"])
    if name not in CLASSES:
        raise UnsupportedError(
            f"{folder}: a model of kind {name!r} is not supported; known: a checkpoint that 'train' wrote, "
            f"{', '.join(CLASSES)}"
        )
    kind: Any = CLASSES[name]
    if config["model_type"] != kind.config_class.model_type:
        raise InputError(
            f"{folder}: config.json says model_type {config['model_type']!r}, a {name} has "
            f"{kind.config_class.model_type!r}; save the model again"
        )
    return kind


def _image(folder: Path, kind: Any) -> ImageConfig:
    """How the model's own processor makes `pixel_values`, from whichever file keeps it."""
    for name, key in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        if (folder / name).is_file():
            found = read_json(folder / name)
            settings = found.get(key) if key else found
            if isinstance(settings, dict):
                return _read_image(settings, folder / name, kind)
    raise InputError(f"{WHAT} {folder}: has no preprocessor_config.json; save it with the processor's save_pretrained")


def _read_image(settings: dict[str, Any], where: Path, kind: Any) -> ImageConfig:
    try:
        sizes = {
            name: get_size_dict(settings[name], default_to_square=name == "crop_size", param_name=name)
            for name in ("size", "crop_size")
            if settings.get(name) is not None
        }  # older files give one number
        return (image_config if kind is LlavaForConditionalGeneration else tile_config)(settings | sizes)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{where}: not an image processor's settings ({type(error).__name__}: {first_line(error)}); "
            "save it again with the processor's save_pretrained"
        ) from None


def _load_whole(kind: Any, folder: Path, attention: dict[str, str]) -> Any:
    """The model in float32; every weight must come from the folder, and every weight there must be used."""
    model, found = load_model(kind, str(folder), WHAT, dtype=torch.float32, **attention)
    if missing := sorted(found["missing_keys"]):
        raise InputError(f"{WHAT} {folder}: weight {missing[0]!r} is missing; save the whole model again")
    unused = [name for name in found["unexpected_keys"] if not name.endswith(HARMLESS)]
    if unused:
        raise InputError(
            f"{WHAT} {folder}: weight {min(unused)!r} is not part of a {kind.__name__}; merge adapters before saving"
        )
    return model.eval().requires_grad_(False)


def _check_config(folder: Path, config: Any, image: ImageConfig, tokenizer: Any) -> None:
    vision, text = config.vision_config, config.text_config
    if config.model_type == "llava" and vision.model_type not in LLAVA_TOWERS:
        raise UnsupportedError(
            f"{WHAT} {folder}: vision tower {vision.model_type!r} is not supported; known: {', '.join(LLAVA_TOWERS)}"
        )
    if (image.height, image.width) != (vision.image_size, vision.image_size):
        raise UnsupportedError(
            f"{WHAT} {folder}: its processor makes pictures of {image.width} x {image.height}, its vision tower takes "
            f"{vision.image_size} x {vision.image_size}; known: the tower's own size"
        )
    if len(tokenizer) > text.vocab_size:
        raise InputError(f"{WHAT} {folder}: {len(tokenizer)} tokens but an embedding of {text.vocab_size} rows")


def _language(model: Any) -> Any:
    """The language model as a causal one of its own class, on the same weights.

    The classes of whole models put nothing after `lm_head`: what the text's own class would do there is switched off.
    """
    config = deepcopy(model.config.text_config)
    for name, nothing in (("final_logit_softcapping", None), ("logits_scaling", 1.0)):
        if hasattr(config, name):
            setattr(config, name, nothing)
    config.tie_word_embeddings = model.lm_head.weight is model.get_input_embeddings().weight
    with torch.device("meta"):
        language = AutoModelForCausalLM.from_config(config)
    body = getattr(model.model, "language_model", None) or model.model.text_model
    setattr(language, body_name(language), body)
    language.set_output_embeddings(model.lm_head)
    return language.eval()
