"""Loading what transformers saved, from a folder or a hub id: safetensors only, no remote code, errors of one line."""

from __future__ import annotations

import hashlib
import json
import os
from logging import CRITICAL
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig
from transformers.utils import logging

from tinyalign_edge.errors import InputError, first_line
from tinyalign_edge.files import file_sha256
from tinyalign_edge.train.settings import TowerRef
from tinyalign_edge.train.weights import CONFIG, check_belonging, check_kind, check_weights, find_file


def load_config(path: str, what: str) -> Any:
    """The configuration of a model; says what is wrong with the folder as a whole.

    Raises:
        InputError: the path or hub id cannot be read.
        UnsupportedError: a model type that transformers has no code for.
    """
    _must_exist(path, what)
    check_kind(path, what)
    return load_pretrained(AutoConfig, path, what)


def load_model(kind: Any, path: str, what: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The model with transformers' loading info; damaged weights, and those that are not of its config, are refused."""
    held = check_weights(path, what)
    options |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = load_pretrained(kind, path, what, **options)
    check_belonging(model, info, held, what, path)
    return model, info


def load_pretrained(kind: Any, path: str, what: str, **options: Any) -> Any:
    """`kind.from_pretrained` without remote code; whatever goes wrong is an InputError of one line."""
    if kind.__name__.startswith("Auto"):
        options["trust_remote_code"] = False
    told = logging.get_verbosity()
    logging.set_verbosity(CRITICAL)  # what is wrong is said in one line, below or by the caller
    try:
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
        hint = (
            "check the folder"
            if Path(path).is_dir()
            else "no such folder, and the hub could not give it; check the name and the network"
        )
        raise InputError(f"{what} {path}: cannot be loaded ({first_line(error)}); {hint}") from None
    finally:
        logging.set_verbosity(told)


def attention_options(config: Any) -> dict[str, str]:
    """How to load a language model so that its attention leaves nothing out: transformers' default drops soft caps."""
    return {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}


def tower_ref(path: str, config: Any) -> TowerRef:
    """Where a loaded tower comes from, the hash of its weights, its kind and licence."""
    folder = _folder(path)
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(bytes.fromhex(file_sha256(file)))
    where = str(Path(path).resolve()) if Path(path).is_dir() else path
    return TowerRef(where, digest.hexdigest(), str(config.model_type), _licence(folder))


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts the beginning-of-text token first."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id


def _must_exist(path: str, what: str) -> None:
    """A path that looks local must be a folder, so that a typing error is not looked up on the hub."""
    looks_local = path.startswith((".", "/", "~", os.sep)) or path.count("/") != 1
    if looks_local and not Path(path).is_dir():
        raise InputError(
            f"{what} {path}: no such folder; give a folder in Hugging Face format or a hub id such as org/name"
        )


def _folder(path: str) -> Path:
    """The folder of a tower that has been loaded: its own, or the hub's cache."""
    config = find_file(path, CONFIG)
    return config.parent if config else Path(path)


def _licence(folder: Path) -> str:
    """The licence that config.json or the model card's front matter names."""
    named = json.loads((folder / CONFIG).read_text("utf-8")).get("license")
    card = folder / "README.md"
    if not named and card.is_file():
        lines = card.read_text("utf-8", errors="replace").splitlines()[:60]
        named = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("license:")), None)
    return str(named or "not stated")
