"""This package: what `export` writes, run as a bundle runs it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tinyalign_edge.bench.peers.check import Floats, folder_bytes
from tinyalign_edge.bench.peers.worker import CAPACITY, Language
from tinyalign_edge.bundle import DecoderBlock, Format
from tinyalign_edge.config import from_json, read_json, write_json
from tinyalign_edge.runtime.decoder import Decoder

PACKAGES = ("tinyalign-edge", "onnxruntime")
BLOCK = "block.json"
FORMATS: dict[str, Format] = {"int8": "int8", "int4": "int4_weight", "fp32": "fp32"}  # as `export` writes them


def prepare(source: Path, folder: Path, precision: str) -> None:
    """Export the checkpoint `source` into `folder`."""
    from safetensors.numpy import load_file

    from tinyalign_edge.export.decoder import export_decoder
    from tinyalign_edge.export.processor import own_plan

    weights = load_file(source / "model.safetensors")
    block = export_decoder(read_json(source / "config.json"), weights, folder, plan=own_plan(FORMATS[precision]))
    write_json(folder / BLOCK, block)


def load(source: Path, folder: Path, precision: str, threads: int) -> Language:
    """Open what `prepare` wrote."""
    return _Edge(folder, threads)


def read_block(folder: Path) -> DecoderBlock:
    """What `prepare` wrote there."""
    return from_json(DecoderBlock, read_json(folder / BLOCK), BLOCK)


class _Edge(Language):
    def __init__(self, folder: Path, threads: int) -> None:
        block = read_block(folder)
        self._decoder = Decoder(folder, block, threads=threads)
        self._cache = self._decoder.new_cache(CAPACITY)
        self._logits: Floats = np.zeros((1, block.vocab_size), np.float32)
        self.vocab_size = block.vocab_size
        self.weight_bytes = folder_bytes(folder, ".onnx", ".data")

    @property
    def length(self) -> int:  # type: ignore[override]
        return self._cache.length

    def append(self, ids: NDArray[np.int64], *, num_logits: int = 1) -> Floats:
        self._logits = self._decoder.forward(self._cache, self._decoder.embed(ids), num_logits)
        return self._logits

    def step(self) -> None:
        self.append(np.array([self._logits[-1].argmax()]))

    def truncate(self, length: int) -> None:
        self._cache.truncate(length)
