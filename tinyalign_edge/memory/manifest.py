"""Read a bank's manifest, the one pointer to its current generation, and replace it at once."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

from tinyalign_edge.config import WITH_TOKENS, from_versioned, parse_json, read_small, to_json
from tinyalign_edge.errors import BundleError, InputError
from tinyalign_edge.files import inside
from tinyalign_edge.folders import sync
from tinyalign_edge.memory.layout import (
    GRAPH_NAME,
    JOURNAL_NAME,
    MANIFEST,
    MAX_COUNTER,
    MAX_DIM,
    MAX_ENTRIES,
    MAX_JOURNAL_BYTES,
    SCHEMA_VERSION,
    SEGMENT_NAME,
    BankManifest,
    aligned,
    sections,
)

TEMPORARY = MANIFEST + ".new"
ZEROS = "0" * 64


def is_bank(folder: Path) -> bool:
    """Whether `folder` holds a bank, be it damaged."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> BankManifest:
    """Read and check the manifest; nothing else of the folder is opened.

    Raises:
        InputError: it is not a bank.
        BundleError: damaged, hostile or written by a newer version.
    """
    if not is_bank(folder):
        raise InputError(f"{folder}: not a memory bank (no {MANIFEST})")
    path = inside(folder, MANIFEST)
    data = read_small(path)
    manifest = from_versioned(BankManifest, parse_json(data, path), path, newest=SCHEMA_VERSION)
    own = manifest.self_sha256
    blank = data.replace(own.encode(), ZEROS.encode()) if re.fullmatch("[0-9a-f]{64}", own) else b""
    if hashlib.sha256(blank).hexdigest() != own:
        raise BundleError(f"{path}: its SHA-256 is not the one it names, it was changed; copy the folder again")
    problem = _problem(manifest)
    if problem:
        raise BundleError(f"{path}: {problem}; build the bank again")
    return manifest


def is_newer(folder: Path) -> bool:
    """Whether the manifest of `folder` says that a newer version wrote it, be it otherwise damaged."""
    try:
        data = parse_json(read_small(inside(folder, MANIFEST)), folder / MANIFEST)
    except (InputError, BundleError):
        return False
    version = data.get("schema_version") if isinstance(data, dict) else None
    return isinstance(version, int) and version > SCHEMA_VERSION


def write_manifest(folder: Path, manifest: BankManifest) -> None:
    """Make `manifest` the folder's generation; it stands there whole, before and after a power cut."""
    text = json.dumps(to_json(replace(manifest, self_sha256=ZEROS)), indent=1, ensure_ascii=False) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    own = '"self_sha256": "%s"'
    temporary = folder / TEMPORARY
    with temporary.open("xb") as file:
        file.write(text.replace(own % ZEROS, own % digest).encode())
    sync(temporary)
    temporary.replace(folder / MANIFEST)
    sync(folder)


def _problem(manifest: BankManifest) -> str | None:
    """What is impossible about its numbers and names, so that no later step has to doubt them."""
    spec, journal, graph = manifest.spec, manifest.journal, manifest.graph
    latents = (spec.latents, spec.latent_dim)
    within = {
        "generation": 0 < manifest.generation < MAX_COUNTER,
        "next_id": manifest.count <= manifest.next_id < MAX_COUNTER,
        "count": all(s.count > 0 and s.token_count >= 0 and s.record_bytes >= 0 for s in manifest.segments),
        "token_count": spec.kind in WITH_TOKENS or not any(s.token_count for s in manifest.segments),
        "sum of counts": manifest.count <= MAX_ENTRIES,
        "key_dim": 0 < spec.key_dim <= MAX_DIM,
        "latents": latents == (0, 0) if spec.kind == "tokens" else all(0 < size <= MAX_DIM for size in latents),
        "vocab_size": 0 < spec.vocab_size < MAX_ENTRIES,
        "journal": journal is None or (0 < journal.count <= journal.bytes <= MAX_JOURNAL_BYTES),
        "graph": graph is None or (0 < graph.count <= graph.last_id + 1 <= manifest.next_id and graph.bytes > 0),
    }
    for what, good in within.items():
        if not good:
            return f"{what} is out of bounds"
    names = [s.file for s in manifest.segments]
    if not all(map(SEGMENT_NAME.fullmatch, names)) or len(set(names)) < len(names):
        return f"the names of its segments ({', '.join(names)!r:.80}) are not those of a bank"
    if journal and not JOURNAL_NAME.fullmatch(journal.file):
        return f"the name of its journal ({journal.file!r:.80}) is not that of a bank"
    if graph and not GRAPH_NAME.fullmatch(graph.file):
        return f"the name of its graph ({graph.file!r:.80}) is not that of a bank"
    for s in manifest.segments:
        last = sections(spec, s.count, s.token_count, s.record_bytes)[-1]
        if s.bytes != aligned(last.offset + last.bytes):
            return f"{s.file} cannot hold {s.count} entries in {s.bytes} bytes"
    return None
