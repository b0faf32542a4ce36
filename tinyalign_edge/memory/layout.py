"""The files of a bank folder and its manifest. All numbers are little-endian, all arrays C-ordered.

manifest.json        the Manifest below; names the SHA-256 of every other file
keys.i8              (count, key_dim) int8
key_scales.f32       (count,) float32; key = int8 row * scale, of unit length
values.bin           "tokens": int32 token ids, one entry after another; "latents": (count, latents, latent_dim) int8
value_offsets.u64    "tokens": (count + 1,) uint64, the first id of each entry and the end
value_scales.f32     "latents": (count, latents) float32
records.jsonl        one JSON object an entry: text, question, source
record_offsets.u64   (count + 1,) uint64, the first byte of each record and the end
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tinyalign_edge.bundle import FileEntry

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"

KEYS = "keys.i8"
KEY_SCALES = "key_scales.f32"
VALUES = "values.bin"
VALUE_OFFSETS = "value_offsets.u64"
VALUE_SCALES = "value_scales.f32"
RECORDS = "records.jsonl"
RECORD_OFFSETS = "record_offsets.u64"

MAX_ENTRIES = 1 << 31
MAX_DIM = 1 << 16


@dataclass(frozen=True)
class BankManifest:
    """`manifest.json` of a bank."""

    schema_version: int
    generation: int
    count: int
    kind: Literal["tokens", "latents"]
    key_dim: int
    latents: int
    latent_dim: int
    vocab_size: int  # every token id is below it
    fingerprint: str  # of the encoder and key projection
    files: dict[str, FileEntry] = field(default_factory=dict)
