"""The manifest of a bank and the sections of its segments. `docs/memory-format.md` describes the bytes for others."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from tinyalign_edge.config import WITH_TOKENS

Kind = Literal["tokens", "latents", "hybrid"]

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
LOCK = "lock"

ALIGNMENT_BYTES = 64  # of every section of a segment
SEGMENT_NAME = re.compile(r"segment-[0-9]{1,19}-[0-9]{1,9}\.bin")
JOURNAL_NAME = re.compile(r"journal-[0-9]{1,19}\.bin")
GRAPH_NAME = re.compile(r"graph-[0-9]{1,19}\.usearch")

MAX_ENTRIES = 1 << 31
MAX_DIM = 1 << 16
MAX_ENTRY_BYTES = 1 << 20  # of key, value, scales and record, as the journal holds them
MAX_RECORD_BYTES = 2 * MAX_ENTRY_BYTES  # of a segment's, with its thumbnail
MAX_JOURNAL_BYTES = 1 << 26
MAX_COUNTER = 1 << 62  # of generations and ids


@dataclass(frozen=True)
class BankSpec:
    """What every entry of a bank is made of."""

    kind: Kind
    key_dim: int
    latents: int  # L; 0 for "tokens"
    latent_dim: int
    vocab_size: int  # every token id is below it
    fingerprint: str  # of the encoder and key projection, and the value encoder of latents


@dataclass(frozen=True)
class SegmentEntry:
    """A sealed file of entries. `token_count` is the number of all its token ids, 0 in a bank of latents."""

    file: str
    bytes: int
    sha256: str
    count: int
    token_count: int
    record_bytes: int


@dataclass(frozen=True)
class JournalEntry:
    """The part of the journal that counts: `bytes` from its start, `count` entries. `digest` is the last one's."""

    file: str
    bytes: int
    count: int
    digest: str


@dataclass(frozen=True)
class GraphEntry:
    """The USearch graph over the keys of the `count` entries that there were up to the id `last_id`."""

    file: str
    bytes: int
    sha256: str
    count: int
    last_id: int


@dataclass(frozen=True)
class BankManifest:
    """`manifest.json`: one generation of a bank. What it does not name does not count."""

    schema_version: int
    generation: int
    next_id: int  # ids rise, and none is given twice
    spec: BankSpec
    segments: tuple[SegmentEntry, ...]
    journal: JournalEntry | None
    self_sha256: str  # of this file, with these 64 digits as zeros
    graph: GraphEntry | None = None  # a cache: searches are right without it

    @property
    def count(self) -> int:
        """Number of entries."""
        return sum(segment.count for segment in self.segments) + (self.journal.count if self.journal else 0)

    @property
    def files(self) -> set[str]:
        """The names of all files of this generation, the manifest apart."""
        others = (self.journal, self.graph)
        return {segment.file for segment in self.segments} | {other.file for other in others if other}


@dataclass(frozen=True)
class Section:
    """One array of a segment, at `offset` bytes from the file's start."""

    name: str
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size


def sections(spec: BankSpec, count: int, token_count: int, record_bytes: int) -> list[Section]:
    """The arrays of a segment in their order in the file; names are those of `Table`'s fields."""
    arrays: list[tuple[str, npt.DTypeLike, tuple[int, ...]]] = [
        ("ids", "<u8", (count,)),
        ("key_scales", "<f4", (count,)),
        ("keys", "i1", (count, spec.key_dim)),
    ]
    if spec.kind in WITH_TOKENS:
        arrays += [("value_offsets", "<u8", (count + 1,)), ("token_ids", "<i4", (token_count,))]
    arrays += [("value_scales", "<f4", (count, spec.latents))]  # of no bytes where there are no latents
    arrays += [("latents", "i1", (count, spec.latents, spec.latent_dim))]
    arrays += [("record_offsets", "<u8", (count + 1,)), ("records", "u1", (record_bytes,))]
    placed, offset = list[Section](), 0
    for name, dtype, shape in arrays:
        placed.append(Section(name, np.dtype(dtype), shape, offset))
        offset = aligned(offset + placed[-1].bytes)
    return placed


def aligned(offset: int) -> int:
    """`offset` rounded up to where a section may begin."""
    return -(-offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
