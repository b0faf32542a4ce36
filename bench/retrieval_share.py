"""What the memory adds to the time until the first token: retrieval, and the memory tokens that are read.

    python -m tinyalign_edge.bench.retrieval_share [--entries 50000] [--tokens 3 6 12 24] [--threads 2]

A bundle in the shapes of SigLIP-B/16-224 and SmolLM2-135M with random weights (`bench/random_bundle.py`), with a visual
token for each of the 196 patches; its bank is replaced by synthetic entries (`bench/synthetic_keys.py`) of `--tokens`
tokens each. Then one picture is asked about with and without the memory, in turns, nothing kept from one question to
the next. Writes `bench/results/retrieval_share.json`; run it on an idle machine.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from tinyalign_edge.bench.random_bundle import Bundle, random_bundle, synthetic_bank
from tinyalign_edge.bench.record import record
from tinyalign_edge.progress import progress
from tinyalign_edge.runtime.model import Model

QUESTION = "What is in this picture?"
WARM_UP = 3


def main() -> None:
    """Prepare what is missing, measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="siglip-b16-224")
    parser.add_argument("--language", default="smollm2-135m")
    parser.add_argument("--entries", type=int, default=50_000)
    parser.add_argument("--tokens", nargs="+", type=int, default=[3, 6, 12, 24])
    parser.add_argument("--visual-tokens", type=int, default=196)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("runs/share"))
    given = parser.parse_args()
    shutil.rmtree(given.out, ignore_errors=True)
    bundle = random_bundle(given.encoder, given.language, given.out, visual_tokens=given.visual_tokens)
    rows = [measure(bundle, given.entries, tokens, given.threads, given.rounds) for tokens in given.tokens]
    for row in rows:
        times = " and ".join(f"{ms:.1f} ms {name}" for name, ms in row["first_token_ms"].items())
        print(
            f"{row['memory_tokens']:3} memory tokens: {times} the memory to the first token; retrieval alone adds "
            f"{row['retrieval_share']:.1%}, all {row['memory_share']:.1%}"
        )
    tokens = " ".join(map(str, given.tokens))
    command = f"--entries {given.entries} --tokens {tokens} --threads {given.threads}"
    result = {"entries": given.entries, "threads": given.threads, "rounds": given.rounds, "rows": rows}
    print(record("retrieval_share", f"python -m tinyalign_edge.bench.retrieval_share {command}", result))


def measure(bundle: Bundle, entries: int, tokens: int, threads: int, rounds: int) -> dict[str, Any]:
    """Median times to the first token of a picture that was not seen before, in turns."""
    folder = synthetic_bank(bundle.folder.with_name(f"bank-{tokens}"), bundle.manifest, entries, tokens)
    picture = bundle.picture
    with Model(bundle.folder, bundle.manifest, threads=threads, memory_dir=folder, cache_mb=0) as model:
        found = model.encode(picture)
        if len(found.memories) != model.manifest.memory.k or len(found.memory_tokens) != tokens * len(found.memories):
            raise AssertionError(f"{len(found.memories)} memories of {len(found.memory_tokens)} tokens were retrieved")
        if not np.all(np.isfinite(found.memory_tokens)):
            raise AssertionError("the memory tokens are not finite")

        first: dict[str, list[float]] = {"without": [], "with": []}
        retrieve = []
        with progress("Asking", WARM_UP + rounds) as advance:
            for _ in range(WARM_UP + rounds):
                for name, memories in (("without", ()), ("with", None)):
                    started = time.perf_counter()
                    image = model.encode(picture, memories=memories)
                    model.ask(image, QUESTION, max_new_tokens=1)
                    first[name].append((time.perf_counter() - started) * 1000)
                retrieve.append(image.timings_ms["retrieve"])
                advance()
    ms = {name: _median(times) for name, times in first.items()}
    return {
        "tokens_of_an_entry": tokens,
        "memory_tokens": len(found.memory_tokens),
        "visual_tokens": len(found.visual_tokens),
        "first_token_ms": ms,
        "samples_ms": {name: times[WARM_UP:] for name, times in first.items()},
        "retrieve_ms": _median(retrieve),
        "retrieval_share": _median(retrieve) / ms["without"],
        "memory_share": ms["with"] / ms["without"] - 1,
    }


def _median(times: list[float]) -> float:
    return statistics.median(times[WARM_UP:])


if __name__ == "__main__":
    main()
