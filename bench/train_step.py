"""What the memory costs a training step, on random weights of SmolLM2-135M's shape with SigLIP-B's features.

    python -m tinyalign_edge.bench.train_step [--device cpu] [--rows 8] [--steps 15]

Three arms take turns, each first in every third round: no memory; memory; and, as its control, the same number of
tokens as plain text in the place of the memory. Each step is the whole of it: features from mapped files, as
`--cache-features` leaves them, packing, both passes, AdamW. What the first two take is shown apart. Writes
`bench/results/train_step.json`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tinyalign_edge.bench.record import record
from tinyalign_edge.train.batches import Collate, Example, TokenTurn, Values
from tinyalign_edge.train.features import Features, record_type
from tinyalign_edge.train.model import AlignModel
from tinyalign_edge.train.options import COPY_DIM
from tinyalign_edge.train.settings import ConnectorSettings, MemorySettings
from tinyalign_edge.train.watcher import to_device

COMMAND = "python -m tinyalign_edge.bench.train_step"
ENTRIES, VISUAL_TOKENS, VOCABULARY = 64, 49, 49_152
SIDE, CHANNELS = 14, 768  # of SigLIP-B/16-224
QUESTION, ANSWER = 20, 12  # tokens, of two turns a row
SMOLLM2_135M = LlamaConfig(
    vocab_size=VOCABULARY, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True,
)  # fmt: skip


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=15)
    given = parser.parse_args()
    result: dict[str, Any] = {"device": given.device, "rows": given.rows, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        features = _mapped_features(Path(folder))
        for kind in ("tokens", "latents"):
            result[kind] = measure(kind, features, torch.device(given.device), rows=given.rows, steps=given.steps)
    print(record("train_step", COMMAND, result))


def measure(kind: Any, features: Features, device: torch.device, *, rows: int, steps: int) -> dict[str, Any]:
    """Median seconds a step of each arm, and by how much memory is slower than as much text, step beside step."""
    torch.manual_seed(0)
    language = AutoModelForCausalLM.from_config(SMOLLM2_135M).requires_grad_(False)
    connector = ConnectorSettings(SIDE, SIDE, CHANNELS, VISUAL_TOKENS, SMOLLM2_135M.hidden_size)
    memory = MemorySettings(kind=kind, copy_dim=COPY_DIM if kind == "tokens" else 0)  # as `train` makes them
    model = AlignModel(language, connector, memory).to(device).train()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad])
    collate = Collate(memory, _values(memory, features))
    arms = ("none", "memory", "text")
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    packing: dict[str, list[float]] = {arm: [] for arm in arms}
    tokens = {}
    for step in range(steps + 1):
        for arm in (*arms[step % 3 :], *arms[: step % 3]):
            start = time.perf_counter()
            batch = collate(_rows(arm, memory, features, rows))
            packed = time.perf_counter()
            loss = model(**to_device(batch, device))["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()  # waits for the device
            if step:  # the first warms up
                seconds[arm].append(time.perf_counter() - start)
                packing[arm].append(packed - start)
            tokens[arm] = batch["input_ids"].shape[1]
    assert tokens["memory"] == tokens["text"]
    slower = np.divide(seconds["memory"], seconds["text"]) - 1
    return {
        "tokens_a_row": tokens,
        "seconds": {arm: round(float(np.median(times)), 4) for arm, times in seconds.items()},
        "seconds_packing": {arm: round(float(np.median(times)), 4) for arm, times in packing.items()},
        "spread": {arm: round(_spread(times), 4) for arm, times in seconds.items()},
        "memory_beyond_its_tokens": round(float(np.median(slower)), 4),
        "memory_beyond_its_tokens_spread": round(_spread(slower), 4),
    }


def _spread(values: Any) -> float:
    """Between the quartiles."""
    return float(np.subtract(*np.percentile(values, [75, 25])))


def _mapped_features(folder: Path) -> Features:
    """Of `ENTRIES` pictures, in one file as a cache has them."""
    block = np.zeros(ENTRIES, record_type((VISUAL_TOKENS, CHANNELS), CHANNELS))
    block["pooled"] = np.random.default_rng(0).normal(size=block["pooled"].shape)
    path = folder / "one.features"
    path.write_bytes(block.tobytes())
    places = np.stack([np.zeros(ENTRIES, np.int64), np.arange(ENTRIES)], axis=1)
    return Features([np.memmap(path, block.dtype, mode="r")], places, block.dtype)


def _values(memory: MemorySettings, features: Features) -> Values:
    rng = np.random.default_rng(0)
    ids = [tuple(rng.integers(0, VOCABULARY, memory.value_tokens).tolist()) for _ in range(ENTRIES)]
    return Values(ids, features.pooled)


def _rows(arm: str, memory: MemorySettings, features: Features, count: int) -> list[Example]:
    rng = np.random.default_rng(1)

    def ids(size: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, VOCABULARY, size).tolist())

    per_entry = memory.latents if memory.kind == "latents" else memory.value_tokens
    before = ids(1 + (memory.k * per_entry if arm == "text" else 0))
    near = memory.k if arm == "memory" else 0
    return [
        Example(
            before,
            (TokenTurn(ids(QUESTION), ids(ANSWER)), TokenTurn(ids(QUESTION), ids(ANSWER))),
            features.pooled([row])[0],
            tuple(rng.integers(0, ENTRIES, near).tolist()),
            (0.9,) * near,
        )
        for row in range(count)
    ]


if __name__ == "__main__":
    main()
