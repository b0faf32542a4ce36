"""Frozen dataclasses to and from plain JSON.

Every file of settings this package writes (a checkpoint's `config.json`, a bundle's `bundle.json`, a bank's
`manifest.json`) is one frozen dataclass nested by part. An unknown key, a missing key or a value of the wrong
type is an error that names the key.
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from tinyalign_edge.errors import BundleError, InputError

T = TypeVar("T")
MAX_JSON_BYTES = 16 * 2**20
PACKAGE = "tinyalign-edge"

MemoryKind = Literal["none", "tokens", "latents", "hybrid"]
WITH_TOKENS = ("tokens", "hybrid")  # kinds whose entries carry token ids
WITH_LATENTS = ("latents", "hybrid")


def to_json(value: Any) -> Any:
    """Turn a dataclass (nested ones too) into dicts, lists and plain values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value


def from_json(kind: type[T], data: Any, where: str) -> T:
    """Build the dataclass `kind` from parsed JSON.

    Raises:
        BundleError: an unknown or missing key, or a value of the wrong type; the message names `where` and the key.
    """
    if not isinstance(data, dict):
        raise BundleError(f"{where}: expected an object, found {type(data).__name__}")
    hints = get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise BundleError(f"{where}: unknown key {key!r}; known: {', '.join(fields)}")
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _value(hints[name], data[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise BundleError(f"{where}: key {name!r} is missing")
    return kind(**values)


def _value(hint: Any, data: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return data
    if origin in (Union, types.UnionType):
        if data is None and type(None) in args:
            return None
        (hint,) = (arg for arg in args if arg is not type(None))
        return _value(hint, data, where)
    if origin is Literal:
        if data not in args:
            raise BundleError(f"{where}: {data!r} is not one of {', '.join(map(repr, args))}")
        return data
    if dataclasses.is_dataclass(hint):
        return from_json(hint, data, where)  # type: ignore[arg-type]
    if origin is tuple and isinstance(data, list):
        return tuple(_value(args[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin is dict and isinstance(data, dict):
        return {key: _value(args[1], item, f"{where}.{key}") for key, item in data.items()}
    if hint is float and type(data) is int:
        return float(data)
    if type(data) is not hint:
        wanted = getattr(origin or hint, "__name__", hint)
        raise BundleError(f"{where}: expected {wanted}, found {type(data).__name__} {data!r:.60}")
    return data


def from_versioned(kind: type[T], data: Any, path: Path, *, newest: int) -> T:
    """`from_json` of settings that have a `schema_version` and were read from `path`.

    Raises:
        BundleError: written by a newer version of this package, or as `from_json`.
    """
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > newest:
        raise BundleError(
            f"{path}: schema version {version} is newer than {newest}, the newest this version reads; "
            f"upgrade tinyalign-edge{_reader(data)}"
        )
    return from_json(kind, data, str(path))


def _reader(data: dict[str, Any]) -> str:
    """ " to VERSION", the one that wrote settings which keep it; what is no version is not repeated."""
    tools = data.get("tool_versions")
    version = tools.get(PACKAGE) if isinstance(tools, dict) else None
    return f" to {version}" if isinstance(version, str) and re.fullmatch(r"[0-9][0-9a-z.+-]{,30}", version) else ""


def read_json(path: Path) -> Any:
    """Parse a JSON file of bounded size.

    Raises:
        InputError: the file is missing, too large, not UTF-8 or not JSON; the message gives line and column.
    """
    return parse_json(read_small(path), path)


def read_small(path: Path) -> bytes:
    """The bytes of a file that may hold our JSON.

    Raises:
        InputError: it is missing, too large or cannot be read.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise InputError(f"{path}: larger than {MAX_JSON_BYTES} bytes, not one of our JSON files")
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error})") from None


def parse_json(data: bytes, path: Path) -> Any:
    """Parse the bytes of the file `path`.

    Raises:
        InputError: they are not UTF-8 or not JSON; the message gives line and column.
    """
    try:
        return json.loads(data.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}:{error.colno}: not valid JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None


def write_json(path: Path, value: Any) -> None:
    """Write a dataclass or plain value as indented JSON with a stable key order."""
    path.write_text(json.dumps(to_json(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
