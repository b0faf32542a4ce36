"""Every family of models on a tiny one that shows its features: ONNX against torch, in float32 and in int8.

    python -m tinyalign_edge.bench.models

Writes `docs/models.md` and `bench/results/models.json`; takes some minutes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from tinyalign_edge.bench.models.compare import onnx_logits, relative_error, torch_logits
from tinyalign_edge.bench.models.encoders import encoder_rows
from tinyalign_edge.bench.models.left_out import LEFT_OUT
from tinyalign_edge.bench.models.taught import sentence, teach
from tinyalign_edge.bench.models.tiny import FUSED, TRACED, VOCABULARY, Tiny, build, random_ids
from tinyalign_edge.bench.models.tuned import HELD_OUT, Text, tune
from tinyalign_edge.bench.record import RESULTS, record
from tinyalign_edge.bundle import DecoderBlock
from tinyalign_edge.export.card import markdown_table
from tinyalign_edge.export.decoder import export_decoder
from tinyalign_edge.export.families import read_architecture
from tinyalign_edge.export.gate import MIN_AGREEMENT
from tinyalign_edge.export.language import export_language
from tinyalign_edge.export.plan import Plan
from tinyalign_edge.export.search import MAX_GROWTH
from tinyalign_edge.export.weights import StateDict
from tinyalign_edge.runtime.decoder import Decoder

Floats = NDArray[np.float32]

COMMAND = "python -m tinyalign_edge.bench.models"
PAGE = RESULTS.parents[1] / "docs" / "models.md"
TOKENS = 64
PASSES = {"prefill": [64], "chunks": [20, 1, 11, 32], "decode": [32] + [1] * 32}
IDS = random_ids(TOKENS)
HELD_OUT_TOKENS = len(HELD_OUT) * TOKENS

INTRODUCTION = f"""# Models

Made by `{COMMAND}` (`just models`); do not edit. The raw figures are in
[`bench/results/models.json`](../bench/results/models.json).

Every model here is tiny and random, with weights so large and settings so tight (windows shorter than the prompt, soft
caps that bite, heads that need padding) that each feature shows. What a real model loses in int8 is measured when it is
exported, and stands in its bundle.
"""
LANGUAGE = f"""## Language models

{TOKENS} tokens in one pass, in chunks of {PASSES["chunks"]}, and one by one after 32: the largest difference to torch's
float32 logits, relative to the largest logit.

int8 as `export` makes it: mean KL divergence to torch in nats and share of equal next tokens over {HELD_OUT_TOKENS}
positions of held-out texts, with everything in int8 and nothing folded; what `export`'s search then gives back, on
other texts, and the figures after it. With random weights the two likeliest of {VOCABULARY} tokens are often nearer to
each other than rounding; the search mostly ends there with every matrix weight-only, since float32 would make the model
more than {MAX_GROWTH} times as large, and the gate's {MIN_AGREEMENT:.0%} of equal tokens is mostly out of reach. The
same model after a second of training on a simple language knows what comes next: the last columns are the search and
the gate on that one.
"""
ENCODERS = """## Vision encoders

Encoder, connector and retrieval key in one graph: the largest difference to torch's float32 visual tokens and key,
relative to the largest value; the mean cosine of the visual tokens in int8; how many attention blocks are one operator
(each of these has two layers, convolutional ones have none).
"""
FUSED_NOTES = """- Options that no graph is written for (Phi's `qk_layernorm`, Gemma 3's
  `use_bidirectional_attention`, other kinds of layers than full and sliding attention) are traced or refused, never
  left out.
- Rotary embeddings: transformers' default, linear, YaRN, Llama 3 and LongRoPE. With LongRoPE the graph uses
  the short factors and ends at `original_max_position_embeddings`: beyond it transformers changes to other factors,
  which do not fit the keys that are in the cache already.
- transformers' default attention leaves Gemma 2's soft cap out; the reference here, and the loader, use the plain one.
"""
TRACED_TEXT = """### Other families: traced

A model type that is not in the table above, or has an option that is not, is traced by torch into a graph with the same
inputs and outputs. It is checked in the same way, and slower: attention is not fused, every linear layer is a product
of its own, and a tied embedding is stored twice. `export` says so, and `bundle.json` has `"graph": "traced"`. Models
without a cache of keys and values (Mamba), that take no embeddings or positions, or whose trace holds for one size
only, are refused. Some that work:
"""
LEFT_OUT_TEXT = """### Features left out

