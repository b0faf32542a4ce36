"""The second question about a picture beside the first: time to the first token, of the language model alone.

    python -m tinyalign_edge.bench.second_question [--model smollm2-135m] [--visual-tokens 196] [--memory-tokens 48]
        [--text-tokens 24] [--threads 2] [--rounds 15]

Random weights in the model's public shape, random picture and memory tokens. The first question reads picture, memory
and text, the second one the text after the prefix that was kept. The first one's encoder is left out, so the ratio is
an upper bound. Needs an idle machine; writes `bench/results/second-question.json`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from tinyalign_edge.bench.peers.engines import edge
from tinyalign_edge.bench.peers.shapes import LANGUAGE, write_language
from tinyalign_edge.bench.record import record
from tinyalign_edge.bundle import DecoderBlock
from tinyalign_edge.config import from_json, read_json
from tinyalign_edge.errors import InputError
from tinyalign_edge.runtime.context import Context, Prefix, Span, picture_span, text_span
from tinyalign_edge.runtime.decoder import Decoder
from tinyalign_edge.runtime.lru import Lru
from tinyalign_edge.runtime.sight import EncodedImage

COMMAND = "python -m tinyalign_edge.bench.second_question"
CACHE_BYTES = 1 << 30
ROOM = 32


def main() -> None:
    """Export, read, print."""
    given = _arguments()
    with tempfile.TemporaryDirectory() as scratch:
        source, folder = Path(scratch) / "source", Path(scratch) / "exported"
        folder.mkdir()
        write_language(given.model, source)
        edge.prepare(source, folder, "int8")
        block = from_json(DecoderBlock, read_json(folder / edge.BLOCK), edge.BLOCK)
        decoder = Decoder(folder, block, threads=given.threads)
        pairs = [questions(decoder, given, seed) for seed in range(given.rounds + 1)][1:]  # the first one warms up
    first, second = np.array(pairs).T  # ms
    share = float(np.median(second) / np.median(first))
    print(f"first {np.median(first):.1f} ms, second {np.median(second):.1f} ms: {share:.1%}")
    sizes = f"--visual-tokens {given.visual_tokens} --memory-tokens {given.memory_tokens}"
    command = f"{COMMAND} --model {given.model} {sizes} --text-tokens {given.text_tokens} --threads {given.threads}"
    result = {"share": share, "first_ms": first.tolist(), "second_ms": second.tolist()}
    print(record("second-question", command, result))


def questions(decoder: Decoder, given: argparse.Namespace, seed: int) -> tuple[float, float]:
    """Milliseconds of the first and of the second question about a picture."""
    random, width = np.random.default_rng(seed), decoder.block.width
    visual, memory = (
        random.standard_normal((count, width), np.float32) for count in (given.visual_tokens, given.memory_tokens)
    )
    image = EncodedImage(visual, None, (), memory)
    before, *texts = (random.integers(3, decoder.block.vocab_size, size) for size in (1, *[given.text_tokens] * 2))
    prefixes: Lru[Prefix] = Lru(CACHE_BYTES)
    milliseconds = []
    for text in texts:
        spans = [text_span(before.tolist()), picture_span(image), text_span(text.tolist())]
        context = Context(decoder, prefixes)
        started = time.perf_counter()
        logits = context.read(spans, room=ROOM)
        milliseconds.append((time.perf_counter() - started) * 1000)
    check(decoder, spans, logits)
    first, second = milliseconds
    return first, second


def check(decoder: Decoder, spans: list[Span], logits: np.ndarray) -> None:
    """Without the prefix the logits must be the same."""
    if not np.array_equal(Context(decoder, Lru(0)).read(spans, room=ROOM), logits):
        raise InputError("the kept prefix changes the logits; nothing was timed")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", choices=LANGUAGE)
    parser.add_argument("--visual-tokens", type=int, default=196)
    parser.add_argument("--memory-tokens", type=int, default=48)
    parser.add_argument("--text-tokens", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    return parser.parse_args()


if __name__ == "__main__":
    main()
