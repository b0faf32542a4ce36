"""onnxruntime-genai, with the graph that its own model builder writes.

The builder's defaults, but for one thing: "int8-last" leaves out, in a prompt, the logits that nobody reads.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
from numpy.typing import NDArray

from tinyalign_edge.bench.peers.check import Floats, folder_bytes
from tinyalign_edge.bench.peers.worker import CAPACITY, Language

PACKAGES = ("onnxruntime-genai", "onnxruntime", "transformers")


def prepare(source: Path, folder: Path, precision: str) -> None:
    """Run the model builder on the checkpoint `source`."""
    bits, _, last = precision.partition("-")
    arguments = ["builder", "-i", str(source), "-o", str(folder), "-p", bits, "-e", "cpu", "-c", str(folder / "cache")]
    sys.argv = [*arguments, "--extra_options", "prune_lm_head=true"] if last else arguments
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")


def load(source: Path, folder: Path, precision: str, threads: int) -> Language:
    """Open what `prepare` wrote."""
    return _Genai(source, folder, threads)


class _Genai(Language):
    def __init__(self, source: Path, folder: Path, threads: int) -> None:
        config = og.Config(str(folder))
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = og.Model(config)
        self._parameters = og.GeneratorParams(self._model)
        # No end of text: the likeliest token of random weights may be any.
        self._parameters.set_search_options(max_length=CAPACITY, min_length=CAPACITY, do_sample=False)
        self._generator: Any = og.Generator(self._model, self._parameters)
        self.vocab_size = json.loads((source / "config.json").read_text())["vocab_size"]
        self.weight_bytes = folder_bytes(folder, ".onnx", ".onnx.data")
        self.length = 0

    def append(self, ids: NDArray[np.int64], *, num_logits: int = 1) -> Floats:
        self._generator.append_tokens(ids.astype(np.int32)[None])
        self.length += len(ids)
        logits: Floats = self._generator.get_logits()
        return logits.reshape(-1, self.vocab_size)

    def step(self) -> None:
        self._generator.generate_next_token()
        self.length += 1

    def truncate(self, length: int) -> None:
        self._generator.rewind_to(length)
        self.length = length
