"""A tower's files, found and checked before a model is built from them: whole, finite, and those of its config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CONFIG_MAPPING
from transformers.utils.hub import cached_file

from tinyalign_edge.config import read_json
from tinyalign_edge.errors import InputError, UnsupportedError, first_line

Shapes = dict[str, tuple[int, ...]]

CONFIG = "config.json"
BUFFERS = ("rotary_emb.inv_freq", "position_ids", "attn.bias", "attn.masked_bias", "attention.bias", "masked_bias")
WEIGHTS, INDEX, PICKLE = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"


def find_file(path: str, name: str) -> Path | None:
    """A file of a folder or of a hub id (fetched if need be); None where there is none."""
    try:
        found = cached_file(path, name)
    except OSError:
        return None
    return Path(found) if found else None


def check_kind(path: str, what: str) -> None:
    """Refuse a `config.json` of a kind that transformers has no code for.

    Raises:
        UnsupportedError: its `model_type` is unknown, or would need code from the folder, which is never run.
    """
    config = find_file(path, CONFIG)
    settings = read_json(config) if config else {}
    kind = settings.get("model_type") if isinstance(settings, dict) else None
    if config is None or kind in CONFIG_MAPPING:
        return
    if "auto_map" in settings:
        raise UnsupportedError(
            f"{what} {path}: model_type {kind!r} needs code from the folder (auto_map), and no remote code is run; "
            f"use a model that transformers {transformers.__version__} has itself"
        )
    raise UnsupportedError(
        f"{what} {path}: model_type {kind!r} is not one that transformers {transformers.__version__} knows"
    )


def check_weights(path: str, what: str) -> Shapes:
    """Read every tensor of the safetensors files once, one at a time; returns their shapes.

    Raises:
        InputError: a file is missing, cut short or damaged, or a weight is not finite; the message names it.
    """
    shapes: Shapes = {}
    for file, names in _weight_files(path, what).items():
        try:
            with safe_open(file, framework="pt") as tensors:
                held = tensors.keys()
                if lost := sorted(names - set(held)):
                    raise InputError(f"{what} {path}: {file.name} lacks {lost[0]!r}, which {INDEX} says it holds")
                for name in held:
                    tensor = tensors.get_tensor(name)
                    shapes[name] = tuple(tensor.shape)
                    if not _finite(tensor):
                        raise InputError(
                            f"{what} {path}: weight {name!r} in {file.name} holds NaN or infinity; fetch it again"
                        )
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{what} {path}: {file.name} is damaged or cut short ({first_line(error)}); fetch it again"
            ) from None
    return shapes


def _weight_files(path: str, what: str) -> dict[Path, set[str]]:
    """The safetensors files and the weights that each must hold as far as an index says so."""
    if single := find_file(path, WEIGHTS):
        return {single: set()}
    index = find_file(path, INDEX)
    if index is None:
        pickled = find_file(path, PICKLE) is not None
        raise InputError(
            f"{what} {path}: has no {WEIGHTS}"
            + (f", and {PICKLE} is not read: a pickle can run code" if pickled else "")
            + "; save it with save_pretrained, which writes safetensors"
        )
    names: dict[Path, set[str]] = {}
    listed = read_json(index)
    shards = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(shards, dict):
        raise InputError(f"{what} {path}: {INDEX} has no weight_map; fetch it again")
    for name, shard in shards.items():
        if Path(str(shard)).name != shard:
            raise InputError(f"{what} {path}: {INDEX} names {shard!r}, which is not a plain file name; fetch it again")
        file = find_file(path, shard)
        if file is None:
            raise InputError(f"{what} {path}: {shard} is missing, which {INDEX} names; fetch it again")
        names.setdefault(file, set()).add(name)
    return names


def _finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    least, most = torch.aminmax(tensor if tensor.element_size() > 1 else tensor.float())
    return bool(least.isfinite() and most.isfinite())  # NaN comes through as both


def check_belonging(model: nn.Module, info: Mapping[str, Any], held: Shapes, what: str, path: str) -> None:
    """Refuse weights of other shapes than `config.json` says, and those of which it says nothing.

    Heads and towers beside the part that is used may be there.

    Args:
        info: transformers' loading info.
        held: as `check_weights` returns it.

    Raises:
        InputError: names the weight that does not belong, and its shapes or that it has no place.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(info["mismatched_keys"]):
        found = held.get(name) or held.get(prefix + name) or held.get(name.removeprefix(prefix))
        raise InputError(
            f"{what} {path}: weight {name!r} has shape {found}, {CONFIG} says {wanted[name]}; "
            "they do not belong together"
        )
    known = {_stem(name) for name in wanted}
    for name in sorted(info["unexpected_keys"]):
        if not name.endswith(BUFFERS) and {_stem(name), _stem(name.removeprefix(prefix))} & known:
            raise InputError(
                f"{what} {path}: weight {name!r} has no place in the model that {CONFIG} describes; "
                "they do not belong together"
            )


def missing_weight(name: str, shape: tuple[int, ...], what: str, path: str) -> InputError:
    """The error for a weight that the model needs and the files do not hold."""
    return InputError(
        f"{what} {path}: weight {name!r} of shape {shape}, which {CONFIG} asks for, is not in the safetensors files; "
        "they do not belong together"
    )


def _stem(name: str) -> tuple[str, ...]:
    """The part of a model that a weight belongs to."""
    return tuple(name.split(".")[:2])
