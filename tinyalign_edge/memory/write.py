"""Write a bank folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tinyalign_edge.bundle import FileEntry, file_sha256
from tinyalign_edge.config import write_json
from tinyalign_edge.memory import layout
from tinyalign_edge.memory.search import quantize_keys


@dataclass(frozen=True)
class Record:
    """What an entry says and where it comes from."""

    text: str
    question: str
    source: str


def write_bank(
    folder: Path,
    keys: npt.NDArray[np.float32],
    records: Sequence[Record],
    *,
    fingerprint: str,
    vocab_size: int,
    token_ids: Sequence[Sequence[int]] | None = None,
    latents: npt.NDArray[np.float32] | None = None,
) -> layout.BankManifest:
    """Write a new bank into the empty `folder`.

    Args:
        keys: (E, key_dim) float32, unit rows.
        records: E of them.
        fingerprint: of the encoder and key projection that made the keys.
        vocab_size: bound of the token ids.
        token_ids: the values of a bank of kind "tokens", E sequences.
        latents: the values of a bank of kind "latents", (E, L, latent_dim) float32.
    """
    folder.mkdir(parents=True, exist_ok=True)
    quantised, scales = quantize_keys(keys)
    arrays: dict[str, npt.NDArray[np.generic]] = {layout.KEYS: quantised, layout.KEY_SCALES: scales}
    if latents is None:
        assert token_ids is not None
        arrays[layout.VALUES] = np.array([i for ids in token_ids for i in ids], "<i4")
        arrays[layout.VALUE_OFFSETS] = _offsets([len(ids) for ids in token_ids])
    else:
        peak = np.maximum(np.abs(latents).max(axis=2), 1e-12)  # (E, L)
        arrays[layout.VALUES] = np.round(latents / peak[..., None] * 127).astype(np.int8)
        arrays[layout.VALUE_SCALES] = (peak / 127).astype("<f4")
    lines = [json.dumps(vars(record), ensure_ascii=False).encode() + b"\n" for record in records]
    arrays[layout.RECORD_OFFSETS] = _offsets([len(line) for line in lines])
    for name, array in arrays.items():
        array.tofile(folder / name)
    (folder / layout.RECORDS).write_bytes(b"".join(lines))
    manifest = layout.BankManifest(
        schema_version=layout.SCHEMA_VERSION,
        generation=1,
        count=len(keys),
        kind="tokens" if latents is None else "latents",
        key_dim=keys.shape[1],
        latents=0 if latents is None else latents.shape[1],
        latent_dim=0 if latents is None else latents.shape[2],
        vocab_size=vocab_size,
        fingerprint=fingerprint,
    )
    names = sorted([*arrays, layout.RECORDS])
    files = {name: FileEntry((folder / name).stat().st_size, file_sha256(folder / name)) for name in names}
    manifest = replace(manifest, files=files)
    write_json(folder / layout.MANIFEST, manifest)
    return manifest


def _offsets(lengths: Sequence[int]) -> npt.NDArray[np.uint64]:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.uint64)]).astype("<u8")
