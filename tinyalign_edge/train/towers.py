"""The two frozen towers, loaded from a folder or a hub id with transformers; safetensors only, no remote code."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
)

from tinyalign_edge.bundle import ImageConfig, PromptConfig
from tinyalign_edge.errors import InputError, UnsupportedError, first_line
from tinyalign_edge.image import image_config, resized
from tinyalign_edge.prompt import DEFAULT_CHAT_TEMPLATE
from tinyalign_edge.train.pretrained import (
    adds_bos,
    attention_options,
    load_config,
    load_model,
    load_pretrained,
    tower_ref,
)
from tinyalign_edge.train.settings import TowerRef
from tinyalign_edge.train.weights import (
    find_file,
    missing_weight,
)

VISION, LANGUAGE = "vision encoder", "language model"
PROCESSOR = "preprocessor_config.json"
INTERPOLATE = "interpolate_pos_encoding"


@dataclass(frozen=True)
class VisionTower:
    """A frozen vision encoder. `grid` is (height, width, feature_dim) of its patch features."""

    model: nn.Module
    image: ImageConfig
    grid: tuple[int, int, int]
    ref: TowerRef


@dataclass(frozen=True)
class LanguageTower:
    """A frozen causal language model with its tokenizer (the text of a `tokenizer.json`)."""

    model: Any
    tokenizer_json: str
    prompt: PromptConfig
    ref: TowerRef


def load_vision(path: str, *, image: ImageConfig | None = None) -> VisionTower:
    """Load a vision encoder. Of a checkpoint of two towers the vision half is taken.

    Args:
        path: folder or hub id.
        image: what the encoder shall see; by default `image_settings(path)`.

    Raises:
        InputError: the path or hub id cannot be read, or a part of it is missing or damaged.
        UnsupportedError: a model without patch features, or one that does not take pictures of that size.
    """
    config = load_config(path, VISION)
    if hasattr(config, "vision_config"):  # CLIP, SigLIP: the vision half, which has a class of its own
        config = config.vision_config
    image = image or image_settings(path)
    model, info = load_model(_vision_class(config), path, VISION, config=config)
    model.eval().requires_grad_(False)
    grid = _probe(model, image, info["missing_keys"], path)
    return VisionTower(model, image, grid, tower_ref(path, config))


def image_settings(path: str, side: int | None = None) -> ImageConfig:
    """Preprocessing as the encoder's image processor does it, to `side` x `side` pixels if that is given.

    Raises:
        InputError: no image processor in the folder, or one that cannot be read.
        UnsupportedError: a processor that `preprocess` cannot follow.
    """
    load_config(path, VISION)  # says what is wrong with the whole folder
    if find_file(path, PROCESSOR) is None:
        raise InputError(f"{VISION} {path}: has no {PROCESSOR}; save it with the image processor's save_pretrained")
    image = image_config(load_pretrained(AutoImageProcessor, path, VISION, use_fast=False).to_dict())
    return image if side is None else resized(image, side)


def _vision_class(config: Any) -> Any:
    """`AutoModel`, or the class of a vision half whose config `AutoModel` maps to it."""
    return MODEL_MAPPING.get(type(config), None) or AutoModel


def _probe(model: nn.Module, image: ImageConfig, missing: Iterable[str], path: str) -> tuple[int, int, int]:
    """Height, width and channels of the patch features, found by encoding one picture.

    Weights that the files do not hold are NaN meanwhile: those of a pooler that is not used do not show.
    """
    weights = dict(model.named_parameters())
    absent = [name for name in missing if name in weights]
    for name in absent:
        weights[name].fill_(torch.nan)
    try:
        with torch.inference_mode():
            features = patch_features(model, torch.zeros(1, 3, image.height, image.width))
    except UnsupportedError as error:
        raise UnsupportedError(f"{VISION} {path}: {error}") from None
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise UnsupportedError(
            f"{VISION} {path}: {type(model).__name__} cannot encode a picture of {image.height} x {image.width} "
            f"({first_line(error)})"
        ) from None
    if absent and features.isnan().any():
        raise missing_weight(absent[0], tuple(weights[absent[0]].shape), VISION, path)
    return (features.shape[1], features.shape[2], features.shape[3])


def patch_features(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """Features of the encoder as a grid (B, height, width, C), whatever its kind: ViT-like or convolutional.

    Class and register tokens are left out.

    Raises:
        UnsupportedError: the encoder gives no patch features, or the picture does not divide into its patches (the
            encoder's own size may leave a rest, which it does not see: SigLIP-so400m/14 has 384 pixels a side).
    """
    output = model(pixel_values=pixel_values, **_interpolation(model, pixel_values))
    if isinstance(output, Tensor):  # the eye of a whole model (`vlm_eye`) gives the grid itself
        return output
    hidden = getattr(output, "last_hidden_state", None)
    if not isinstance(hidden, Tensor):
        raise UnsupportedError(f"{type(model).__name__} gives no last_hidden_state; use an encoder that does")
    if hidden.ndim == 4:  # (B, C, H, W)
        return hidden.permute(0, 2, 3, 1)
    batch, tokens, channels = hidden.shape
    patch = getattr(getattr(model, "config", None), "patch_size", None)
    sides = tuple(pixel_values.shape[2:])
    if patch and any(side % patch for side in sides) and sides != _own_sides(model):
        raise UnsupportedError(
            f"{sides[0]} x {sides[1]} pixels do not divide into patches of {patch}; choose a multiple"
        )
    height = pixel_values.shape[2] // patch if patch else round(tokens**0.5)
    width = pixel_values.shape[3] // patch if patch else round(tokens**0.5)
    if height * width > tokens:
        raise UnsupportedError(f"{type(model).__name__}: {tokens} tokens do not fill {height} x {width}")
    patches = hidden[:, tokens - height * width :]  # class and register tokens come first
    return patches.reshape(batch, height, width, channels)


def _interpolation(model: nn.Module, pixel_values: Tensor) -> dict[str, bool]:
    """Asks an encoder for interpolated positions, where it has to be asked and the picture is not of its own size."""
    own = tuple(pixel_values.shape[2:]) == _own_sides(model)
    return {} if own or INTERPOLATE not in inspect.signature(model.forward).parameters else {INTERPOLATE: True}


def _own_sides(model: nn.Module) -> tuple[int, ...]:
    """Height and width that the encoder's config names; () where it names none."""
    own = getattr(getattr(model, "config", None), "image_size", None)
    return (own, own) if isinstance(own, int) else tuple(own or ())


def load_language(path: str) -> LanguageTower:
    """Load a causal language model, its fast tokenizer and its chat template.

    Raises:
        InputError: the path or hub id cannot be read, or a part of it is missing.
    """
    config = load_config(path, LANGUAGE)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(f"{LANGUAGE} {path}: a model of kind {config.model_type} is none; give a causal one")
    tokenizer = load_pretrained(AutoTokenizer, path, LANGUAGE, use_fast=True)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedError(
            f"language model {path}: its tokenizer has no fast form (tokenizer.json); convert it first"
        )
    if len(tokenizer) > config.vocab_size:
        raise InputError(f"language model {path}: {len(tokenizer)} tokens but an embedding of {config.vocab_size} rows")
    options = attention_options(config)
    if not getattr(config, "max_position_embeddings", None):
        raise UnsupportedError(f"language model {path}: its config names no max_position_embeddings; use one that does")
    model, info = load_model(AutoModelForCausalLM, path, LANGUAGE, dtype=torch.float32, **options)
    weights = model.state_dict()
    for name in info["missing_keys"]:
        raise missing_weight(name, tuple(weights[name].shape), LANGUAGE, path)
    model.eval().requires_grad_(False)
    backend.no_truncation()
    backend.no_padding()
    prompt = PromptConfig(
        chat_template=tokenizer.chat_template or DEFAULT_CHAT_TEMPLATE,
        prepend_bos=adds_bos(tokenizer),
        bos_token=tokenizer.bos_token or "",
        eos_token=tokenizer.eos_token or "",
        eos_token_ids=_eos_ids(model, tokenizer, path),
        max_context_tokens=int(config.max_position_embeddings),
    )
    return LanguageTower(model, backend.to_str(), prompt, tower_ref(path, config))


def _eos_ids(model: Any, tokenizer: Any, path: str) -> tuple[int, ...]:
    declared = model.generation_config.eos_token_id
    ids = list(declared) if isinstance(declared, list) else [declared]
    ids = [i for i in dict.fromkeys([tokenizer.eos_token_id, *ids]) if i is not None]
    if not ids:
        raise InputError(f"language model {path}: declares no end-of-text token; set eos_token in its tokenizer")
    return tuple(ids)
