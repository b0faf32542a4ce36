"""Weights as this processor reads them, in files of this device that processes map and share.

onnxruntime rearranges the weights of products for the processor whenever it loads a graph, in memory of each process's
own. Here it does so once and writes the graph anew with what it made:

    PACKED_DIR/lock
    PACKED_DIR/BUNDLE-DEVICE/packed.json, vision.onnx, vision.onnx.data, decoder.onnx, decoder.onnx.data

BUNDLE and DEVICE are digests of what is packed and for whom. All of it is a cache: what is missing, damaged or writable
by other users is made anew, and the folder may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime as ort

from tinyalign_edge.bundle import Manifest, file_entries
from tinyalign_edge.config import from_json, read_json, to_json, write_json
from tinyalign_edge.errors import InputError, TinyAlignError, first_line
from tinyalign_edge.files import FileEntry, file_sha256
from tinyalign_edge.folders import cause, whole_folder
from tinyalign_edge.memory.lock import exclusive
from tinyalign_edge.memory.verified import VerifiedFiles
from tinyalign_edge.runtime.sessions import PROVIDERS, session_options

RECORD = "packed.json"
LAYOUT = 1  # of an entry
VISION, DECODER, DATA = "vision.onnx", "decoder.onnx", ".data"
NAMES = frozenset(graph + end for graph in (VISION, DECODER) for end in ("", DATA))
MAX_GROWTH = 16  # an entry holds the weights twice; those of convolutions are unpacked to float32
EXTERNAL_BYTES = 1024  # smaller tensors stay in the graph
CPU_KEYS = ("model name", "flags", "Features", "CPU implementer", "CPU part", "CPU variant")
OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True)
class Contents:
    """`packed.json`: the entry's own name, and its other files."""

    entry: str
    files: dict[str, FileEntry]


class PackedGraphs(NamedTuple):
    """Where the packed graphs are."""

    vision: Path
    decoder: Path


def packed_graphs(folder: Path, manifest: Manifest, home: Path) -> PackedGraphs:
    """The graphs of the open bundle `folder` with packed weights in `home`; made now where they are not there.

    Another process that makes them at the same time is waited for. What `home` holds of this bundle for an older
    onnxruntime, or another processor, is deleted then.

    Raises:
        TinyAlignError: `home` cannot be written, or the disk is full.
    """
    block = manifest.decoder
    sources = {name: manifest.files[name] for name in (manifest.vision.file, block.file, *block.data_files)}
    bundle = _digest(to_json(sources))
    entry = home / f"{bundle}-{_digest([LAYOUT, *_device()])}"
    most = MAX_GROWTH * sum(file.bytes for file in sources.values())
    if not _is_good(entry, most):
        try:
            home.mkdir(parents=True, exist_ok=True)
            with exclusive(home):
                if not _is_good(entry, most):
                    for old in home.glob(f"{bundle}-*"):
                        _remove(old)
                    _write(entry, {VISION: folder / manifest.vision.file, DECODER: folder / block.file})
        except OSError as error:
            raise InputError(f"packed_dir {home}: cannot be written ({cause(error)}); choose another folder") from None
    return PackedGraphs(entry / VISION, entry / DECODER)


def _write(entry: Path, graphs: dict[str, Path]) -> None:
    with whole_folder(entry, marker=RECORD) as target:
        target.chmod(0o755)
        for name, source in graphs.items():
            _pack(source, target / name)
        write_json(target / RECORD, Contents(entry.name, file_entries(target)))
        for path in target.iterdir():
            path.chmod(0o644)


def _pack(source: Path, target: Path) -> None:
    """Have onnxruntime write the graph `source` as it would run it."""
    options = session_options(1)
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", target.name + DATA)
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_min_size_in_bytes", str(EXTERNAL_BYTES)
    )
    try:
        ort.InferenceSession(source, options, providers=PROVIDERS)
    except Exception as error:  # its exceptions have no base class in common
        raise TinyAlignError(
            f"{target.parent.parent}: onnxruntime cannot pack {source} into it ({first_line(error):.200}); make room, "
            "or load without packed_dir"
        ) from error


def _is_good(entry: Path, most: int) -> bool:
    """Whether an entry is whole, and can have been written by this user or the system's alone."""
    try:
        found = {path.name for path in entry.iterdir()}
        if not all(map(_is_ours, (entry, *entry.iterdir()))):
            return False
        contents = from_json(Contents, read_json(entry / RECORD), RECORD)
        files = contents.files
        if contents.entry != entry.name or found != {RECORD, *files} or not {VISION, DECODER} <= set(files) <= NAMES:
            return False
        sizes = {name: (entry / name).stat().st_size for name in files}
        if sizes != {name: file.bytes for name, file in files.items()} or sum(sizes.values()) > most:
            return False
        return _are_verified(entry, files)
    except (OSError, TinyAlignError):
        return False


def _are_verified(entry: Path, files: dict[str, FileEntry]) -> bool:
    """Whether the bytes of all files are the record's, as far as this device has not seen that before."""
    verified = VerifiedFiles(entry)
    for name, file in files.items():
        if not verified.holds(entry / name, file.sha256):
            if file_sha256(entry / name) != file.sha256:
                return False
            verified.add(entry / name, file.sha256)
    verified.save()
    return True


def _is_ours(path: Path) -> bool:
    status = path.lstat()
    users = (0, os.getuid()) if hasattr(os, "getuid") else (status.st_uid,)
    return not path.is_symlink() and status.st_uid in users and not status.st_mode & OTHERS_MAY_WRITE


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _device() -> list[str]:
    """What the form of packed weights depends on: onnxruntime, and the processor as far as the system tells."""
    lines: list[str] = []
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    told = {line for line in lines if line.partition(":")[0].strip() in CPU_KEYS}
    machine = [platform.system(), platform.machine(), platform.processor()]
    return [ort.__version__, ort.get_build_info(), *machine, *sorted(told)]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
