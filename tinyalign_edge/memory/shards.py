"""Parts of a bank that is being built: small banks that appear whole, so that an interrupted build goes on there."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tinyalign_edge.config import from_json, read_json, write_json
from tinyalign_edge.errors import BundleError, InputError, TinyAlignError
from tinyalign_edge.folders import cause, sync, whole_folder
from tinyalign_edge.memory.join import Selected
from tinyalign_edge.memory.layout import MANIFEST, BankSpec
from tinyalign_edge.memory.merge import content_digest
from tinyalign_edge.memory.record import Record
from tinyalign_edge.memory.snapshot import open_snapshot
from tinyalign_edge.memory.write import write_bank

JOB = "job.json"
COUNTS = "counts.json"
DIGESTS = "digests.bin"
DIGEST_BYTES = 16
BUCKET = 1 << 16  # digests compared at once


@dataclass(frozen=True)
class Job:
    """What is built from what. Shards of equal jobs are equal, whichever process on whichever machine makes them."""

    data_sha256: str
    rows: int
    bundle_sha256: str
    shard_rows: int
    value_tokens: int
    skip_bad: bool
    thumbnails: bool
    held_back: float  # share of the pictures whose rows are left out

    @property
    def shards(self) -> int:
        """How many there will be."""
        return -(-self.rows // self.shard_rows)

    def rows_of(self, shard: int) -> range:
        """The numbers of the rows that a shard is made of, from 0."""
        return range(shard * self.shard_rows, min(self.rows, (shard + 1) * self.shard_rows))


@dataclass(frozen=True)
class Counts:
    """What became of a shard's rows."""

    entries: int
    skipped: int
    held_back: int
    without_picture: int


@dataclass(frozen=True)
class Entries:
    """What a shard is written from: E entries side by side."""

    keys: npt.NDArray[np.float32]  # (E, key_dim), unit rows
    records: Sequence[Record]
    token_ids: Sequence[Sequence[int]] | None  # None for "latents"
    latents: npt.NDArray[np.float32] | None  # (E, L, latent_dim); None for "tokens"


class Shards:
    """The folder of an unfinished build. Several processes may work in it, each on shards of its own."""

    def __init__(self, folder: Path, job: Job, spec: BankSpec) -> None:
        """Open `folder`, or make it.

        Raises:
            InputError: it holds shards of another job; the message says what differs.
            TinyAlignError: it cannot be written.
        """
        self.folder, self.job, self.spec = folder, job, spec
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / JOB).exists():
                self._write_job()
        except OSError as error:
            raise TinyAlignError(f"{folder}: cannot be written ({cause(error)}); build in another folder") from error
        found = from_json(Job, read_json(folder / JOB), str(folder / JOB))
        changed = [field.name for field in fields(Job) if getattr(found, field.name) != getattr(job, field.name)]
        if changed:
            raise InputError(
                f"{folder}: holds an unfinished build of another {', '.join(changed)}; take the same, or delete it"
            )

    def finished(self, shard: int) -> bool:
        """Whether a shard stands, whole and undamaged."""
        try:
            open_snapshot(self._path(shard), recorded=False)
            counts = self.counts(shard)
            return (self._path(shard) / DIGESTS).stat().st_size == counts.entries * DIGEST_BYTES
        except (TinyAlignError, OSError):
            return False

    def done(self) -> int:
        """How many shards stand."""
        return sum((self._path(shard) / COUNTS).is_file() for shard in range(self.job.shards))

    def is_open(self) -> bool:
        """Whether nobody has joined the shards and removed them."""
        return (self.folder / JOB).is_file()

    def write(self, shard: int, entries: Entries, counts: Counts) -> None:
        """Write a shard, down to the disk; it appears whole or not at all."""
        with whole_folder(self._path(shard), marker=MANIFEST) as folder:
            write_bank(
                folder,
                entries.keys,
                entries.records,
                fingerprint=self.spec.fingerprint,
                vocab_size=self.spec.vocab_size,
                token_ids=entries.token_ids,
                latents=entries.latents,
            )
            digests = [
                content_digest(table, row)
                for table in open_snapshot(folder, recorded=False).tables
                for row in range(len(table))
            ]
            (folder / DIGESTS).write_bytes(b"".join(digest[:DIGEST_BYTES] for digest in digests))
            write_json(folder / COUNTS, counts)

    def counts(self, shard: int) -> Counts:
        """What became of the rows of a finished shard."""
        path = self._path(shard) / COUNTS
        return from_json(Counts, read_json(path), str(path))

    def distinct(self) -> list[Selected]:
        """All entries of all shards; of those that are the same in content the first is selected."""
        shards = [number for number in range(self.job.shards) if self.counts(number).entries]
        digests = [self._digests(number) for number in shards]
        keep = [np.ones(len(rows), np.bool_) for rows in digests]
        buckets = -(-sum(map(len, digests)) // BUCKET)
        for bucket in range(buckets):
            for shard, row in _repeated(digests, bucket, buckets):
                keep[shard][row] = False
        tables = (table for number in shards for table in open_snapshot(self._path(number), recorded=False).tables)
        return list(zip(tables, keep, strict=True))

    def remove(self) -> None:
        """Delete the folder with all that is in it."""
        (self.folder / JOB).unlink(missing_ok=True)  # first: without it nobody takes what is left for a build
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:06}"

    def _digests(self, shard: int) -> npt.NDArray[np.uint64]:
        """(E, 2), mapped."""
        path = self._path(shard) / DIGESTS
        try:
            return np.memmap(path, "<u8", "r", shape=(self.counts(shard).entries, 2))
        except (OSError, ValueError):
            raise BundleError(f"{path}: missing or cut; delete {path.parent} and build again") from None

    def _write_job(self) -> None:
        """Whole or not at all, since other processes may begin at the same time."""
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".job.", delete=False) as file:
            temporary = Path(file.name)
        write_json(temporary, self.job)
        sync(temporary)
        temporary.replace(self.folder / JOB)
        sync(self.folder)


def _repeated(digests: Sequence[npt.NDArray[np.uint64]], bucket: int, buckets: int) -> Iterator[tuple[int, int]]:
    """Shard and row of every entry of one bucket that stands somewhere before it."""
    rows = [np.flatnonzero(found[:, 0] % np.uint64(buckets) == bucket) for found in digests]
    own = np.concatenate([found[chosen] for found, chosen in zip(digests, rows, strict=True)])
    order = np.lexsort((own[:, 1], own[:, 0]))  # stable: equal ones stay in the order of the rows
    again = order[1:][np.all(own[order[1:]] == own[order[:-1]], axis=1)]
    starts = np.cumsum([0, *map(len, rows)])
    for place in again.tolist():
        shard = int(np.searchsorted(starts, place, side="right")) - 1
        yield shard, int(rows[shard][place - starts[shard]])
