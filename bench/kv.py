"""Decoding with a float32 and with an int8 cache of keys and values: speed at long contexts, bytes, and what is lost.

    python -m tinyalign_edge.bench.kv [--model smollm2-135m] [--threads 2]

Random weights in int8 in the shape of a public model; the two caches are measured in turn on an idle machine. Writes
`bench/results/kv.json`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tinyalign_edge.bench.peers.check import REFERENCE, Floats, check_ids, checked_positions, compare_logits, passes
from tinyalign_edge.bench.peers.shapes import LANGUAGE, write_language
from tinyalign_edge.bench.record import record
from tinyalign_edge.bundle import CachePrecision
from tinyalign_edge.config import read_json
from tinyalign_edge.errors import GateError
from tinyalign_edge.export.cache_scales import cache_scales
from tinyalign_edge.export.decoder import export_decoder
from tinyalign_edge.export.families import read_architecture
from tinyalign_edge.export.processor import own_plan
from tinyalign_edge.runtime.decoder import Cache, Decoder

COMMAND = "python -m tinyalign_edge.bench.kv"
CACHES: tuple[CachePrecision, ...] = ("fp32", "int8")
CONTEXTS = (1024, 4096)
ROUNDS, STEPS = 9, 16
CALIBRATION_TEXTS, CALIBRATION_TOKENS, CHUNK = 4, 256, 512


@dataclass(frozen=True)
class Speed:
    """Decoded tokens a second at a context, over the rounds."""

    kv: CachePrecision
    context: int
    median_per_s: float
    least_per_s: float
    most_per_s: float


def main() -> None:
    """Check, measure, write."""
    given = _arguments()
    with tempfile.TemporaryDirectory() as scratch:
        decoders = write_decoders(given.model, Path(scratch), threads=given.threads)
        lost = compare_caches(decoders, np.load(Path(scratch) / "source" / REFERENCE))
        print(f"against torch: {lost}")
        longest = decoders["fp32"].block.max_positions - STEPS
        rows = measure(decoders, tuple(n for n in CONTEXTS if n <= longest), rounds=ROUNDS)
    for row in rows:
        print(f"{row.kv:5} at {row.context}: {row.median_per_s:.1f} tok/s ({row.least_per_s:.1f}-{row.most_per_s:.1f})")
    command = f"{COMMAND} --model {given.model} --threads {given.threads}"
    position_bytes = {kv: decoder.block.position_bytes for kv, decoder in decoders.items()}
    result = {"model": given.model, "threads": given.threads, "rounds": ROUNDS, "steps": STEPS}
    rows_json = [asdict(row) for row in rows]
    print(record("kv", command, result | {"position_bytes": position_bytes, "logits": lost, "rows": rows_json}))


def write_decoders(model: str, folder: Path, *, threads: int) -> dict[CachePrecision, Decoder]:
    """The model with int8 weights and each cache; its checkpoint in `folder/source`."""
    source = folder / "source"
    write_language(model, source)
    weights, arch = load_file(source / "model.safetensors"), read_architecture(read_json(source / "config.json"))
    rng = np.random.default_rng(1)
    decoders: dict[CachePrecision, Decoder] = {}
    scales: Floats | None = None
    for kv in CACHES:
        (folder / kv).mkdir()
        block = export_decoder(arch, weights, folder / kv, plan=own_plan("int8"), scales=scales)
        decoders[kv] = Decoder(folder / kv, block, threads=threads)
        if kv == "fp32":
            ids = rng.integers(3, arch.vocab_size, (CALIBRATION_TEXTS, CALIBRATION_TOKENS))
            scales = cache_scales(arch, decoders[kv], map(decoders[kv].embed, ids))
    return decoders


def compare_caches(decoders: dict[CachePrecision, Decoder], wanted: Floats) -> dict[str, dict[str, float]]:
    """Figures of `compare_logits` against torch for each cache, and of the caches against each other.

    Raises:
        GateError: the int8 cache changes what is computed.
    """
    logits = {kv: _checked_logits(decoder) for kv, decoder in decoders.items()}
    figures = {str(kv): compare_logits(found, wanted) for kv, found in logits.items()}
    figures["int8 against fp32"] = compare_logits(logits["int8"], logits["fp32"])
    if not passes("int8", figures["int8 against fp32"]):
        raise GateError(f"the int8 cache computes something else: {figures}")
    return figures


def measure(
    decoders: dict[CachePrecision, Decoder], contexts: tuple[int, ...], *, rounds: int, steps: int = STEPS
) -> list[Speed]:
    """Decode `steps` tokens at each context with each cache, in turn, `rounds` times."""
    caches = {kv: _filled(decoder, max(contexts) + steps) for kv, decoder in decoders.items()}
    samples: dict[tuple[CachePrecision, int], list[float]] = {(kv, n): [] for n in contexts for kv in decoders}
    for _ in range(rounds):
        for (kv, context), found in samples.items():
            found.append(_decode_rate(decoders[kv], caches[kv], context, steps))
    return [Speed(kv, n, float(np.median(s)), min(s), max(s)) for (kv, n), s in samples.items()]


def _checked_logits(decoder: Decoder) -> Floats:
    """Logits of the checked positions: a prompt, then one token at a time, as `REFERENCE` has them."""
    ids = check_ids(decoder.block.vocab_size)
    start = checked_positions().start + 1
    cache = decoder.new_cache(len(ids))
    pieces = [decoder.forward(cache, decoder.embed(ids[:start]))]
    pieces += [decoder.forward(cache, decoder.embed([i])) for i in ids[start:]]
    return np.concatenate(pieces)


def _filled(decoder: Decoder, capacity: int) -> Cache:
    cache = decoder.new_cache(capacity)
    ids = np.random.default_rng(2).integers(3, decoder.block.vocab_size, capacity)
    for start in range(0, capacity, CHUNK):
        decoder.forward(cache, decoder.embed(ids[start : start + CHUNK]))
    return cache


def _decode_rate(decoder: Decoder, cache: Cache, context: int, steps: int) -> float:
    """Tokens a second; what lies behind `context` is written over by what was there before."""
    cache.length = context
    token = decoder.embed([3])
    decoder.forward(cache, token)  # buffers of one token, bound before the clock starts
    cache.length = context
    start = time.perf_counter()
    for _ in range(steps):
        logits = decoder.forward(cache, token)
        token = decoder.embed([int(logits[0].argmax())])
    return steps / (time.perf_counter() - start)


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", choices=LANGUAGE)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
