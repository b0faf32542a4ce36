"""One process of `cold_start`: loads a bundle, answers, and tells times and its own memory.

    python -m tinyalign_edge.bench.cold_start_worker BUNDLE PICTURE THREADS CACHE_MB [PACKED_DIR]

Prints a line of JSON after the first token, and one of what it computes. Then each number on standard input is that
many answers, about as many pictures, and another line. Imports what an app imports and nothing else. Linux only.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

QUESTION = "What is in the picture?"
NEW_TOKENS = 8


def main() -> None:
    """Serve until standard input ends."""
    bundle, picture, threads, cache_mb, *packed = sys.argv[1:]
    started = time.perf_counter()
    import numpy as np
    from PIL import Image

    import tinyalign_edge as ta
    from tinyalign_edge.runtime.model import load

    imported, at_import = time.perf_counter(), memory()
    home = packed[0] if packed else None
    model = load(bundle, threads=int(threads), cache_mb=float(cache_mb), packed_dir=home)
    loaded, at_load = time.perf_counter(), memory()
    model.ask(picture, QUESTION, max_new_tokens=1)
    answered = time.perf_counter()
    times = {"import": imported - started, "load": loaded - imported, "first_token": answered - loaded}
    tell(times_ms={name: seconds * 1000 for name, seconds in times.items()}, at_import=at_import, at_load=at_load)
    logits, _ = model.answer_logits(model.encode(picture), QUESTION, "yes")
    before = time.perf_counter()
    ta.open_bundle(bundle)
    tell(logits=hashlib.sha256(logits.tobytes()).hexdigest(), verify_ms=(time.perf_counter() - before) * 1000)
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    seen = 0
    for line in sys.stdin:
        for _ in range(int(line)):
            seen += 1
            model.ask(np.roll(pixels, seen, axis=1), f"{QUESTION} {seen % 7 * 'Or '}", max_new_tokens=NEW_TOKENS)
        tell()


def tell(**more: Any) -> None:
    """Print a line: `more`, and the memory as it is."""
    print(json.dumps({**more, "memory": memory()}), flush=True)


def memory() -> dict[str, int]:
    """Bytes of this process: resident; its share of them, pages divided among those who map them; its own alone."""
    found: dict[str, int] = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split()[:2]
        found[name.rstrip(":")] = 1024 * int(value)
    private = found["Private_Clean"] + found["Private_Dirty"]
    return {"resident": found["Rss"], "share": found["Pss"], "private": private}


if __name__ == "__main__":
    main()