The same comparison with one feature changed in the graph's description, to show that the comparison would see it:
"""


def main() -> None:
    """Measure and write."""
    pages: list[str] = [INTRODUCTION]
    result: dict[str, Any] = {}
    for section in SECTIONS:
        text, figures = section()
        pages.append(text)
        result |= figures
    written = record("models", COMMAND, result)
    PAGE.write_text("\n".join(pages), "utf-8")
    print(PAGE.read_text("utf-8"))
    print(written)


def language_section() -> tuple[str, dict[str, Any]]:
    """The matrix of language models: Markdown, and its figures by name."""
    fused = [_measure(name, tiny) for name, tiny in FUSED.items()]
    traced = [_measure(name, tiny) for name, tiny in TRACED.items()]
    left_out = [_measure_left_out(name, feature) for name, features in LEFT_OUT.items() for feature in features]
    parts = [LANGUAGE, _matrix(fused), FUSED_NOTES, TRACED_TEXT, _matrix(traced), LEFT_OUT_TEXT]
    parts.append(
        markdown_table(
            ("model", "changed", "error"), [(r["model"], r["changed"], f"{r['error']:.2f}") for r in left_out]
        )
        + "\n"
    )
    return "\n".join(parts), {"language_models": fused, "traced_language_models": traced, "left_out": left_out}


def encoder_section() -> tuple[str, dict[str, Any]]:
    """The matrix of vision encoders: Markdown, and its figures by name."""
    rows = list(encoder_rows())
    cells = [
        (
            row.encoder,
            row.features,
            f"{row.fp32_error:.0e}",
            f"{row.fp32_key_error:.0e}",
            f"{row.int8_cosine:.5f}",
            f"{row.attentions}",
        )
        for row in rows
    ]
    head = ("encoder", "shown", "visual tokens", "key", "int8 cosine", "fused attention")
    return f"{ENCODERS}\n{markdown_table(head, cells)}\n", {"encoders": [asdict(row) for row in rows]}


SECTIONS: tuple[Callable[[], tuple[str, dict[str, Any]]], ...] = (language_section, encoder_section)


def _measure(name: str, tiny: Tiny) -> dict[str, Any]:
    model = build(tiny)
    wanted = torch_logits(model, IDS)
    written = _logits(lambda folder: export_language(model, folder, plan=Plan("fp32")), list(PASSES.values()))
    return {
        "model": name,
        "model_type": tiny.model_type,
        "shows": tiny.shows,
        **{f"{kind}_error": relative_error(logits, wanted) for kind, logits in zip(PASSES, written, strict=True)},
        "random": _through_search(model, lambda seed: random_ids(TOKENS, seed=seed)),
        "taught": _through_search(teach(model), lambda seed: sentence(TOKENS, seed=seed)),
    }


def _through_search(model: PreTrainedModel, text: Text) -> dict[str, Any]:
    tuned = tune(model, text)
    return asdict(tuned) | {"failures": list(tuned.found.failures)}


def _measure_left_out(name: str, feature: str) -> dict[str, Any]:
    model = build(FUSED[name])
    config = model.config.to_dict()
    arch, weights = LEFT_OUT[name][feature](read_architecture(config), dict(StateDict(model)), config)
    (logits,) = _logits(lambda folder: export_decoder(arch, weights, folder, plan=Plan("fp32")), [PASSES["prefill"]])
    return {"model": name, "changed": feature, "error": relative_error(logits, torch_logits(model, IDS))}


def _logits(write: Callable[[Path], DecoderBlock], passes: list[list[int]]) -> list[Floats]:
    with tempfile.TemporaryDirectory() as folder:
        decoder = Decoder(Path(folder), write(Path(folder)), threads=1)
        return [onnx_logits(decoder, IDS, chunks) for chunks in passes]


def _matrix(rows: list[dict[str, Any]]) -> str:
    errors = ("prefill", "chunks", "decode")
    head = ("model_type", "shown", *errors, "int8", "given back", "then", "taught: int8", "given back", "gate")
    cells = [
        (
            f"`{row['model_type']}`",
            row["shows"],
            *(f"{row[f'{kind}_error']:.0e}" for kind in PASSES),
            _distance(row["random"]["plain"]),
            _given_back(row["random"]),
            _distance(row["random"]["found"]),
            _distance(row["taught"]["found"]),
            _given_back(row["taught"]),
            "; ".join(row["taught"]["failures"]) or "passed",
        )
        for row in rows
    ]
    return markdown_table(head, cells) + "\n"


def _distance(figures: dict[str, float]) -> str:
    return f"{figures['kl']:.4f}, {figures['agreement']:.1%}"


def _given_back(tuned: dict[str, Any]) -> str:
    folded = ", folded" if tuned["smoothed"] else ""
    return f"{tuned['given_back']} of {tuned['matrices']} ({tuned['growth']:+.0%}){folded}"


if __name__ == "__main__":
    main()
