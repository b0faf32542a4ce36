"""Build a bank for a bundle from conversation files: in shards, on one process or many, interrupted or not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tinyalign_edge.bundle import MANIFEST, MEMORY_DIR, Manifest, file_sha256, inside, open_bundle
from tinyalign_edge.data import Row, check_images, parse_row
from tinyalign_edge.errors import InputError
from tinyalign_edge.jsonrows import RowFile
from tinyalign_edge.memory.layout import BankManifest, BankSpec
from tinyalign_edge.memory.lock import exclusive
from tinyalign_edge.memory.manifest import read_manifest
from tinyalign_edge.memory.publish import check_target, publish
from tinyalign_edge.memory.shards import Counts, Job, Shards
from tinyalign_edge.progress import progress
from tinyalign_edge.runtime.entries import EntryMaker, NewEntry, check_can_build, side_by_side
from tinyalign_edge.runtime.launch import Part, part_of_environment, threads
from tinyalign_edge.runtime.model import load

WORK_SUFFIX = ".build"


@dataclass(frozen=True)
class BuildOptions:
    """How a bank is built.

    Attributes:
        shard_rows: rows of a shard, the unit that is not repeated after an interruption.
        skip_bad: count rows that cannot be used, instead of ending with the first.
        value_tokens: token ids kept of an entry, at most the bundle's; None: as many as the bundle's.
        part: what this process does; None: what `torchrun` or `accelerate launch` say, or all.
    """

    shard_rows: int = 4096
    skip_bad: bool = False
    value_tokens: int | None = None
    part: Part | None = None


@dataclass(frozen=True)
class Built:
    """What a call of `build` left. Unless `complete`, other processes have shards to make and no bank was changed."""

    complete: bool
    shards: int
    shards_done: int
    rows: int
    skipped: int = 0
    duplicates: int = 0
    entries: int = 0
    bytes: int = 0


def build(bundle: Path, *, data: Path, images: Path, out: Path | None = None, options: BuildOptions) -> Built:
    """Build a bank from the rows of `data` and put it in the place of the bundle's own, or of the one in `out`.

    Shards are collected in a folder beside it (`work_folder`). Who finishes the last one joins them; until then the old
    bank stays as it is. The result does not depend on the number of processes or interruptions: it is equal byte for
    byte, on processors that compute the same keys.

    Raises:
        InputError: not a bundle with a memory, a bad row (named), or `out` holds something else.
        UnsupportedError: the bundle's memory is of latents.
        BundleError: damaged, hostile or too new.
        TinyAlignError: the disk is full, or the folder cannot be written; finished shards are kept.
    """
    manifest = open_bundle(bundle)
    check_can_build(bundle, manifest)
    target = inside(bundle, MEMORY_DIR) if out is None else out
    check_target(target)
    if options.shard_rows < 1:
        raise InputError(f"--shard-rows {options.shard_rows}: must be at least 1")
    value_tokens, part = _value_tokens(manifest, options), options.part or part_of_environment()
    file = checked_rows(data, images, skip_bad=options.skip_bad)
    job = Job(
        data_sha256=file_sha256(data),
        rows=len(file),
        bundle_sha256=file_sha256(bundle / MANIFEST),
        shard_rows=options.shard_rows,
        value_tokens=value_tokens,
        skip_bad=options.skip_bad,
    )
    if part.index >= job.shards:  # nothing to do; the others may have finished already
        return Built(False, job.shards, 0, job.rows)
    shards = Shards(work_folder(bundle, out), job, bank_spec(manifest))
    _make_shards(bundle, shards, file, images, part)
    try:
        with exclusive(shards.folder):
            if shards.is_open():
                done = shards.done()
                return _finish(shards, target) if done == job.shards else Built(False, job.shards, done, job.rows)
    except FileNotFoundError:
        pass
    return _built(job, read_manifest(target), skipped=0, duplicates=0)  # another process has joined them meanwhile


def work_folder(bundle: Path, out: Path | None) -> Path:
    """Where the shards of an unfinished build are: beside the bundle, or beside the folder of the memory."""
    home = bundle.resolve() if out is None else out.resolve()
    return home.with_name(home.name + WORK_SUFFIX)


def checked_rows(data: Path, images: Path, *, skip_bad: bool) -> RowFile:
    """The rows of a file, after a look at each of them, so that errors come before the long work.

    Raises:
        InputError: there are none, or one is bad, unless those are to be skipped.
    """
    check_images(images)
    file = RowFile(data)
    if not len(file):
        raise InputError(f"{data}: holds no rows")
    if not skip_bad:
        with progress("Checking rows", len(file)) as advance:
            for number in range(len(file)):
                read_row(file, number, images)
                advance()
    return file


def read_row(file: RowFile, number: int, images: Path) -> Row:
    """One row of a conversation file, counted from 0."""
    return parse_row(file[number], f"{file.path} row {number + 1}", images)


def bank_spec(manifest: Manifest) -> BankSpec:
    """What the entries of a bundle's bank are made of."""
    memory = manifest.memory
    return BankSpec(
        kind="latents" if memory.kind == "latents" else "tokens",
        key_dim=memory.key_dim,
        latents=memory.latents,
        latent_dim=memory.latent_dim,
        vocab_size=manifest.decoder.vocab_size,
        fingerprint=memory.fingerprint,
    )


def _value_tokens(manifest: Manifest, options: BuildOptions) -> int:
    most = manifest.memory.value_tokens
    tokens = most if options.value_tokens is None else options.value_tokens
    if not 0 < tokens <= most:
        raise InputError(f"--value-tokens {tokens}: must be from 1 to {most}, what the bundle was trained on")
    return tokens


def _make_shards(bundle: Path, shards: Shards, file: RowFile, images: Path, part: Part) -> None:
    """Write those of this process's shards that are not finished yet."""
    job = shards.job
    own = range(part.index, job.shards, part.count)
    missing = [number for number in own if not shards.finished(number)]
    if not missing:
        return
    with progress("Building the memory", sum(len(job.rows_of(number)) for number in own)) as advance:
        advance(sum(len(job.rows_of(number)) for number in own if number not in missing))
        with load(bundle, memory=False, threads=threads()) as model:
            maker = EntryMaker(model, value_tokens=job.value_tokens)
            for number in missing:
                entries, skipped = list[NewEntry](), 0
                for row_number in job.rows_of(number):
                    try:
                        entries.append(maker.entry(read_row(file, row_number, images)))
                    except InputError:
                        if not job.skip_bad:
                            raise
                        skipped += 1
                    advance()
                shards.write(number, side_by_side(entries, model.manifest), Counts(len(entries), skipped))


def _finish(shards: Shards, target: Path) -> Built:
    """Join all shards in `target` and remove them."""
    counts = [shards.counts(number) for number in range(shards.job.shards)]
    skipped = sum(count.skipped for count in counts)
    if skipped == shards.job.rows:
        raise InputError(f"{shards.folder}: none of the {skipped} rows can be used; build without --skip-bad to see why")
    manifest = publish(target, shards.spec, shards.distinct())
    duplicates = sum(count.entries for count in counts) - manifest.count
    shards.remove()
    return _built(shards.job, manifest, skipped=skipped, duplicates=duplicates)


def _built(job: Job, manifest: BankManifest, *, skipped: int, duplicates: int) -> Built:
    size = sum(segment.bytes for segment in manifest.segments)
    return Built(True, job.shards, job.shards, job.rows, skipped, duplicates, manifest.count, size)
