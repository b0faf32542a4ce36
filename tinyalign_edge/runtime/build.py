"""Build a bank for a bundle from conversation files: in shards, on one process or many, interrupted or not."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from tinyalign_edge.bundle import MANIFEST, MEMORY_DIR, Manifest, open_bundle
from tinyalign_edge.data import Row, check_images, one_picture, parse_row
from tinyalign_edge.errors import InputError
from tinyalign_edge.files import file_sha256, inside
from tinyalign_edge.jsonrows import RowFile
from tinyalign_edge.memory import Bank
from tinyalign_edge.memory.layout import BankManifest, BankSpec
from tinyalign_edge.memory.lock import exclusive
from tinyalign_edge.memory.manifest import read_manifest
from tinyalign_edge.memory.publish import publish
from tinyalign_edge.memory.shards import Counts, Job, Shards
from tinyalign_edge.memory.shown import build_due_graph
from tinyalign_edge.memory.target import check_target
from tinyalign_edge.progress import progress
from tinyalign_edge.runtime.budget import BudgetPoint, check_budget, fit
from tinyalign_edge.runtime.entries import EntryMaker, NewEntry, side_by_side
from tinyalign_edge.runtime.launch import Part, part_of_environment, threads
from tinyalign_edge.runtime.memory import check_has_memory
from tinyalign_edge.runtime.model import load

WORK_SUFFIX = ".build"
HELD_BACK_SHARE = 0.1
HELD_BACK_ROWS = 256


@dataclass(frozen=True)
class BuildOptions:
    """How a bank is built.

    Attributes:
        shard_rows: rows of a shard, the unit that is not repeated after an interruption.
        skip_bad: count rows that cannot be used, instead of ending with the first.
        value_tokens: token ids kept of an entry, at most the bundle's; None: as many as the bundle's. Where fewer cut
            an entry short, the copy term takes what is left for the whole.
        thumbnails: keep a small JPEG of every entry's picture.
        part: what this process does; None: what `torchrun` or `accelerate launch` say, or all.
        budget_bytes: what the bank's files may take, its graph apart; None: all entries are kept.
        held_out: conversations, of the same images folder, whose loss is measured at budgets around that one; None:
            a share of the pictures, at most about `HELD_BACK_ROWS` rows, is held back from the bank for it.
    """

    shard_rows: int = 1024
    skip_bad: bool = False
    value_tokens: int | None = None
    thumbnails: bool = False
    part: Part | None = None
    budget_bytes: int | None = None
    held_out: Path | None = None


@dataclass(frozen=True)
class Built:
    """What a call of `build` left. Unless `complete`, other processes have shards to make and no bank was changed.

    `bytes` are those of the entries; a graph takes `graph_bytes` more. What became of the rows is None where another
    process joined the shards, or nobody yet: it is not known then.
    """

    complete: bool
    shards: int
    shards_done: int
    rows: int
    skipped: int | None = None
    duplicates: int | None = None
    entries: int = 0
    bytes: int = 0
    graph_bytes: int = 0
    without_picture: int | None = None
    held_back: int | None = None
    points: tuple[BudgetPoint, ...] = ()  # with a budget: what was measured


def build(bundle: Path, *, data: Path, images: Path, out: Path | None = None, options: BuildOptions) -> Built:
    """Build a bank from the rows of `data` and put it in the place of the bundle's own, or of the one in `out`.

    An entry is found by the first picture of its row, as in training; rows that are text alone become none. Shards are
    collected in a folder beside the bank (`work_folder`). Who finishes the last one joins them, and builds the graph of
    a large bank; until then the old bank stays as it is. The result does not depend on the number of processes or
    interruptions: it is equal byte for byte, on processors that compute the same keys.

    Raises:
        InputError: not a bundle with a memory, a bad row (named), or `out` holds something else.
        BundleError: damaged, hostile or too new, be it the bank that `out` holds.
        TinyAlignError: the disk is full, or the folder cannot be written; finished shards are kept.
    """
    manifest = open_bundle(bundle)
    check_has_memory(bundle, manifest)
    target = inside(bundle, MEMORY_DIR) if out is None else out
    check_target(target)
    if options.budget_bytes is not None:
        check_budget(options.budget_bytes)
    if options.shard_rows < 1:
        raise InputError(f"--shard-rows {options.shard_rows}: must be at least 1")
    value_tokens, part = _value_tokens(manifest, options), options.part or part_of_environment()
    file = checked_rows(data, images, skip_bad=options.skip_bad)
    held_out = _HeldOut(file, images, options)
    job = Job(
        data_sha256=file_sha256(data),
        rows=len(file),
        bundle_sha256=file_sha256(bundle / MANIFEST),
        shard_rows=options.shard_rows,
        value_tokens=value_tokens,
        skip_bad=options.skip_bad,
        thumbnails=options.thumbnails,
        held_back=held_out.share,
    )
    if part.index >= job.shards:  # nothing to do; the others may have finished already
        return Built(False, job.shards, 0, job.rows)
    shards = Shards(work_folder(bundle, out), job, bank_spec(manifest))
    _make_shards(bundle, shards, file, images, part)
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive(shards.folder))
        except FileNotFoundError:  # another process has joined them meanwhile
            return _built(job, read_manifest(target))
        if not shards.is_open():  # while this one waited
            return _built(job, read_manifest(target))
        done = shards.done()
        if done < job.shards:
            return Built(False, job.shards, done, job.rows)
        built = _finish(bundle, shards, target, options.budget_bytes, held_out)
    bank = Bank(target)
    build_due_graph(bank)
    graph = bank.manifest.graph
    return replace(built, graph_bytes=graph.bytes if graph else 0)


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
        with progress("Checking rows", len(file), brief=True) as advance:
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
    assert memory.kind != "none"
    return BankSpec(
        kind=memory.kind,
        key_dim=memory.key_dim,
        latents=memory.latents,
        latent_dim=memory.latent_dim,
        vocab_size=manifest.decoder.vocab_size,
        fingerprint=memory.fingerprint,
    )


class _HeldOut:
    """The rows that the loss is measured on: of a file of their own, or held back from the data."""

    def __init__(self, data: RowFile, images: Path, options: BuildOptions) -> None:
        self._file, self._images, self.share = data, images, 0.0
        if options.budget_bytes is not None and options.held_out is None:
            self.share = min(HELD_BACK_SHARE, HELD_BACK_ROWS / len(data))
        elif options.held_out is not None:
            self._file = checked_rows(options.held_out, images, skip_bad=True)
            for _ in self.rows():  # errors come before the long work
                pass
        if self.share and next(iter(self.rows()), None) is None:
            raise InputError(f"{data.path}: too few rows to hold some back; give --held-out")

    def rows(self) -> Iterator[Row]:
        """One after another, of one picture each; others are left out of what was held back."""
        for number in range(len(self._file)):
            try:
                row = one_picture(read_row(self._file, number, self._images))
            except InputError:
                if self.share:
                    continue
                raise
            if not self.share or is_held_back(row, self.share):
                yield row


def is_held_back(row: Row, share: float) -> bool:
    """Whether a row has one of the `share` of the pictures that are held back; the same on every machine."""
    return any(zlib.crc32(picture.name.encode()) < share * 2**32 for picture in row.pictures)


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
            maker = EntryMaker(model, value_tokens=job.value_tokens, thumbnails=job.thumbnails)
            for number in missing:
                entries, skipped, held_back, without_picture = list[NewEntry](), 0, 0, 0
                for row_number in job.rows_of(number):
                    try:
                        row = read_row(file, row_number, images)
                        if not row.pictures:
                            without_picture += 1
                        elif is_held_back(row, job.held_back):
                            held_back += 1
                        else:
                            entries.extend(maker.entries(row))
                    except InputError:
                        if not job.skip_bad:
                            raise
                        skipped += 1
                    advance()
                counts = Counts(len(entries), skipped, held_back, without_picture)
                shards.write(number, side_by_side(entries, model.manifest), counts)


def _finish(bundle: Path, shards: Shards, target: Path, budget_bytes: int | None, held_out: _HeldOut) -> Built:
    """Join all shards in `target` and remove them."""
    counts = [shards.counts(number) for number in range(shards.job.shards)]
    total = Counts(*(sum(column) for column in zip(*map(astuple, counts), strict=True)))
    if not total.entries:
        raise InputError(
            f"{shards.folder}: no row can be used, {total.skipped} are bad and {total.without_picture} have no "
            "picture; give rows with pictures that can be read"
        )
    selected, points = shards.distinct(), tuple[BudgetPoint, ...]()
    distinct = sum(int(keep.sum()) for _, keep in selected)
    if budget_bytes is not None:
        everything = shards.folder / "everything"
        publish(everything, shards.spec, selected)
        fitted = fit(bundle, everything, shards.spec, budget_bytes, held_out.rows())
        selected, points = [(fitted.table, fitted.keep)], fitted.points
    manifest = publish(target, shards.spec, selected)
    shards.remove()
    built = _built(shards.job, manifest)
    duplicates = total.entries - distinct
    return replace(
        built,
        skipped=total.skipped,
        held_back=total.held_back,
        without_picture=total.without_picture,
        duplicates=duplicates,
        points=points,
    )


def _built(job: Job, manifest: BankManifest) -> Built:
    size = sum(segment.bytes for segment in manifest.segments)
    graph_bytes = manifest.graph.bytes if manifest.graph else 0
    return Built(True, job.shards, job.shards, job.rows, entries=manifest.count, bytes=size, graph_bytes=graph_bytes)
