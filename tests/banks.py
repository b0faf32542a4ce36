"""Small banks for tests, and all that one holds."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from tinyalign_edge.config import WITH_LATENTS, WITH_TOKENS
from tinyalign_edge.memory import Bank, Hybrid, Record, Value, value_of, write_bank

DIM = 32
VOCAB = 50


def unit(count: int, seed: int = 0) -> np.ndarray:
    """Unit rows in a few clusters, as keys of real pictures are."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(12, DIM))
    keys = centres[rng.integers(0, 12, count)] + 0.4 * rng.normal(size=(count, DIM))
    return (keys / np.linalg.norm(keys, axis=1, keepdims=True)).astype(np.float32)


def records(count: int) -> list[Record]:
    return [Record(f"text ü {i}", f"question {i}", f"source-{i}") for i in range(count)]


def tokens_of(i: int) -> np.ndarray:
    return np.full(i % 4, i % VOCAB)


def some_latents(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, 8)).astype(np.float32)


def make_bank(folder: Path, count: int = 300, kind: str = "tokens") -> Path:
    """A bank of `count` sealed entries."""
    ids = [tokens_of(i).tolist() for i in range(count)] if kind in WITH_TOKENS else None
    latents = some_latents(count) if kind in WITH_LATENTS else None
    given: dict[str, Any] = {"fingerprint": "f", "vocab_size": VOCAB, "token_ids": ids, "latents": latents}
    write_bank(folder, unit(count), records(count), **given)
    return folder


def teach(bank: Bank, name: str) -> int:
    """Add an entry whose key, value and record follow from its name."""
    record = Record(name, source=f"taught {name}", time="2026-01-31T09:30:00Z")
    kind, seed = bank.manifest.spec.kind, _seed(name)
    latents = some_latents(1, seed)[0] if kind in WITH_LATENTS else None
    return bank.add(key_of(name), record, value=value_of(kind, tokens_of(seed % 97), latents))


def key_of(name: str) -> np.ndarray:
    """The key of what `teach` adds."""
    return unit(1, _seed(name))[0]


def _seed(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)


def contents(bank: Bank) -> dict[int, tuple[Any, ...]]:
    """Every entry of a bank, by id."""
    found = {}
    for number in bank.ids:
        entry = bank.entry(number)
        found[number] = (entry.text, entry.question, entry.source, entry.time, _plain(entry.value))
    return found


def _plain(value: Value) -> list[Any]:
    return [value.token_ids.tolist(), value.latents.tolist()] if isinstance(value, Hybrid) else value.tolist()


def files(folder: Path) -> set[str]:
    """The names of a bank's files, without the lock."""
    return {path.name for path in folder.iterdir()} - {"lock"}


def named_files(bank: Bank) -> set[str]:
    """The names of the files that a bank's manifest says there are."""
    return bank.manifest.files | {"manifest.json"}


def reseal(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest with the digest of itself that it should have, as the format's document says."""
    zeros = "0" * 64
    text = json.dumps({**manifest, "self_sha256": zeros})
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / "manifest.json").write_text(text.replace(zeros, digest), "utf-8")
