"""Reads and searches a memory bank as `docs/memory-format.md` says, with numpy and nothing of the package."""

import hashlib
import itertools
import json
import struct
from pathlib import Path

import numpy as np


def read_bank(folder: Path) -> dict:
    """{id: (key, value, record)} of all entries."""
    raw = (folder / "manifest.json").read_bytes()
    manifest = json.loads(raw)
    own = manifest["self_sha256"].encode()
    assert hashlib.sha256(raw.replace(own, b"0" * 64)).hexdigest().encode() == own
    entries = {}
    for segment in manifest["segments"]:
        entries |= read_segment((folder / segment["file"]).read_bytes(), segment, manifest["spec"])
    if journal := manifest["journal"]:
        entries |= read_journal((folder / journal["file"]).read_bytes(), journal, manifest["spec"])
    return entries


def read_segment(data: bytes, segment: dict, spec: dict) -> dict:
    assert hashlib.sha256(data).hexdigest() == segment["sha256"]
    at, n, latents = 0, segment["count"], (spec["latents"], spec["latent_dim"])

    def section(dtype: str, *shape: int) -> np.ndarray:
        nonlocal at
        array = np.frombuffer(data, dtype, int(np.prod(shape)), at).reshape(shape)
        at += -(-array.nbytes // 64) * 64
        return array

    ids, scales, keys = section("<u8", n), section("<f4", n), section("i1", n, spec["key_dim"])
    words = np.zeros(n + 1, int) if spec["kind"] == "latents" else section("<u8", n + 1)
    tokens, marks = section("<i4", segment["token_count"]), section("<f4", n, latents[0])
    numbers = section("i1", n, *latents)
    starts, records = section("<u8", n + 1), section("u1", segment["record_bytes"]).tobytes()
    entries = {}
    for i in range(n):
        value = read_value(spec, tokens[words[i] : words[i + 1]], numbers[i] * marks[i][:, None])
        entries[int(ids[i])] = keys[i] * scales[i], value, read_record(records[starts[i] : starts[i + 1]])
    return entries


def read_journal(data: bytes, journal: dict, spec: dict) -> dict:
    entries, at, digest, latents = {}, 0, bytes(32), (spec["latents"], spec["latent_dim"])
    while at < journal["bytes"]:
        size, number, scale, items = struct.unpack_from("<IQfI", data, at)
        entry, at = data[at : at + size], at + size + 32
        digest = hashlib.sha256(digest + entry).digest()
        assert digest == data[at - 32 : at]
        words = 0 if spec["kind"] == "latents" else items
        ends = np.cumsum([20, spec["key_dim"], 4 * latents[0], 4 * words, latents[0] * latents[1]])
        key, marks, tokens, numbers = (entry[a:b] for a, b in itertools.pairwise(ends))
        numbers = np.frombuffer(numbers, "i1").reshape(latents) * np.frombuffer(marks, "<f4")[:, None]
        value = read_value(spec, np.frombuffer(tokens, "<i4"), numbers)
        entries[number] = np.frombuffer(key, "i1") * np.float32(scale), value, read_record(entry[ends[-1] :])
    assert digest.hex() == journal["digest"]
    return entries


def read_value(spec: dict, tokens: np.ndarray, latents: np.ndarray) -> np.ndarray | tuple:
    return {"tokens": tokens, "latents": latents, "hybrid": (tokens, latents)}[spec["kind"]]


def read_record(data: bytes) -> dict:
    text, _, thumbnail = data.partition(b"\n")
    return json.loads(text) | ({"thumbnail": thumbnail} if thumbnail else {})


def search(entries: dict, query: np.ndarray, k: int) -> list[int]:
    score = {number: float(key @ query) for number, (key, _, _) in entries.items()}
    return sorted(score, key=lambda number: (-score[number], number))[:k]
