"""The two frozen towers, loaded from a folder or a hub id with transformers; safetensors only, no remote code."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.hub import cached_file

from tinyalign_edge.bundle import ImageConfig, PromptConfig, file_sha256
from tinyalign_edge.config import read_json
from tinyalign_edge.errors import InputError, UnsupportedError
from tinyalign_edge.image import image_config
from tinyalign_edge.prompt import DEFAULT_CHAT_TEMPLATE
from tinyalign_edge.train.settings import TowerRef


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


def load_vision(path: str) -> VisionTower:
    """Load a vision encoder and its image processor's settings.

    Raises:
        InputError: the path or hub id cannot be read, or a part of it is missing.
        UnsupportedError: a model without patch features.
    """
    config = _load(AutoConfig, path, "vision encoder")
    if hasattr(config, "vision_config"):  # CLIP, SigLIP: the vision half, which has a class of its own
        config = config.vision_config
    model = _load(_vision_class(config), path, "vision encoder", config=config)
    image = image_config(read_json(_file(path, "preprocessor_config.json", "vision encoder")))
    model.eval().requires_grad_(False)
    with torch.inference_mode():
        probe = patch_features(model, torch.zeros(1, 3, image.height, image.width))
    return VisionTower(model, image, (probe.shape[1], probe.shape[2], probe.shape[3]), _ref(path, config))


def _vision_class(config: Any) -> Any:
    """`AutoModel`, or the class of a vision half whose config `AutoModel` maps to it."""
    return MODEL_MAPPING.get(type(config), None) or AutoModel


def patch_features(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """Features of the encoder as a grid (B, height, width, C), whatever its kind: ViT-like or convolutional."""
    output = model(pixel_values=pixel_values)
    hidden = getattr(output, "last_hidden_state", None)
    if not isinstance(hidden, Tensor):
        raise UnsupportedError(
            f"vision encoder {type(model).__name__}: gives no last_hidden_state; use an encoder that does"
        )
    if hidden.ndim == 4:  # (B, C, H, W)
        return hidden.permute(0, 2, 3, 1)
    batch, tokens, channels = hidden.shape
    patch = getattr(getattr(model, "config", None), "patch_size", None)
    height = pixel_values.shape[2] // patch if patch else round(tokens**0.5)
    width = pixel_values.shape[3] // patch if patch else round(tokens**0.5)
    if height * width > tokens:
        raise UnsupportedError(f"vision encoder {type(model).__name__}: {tokens} tokens do not fill {height} x {width}")
    patches = hidden[:, tokens - height * width :]  # class and register tokens come first
    return patches.reshape(batch, height, width, channels)


def load_language(path: str) -> LanguageTower:
    """Load a causal language model, its fast tokenizer and its chat template.

    Raises:
        InputError: the path or hub id cannot be read, or a part of it is missing.
    """
    config = _load(AutoConfig, path, "language model")
    capped = getattr(config, "attn_logit_softcapping", None)  # which transformers' default attention leaves out
    options = {"attn_implementation": "eager"} if capped else {}
    model = _load(AutoModelForCausalLM, path, "language model", dtype=torch.float32, **options)
    model.eval().requires_grad_(False)
    tokenizer = _load(AutoTokenizer, path, "language model", use_fast=True)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedError(
            f"language model {path}: its tokenizer has no fast form (tokenizer.json); convert it first"
        )
    if len(tokenizer) > config.vocab_size:
        raise InputError(f"language model {path}: {len(tokenizer)} tokens but an embedding of {config.vocab_size} rows")
    backend.no_truncation()
    backend.no_padding()
    prompt = PromptConfig(
        chat_template=tokenizer.chat_template or DEFAULT_CHAT_TEMPLATE,
        prepend_bos=_adds_bos(tokenizer),
        bos_token=tokenizer.bos_token or "",
        eos_token=tokenizer.eos_token or "",
        eos_token_ids=_eos_ids(model, tokenizer, path),
        max_context_tokens=int(config.max_position_embeddings),
    )
    return LanguageTower(model, backend.to_str(), prompt, _ref(path, config))


def _adds_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id


def _eos_ids(model: Any, tokenizer: Any, path: str) -> tuple[int, ...]:
    declared = model.generation_config.eos_token_id
    ids = list(declared) if isinstance(declared, list) else [declared]
    ids = [i for i in dict.fromkeys([tokenizer.eos_token_id, *ids]) if i is not None]
    if not ids:
        raise InputError(f"language model {path}: declares no end-of-text token; set eos_token in its tokenizer")
    return tuple(ids)


def _load(kind: Any, path: str, what: str, **options: Any) -> Any:
    _must_exist(path, what)
    if kind not in (AutoConfig, AutoTokenizer):
        options["use_safetensors"] = True
    try:
        if kind in (AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer):
            options["trust_remote_code"] = False
        return kind.from_pretrained(path, **options)
    except (
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
        AttributeError,
        ImportError,
        SafetensorError,
    ) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = (
            "check the folder"
            if Path(path).is_dir()
            else "no such folder, and the hub could not give it; check the name and the network"
        )
        raise InputError(f"{what} {path}: cannot be loaded ({first}); {hint}") from None


def _must_exist(path: str, what: str) -> None:
    """A path that looks local must be a folder, so that a typing error is not looked up on the hub."""
    looks_local = path.startswith((".", "/", "~", os.sep)) or path.count("/") != 1
    if looks_local and not Path(path).is_dir():
        raise InputError(
            f"{what} {path}: no such folder; give a folder in Hugging Face format or a hub id such as org/name"
        )


def _file(path: str, name: str, what: str) -> Path:
    try:
        found = cached_file(path, name)
    except OSError:
        found = None
    if found is None:
        raise InputError(f"{what} {path}: has no {name}; save it with the image processor's save_pretrained")
    return Path(found)


def _ref(path: str, config: Any) -> TowerRef:
    folder = _file(path, "config.json", "tower").parent
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(bytes.fromhex(file_sha256(file)))
    where = str(Path(path).resolve()) if Path(path).is_dir() else path
    return TowerRef(where, digest.hexdigest(), str(config.model_type), _licence(folder))


def _licence(folder: Path) -> str:
    """The licence that config.json or the model card's front matter names."""
    named = json.loads((folder / "config.json").read_text("utf-8")).get("license")
    card = folder / "README.md"
    if not named and card.is_file():
        lines = card.read_text("utf-8", errors="replace").splitlines()[:60]
        named = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("license:")), None)
    return str(named or "not stated")
