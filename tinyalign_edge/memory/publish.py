"""Put a bank that was built from data in the place of what a folder holds, at once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tinyalign_edge.folders import sync
from tinyalign_edge.memory.join import Selected, write_joined
from tinyalign_edge.memory.layout import SCHEMA_VERSION, BankManifest, BankSpec
from tinyalign_edge.memory.manifest import TEMPORARY, write_manifest
from tinyalign_edge.memory.target import check_target, claimed, standing
from tinyalign_edge.memory.write import generation_of, segment_name, sweep


def publish(folder: Path, spec: BankSpec, parts: Sequence[Selected]) -> BankManifest:
    """Make the selected entries of `parts` all that the bank `folder` holds; a new folder becomes a bank.

    Readers see the old bank until the new one stands. Ids go on after those that the old bank gave.

    Raises:
        InputError, BundleError: as `check_target`.
        TinyAlignError: the folder cannot be written; what it held is as it was.
    """
    check_target(folder)
    with claimed(folder):
        return _replace(folder, spec, parts)


def _replace(folder: Path, spec: BankSpec, parts: Sequence[Selected]) -> BankManifest:
    before = standing(folder)
    used = [generation_of(path.name) for path in folder.iterdir()]  # also of what killed writers left
    generation = 1 + max([before.generation if before else 0, *used])
    path = folder / segment_name(generation, 0)
    next_id = before.next_id if before else 0
    try:
        (folder / TEMPORARY).unlink(missing_ok=True)  # left by a writer that died
        segment = write_joined(path, parts, spec, first_id=next_id)
        segments = (segment,) if segment else ()
        next_id += segment.count if segment else 0
        manifest = BankManifest(SCHEMA_VERSION, generation, next_id, spec, segments, None, "")
        sync(folder)
        write_manifest(folder, manifest)
    except OSError:
        with suppress(OSError):
            for left in (path, folder / TEMPORARY):
                left.unlink(missing_ok=True)
        raise
    sweep(folder, manifest)
    return manifest
