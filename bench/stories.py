"""stories260k: how many greedy tokens the exported decoder has in common with torch.

    python -m tinyalign_edge.bench.stories

Needs `TINYALIGN_SHARED`; writes `bench/results/stories260k.json`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinyalign_edge.bench.record import record, shared
from tinyalign_edge.bundle import Format
from tinyalign_edge.export.decoder import export_decoder
from tinyalign_edge.export.processor import own_plan
from tinyalign_edge.export.weights import StateDict
from tinyalign_edge.runtime.decoder import Decoder

PROMPT = "Once upon a time"
TOKENS = 200


def main() -> None:
    """Compare and record."""
    path = shared("models", "stories260k")
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path).eval()
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        told = model.generate(prompt, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)[0].tolist()
    expected = told[prompt.shape[1] :]
    result: dict[str, Any] = {"prompt": PROMPT, "tokens": TOKENS, "text": tokenizer.decode(expected)}
    for precision in ("fp32", "int8"):
        found = greedy(model, prompt[0].tolist(), precision)  # type: ignore[arg-type]
        pairs = zip(expected, found, strict=True)
        result[f"{precision}_common_tokens"] = next((i for i, (a, b) in enumerate(pairs) if a != b), TOKENS)
    print({key: value for key, value in result.items() if "common" in key})
    print(record("stories260k", "python -m tinyalign_edge.bench.stories", result))


def greedy(model: Any, ids: list[int], precision: Format) -> list[int]:
    """`TOKENS` greedy tokens of the exported decoder."""
    with tempfile.TemporaryDirectory() as folder:
        block = export_decoder(model.config, StateDict(model), Path(folder), plan=own_plan(precision))
        decoder = Decoder(Path(folder), block)
        cache = decoder.new_cache(len(ids) + TOKENS)
        out = [int(decoder.forward(cache, decoder.embed(ids)).argmax())]
        while len(out) < TOKENS:
            out.append(int(decoder.forward(cache, decoder.embed(out[-1:])).argmax()))
    return out


if __name__ == "__main__":
    main()
