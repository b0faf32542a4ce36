"""Files as a manifest lists them: sizes, SHA-256, and names that stay inside their folder."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tinyalign_edge.errors import BundleError


@dataclass(frozen=True)
class FileEntry:
    """Of one file: its size and SHA-256 (hex)."""

    bytes: int
    sha256: str


def check_files(folder: Path, files: dict[str, FileEntry]) -> None:
    """Compare files below `folder` with their size and SHA-256.

    Raises:
        BundleError: a path that leaves the folder, a link, a missing, resized or changed file.
    """
    for name, entry in files.items():
        path = inside(folder, name)
        if not path.is_file():
            raise BundleError(f"{path}: the manifest lists it but it is missing; copy the folder again")
        if path.stat().st_size != entry.bytes:
            raise BundleError(f"{path}: {path.stat().st_size} bytes, the manifest says {entry.bytes}; copy it again")
        if file_sha256(path) != entry.sha256:
            raise BundleError(f"{path}: its SHA-256 is not the manifest's, it was changed; copy the folder again")


def inside(folder: Path, name: str) -> Path:
    """`folder / name` for a plain relative name.

    Raises:
        BundleError: the name is absolute, has a parent part, or passes through a link.
    """
    relative = PurePosixPath(name)
    if not name or "\\" in name or "\0" in name or relative.is_absolute() or ".." in relative.parts:
        raise BundleError(f"{folder}: the manifest names {name!r}, which is not a plain path inside the folder")
    path = folder
    for part in relative.parts:
        path = path / part
        if path.is_symlink():
            raise BundleError(f"{path}: is a link; bundles hold plain files only")
    return path


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
