"""What a memory costs in bytes and what it is worth in held-out loss, on Caltech-101's photographs.

    python -m tinyalign_edge.bench.memory_size [--out runs/memory_size] [--arms NAME ...] [--table]

Every arm is one training run that differs from 24 token ids with a key of 128 in the one thing it is named for; nothing
is copied from the memory but in the arm that is named for it. The loss is that of the
test photographs' questions, each asked alone, with the memory read back from the bank that the run wrote. Needs
`TINYALIGN_SHARED`. Arms that are finished are not repeated; once all are there, `bench/results/memory_size.json` is
written. `--table` prints the recorded table as Markdown.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tinyalign_edge.bench.record import RESULTS, record, shared
from tinyalign_edge.bench.study.eye import Eye
from tinyalign_edge.bench.trained import loss_curve, trained
from tinyalign_edge.config import read_json, write_json
from tinyalign_edge.data import read_rows
from tinyalign_edge.export.card import markdown_table
from tinyalign_edge.train.answer import TorchAnswerer
from tinyalign_edge.train.batches import Values
from tinyalign_edge.train.checkpoint import Checkpoint
from tinyalign_edge.train.options import EPISODES, TrainOptions
from tinyalign_edge.train.values import encode_values

COMMAND = "python -m tinyalign_edge.bench.memory_size"
STEPS = 400
QUESTIONS_A_ROW = 3  # of the training rows, which a fused key takes apart
KINDS = ("open", "yes_no")

DEFAULT = TrainOptions(steps=STEPS, device="cpu", copy_words=False, episodes=0.0)
FUSED = replace(DEFAULT, key="fused", batch_size=DEFAULT.batch_size * QUESTIONS_A_ROW)  # as many questions a step
LATENTS = replace(DEFAULT, memory="latents")
COPY = replace(DEFAULT, copy_words=True, episodes=EPISODES)


@dataclass(frozen=True)
class Arm:
    """A training run. `rounded` false: the values are read as the value encoder makes them, not from the bank."""

    title: str
    options: TrainOptions
    run: str
    rounded: bool = True


def _arms() -> dict[str, Arm]:
    runs: dict[str, tuple[str, TrainOptions]] = {
        "none": ("no memory", replace(DEFAULT, memory="none")),
        "tokens": ("24 token ids, key of 128", DEFAULT),
        "copy": ("24 token ids, copied from", COPY),
        "copy-12": ("12 token ids, copied from", replace(COPY, value_tokens=12)),
        "latents-8x96": ("8 x 96 latents", LATENTS),
        "key-64": ("24 token ids, key of 64", replace(DEFAULT, key_dim=64)),
        "key-256": ("24 token ids, key of 256", replace(DEFAULT, key_dim=256)),
        "tokens-12": ("12 token ids", replace(DEFAULT, value_tokens=12)),
        "latents-4x64": ("4 x 64 latents", replace(LATENTS, latents=4, latent_dim=64)),
        "latents-32x96": ("32 x 96 latents", replace(LATENTS, latents=32)),
        "fused": ("24 token ids, fused key", FUSED),
        "paper": ("the paper's: fused key, 32 x 96 random latents", replace(FUSED, memory="paper")),
    }
    arms = {name: Arm(title, options, name) for name, (title, options) in runs.items()}
    for name in [name for name, arm in arms.items() if arm.options.memory == "latents"]:
        arms[f"{name}-fp32"] = replace(arms[name], title=f"{arms[name].title}, fp32", rounded=False)
    return arms


ARMS = _arms()


def main() -> None:
    """Run what is missing and record everything, or print what is recorded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/memory_size"))
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS), metavar="NAME")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        print(table(read_json(RESULTS / "memory_size.json")["arms"]))
        return
    eye = Eye()
    for name in given.arms:
        part = given.out / f"{name}.json"
        if not part.is_file():
            write_json(part, run_arm(ARMS[name], given.out, eye))
    parts = {name: given.out / f"{name}.json" for name in ARMS}
    if all(part.is_file() for part in parts.values()):
        arms = {name: read_json(part) for name, part in parts.items()}
        print(record("memory_size", COMMAND, {"steps": STEPS, "arms": arms}))
        print(table(arms))


def run_arm(arm: Arm, out: Path, eye: Eye) -> dict[str, Any]:
    """Train one arm, unless its checkpoint is there, and measure it."""
    folder = out / arm.run
    checkpoint = trained(
        folder,
        data=shared("data", "caltech101", "train.json"),
        images=shared("data", "caltech101"),
        vision=str(shared("models", "mobilenet-v2-imagenet")),
        lm=str(shared("models", "caption-lm")),
        options=replace(arm.options, cache_features=out / "features"),
        label=f"Training {arm.run}",
    )
    answerer = TorchAnswerer(checkpoint, encode=eye)
    if not arm.rounded:
        answerer.collate.values = _exact_values(checkpoint, eye)
    losses = {kind: _losses(answerer, name) for kind, name in zip(KINDS, ("test.json", "test_yesno.json"), strict=True)}
    every = np.concatenate(list(losses.values()))
    return {
        "title": arm.title,
        "entry_bytes": _entry_bytes(checkpoint, rounded=arm.rounded),
        "held_out_loss": float(every.mean()),
        **{f"{kind}_loss": float(found.mean()) for kind, found in losses.items()},
        "answer_tokens": len(every),
        "curve": loss_curve(folder),
    }


def _losses(answerer: TorchAnswerer, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Of every token of the file's answers, in nats."""
    folder = shared("data", "caltech101")
    examples = answerer.prepare(read_rows(folder / name, folder)).examples
    starts = range(0, len(examples), 64)
    return np.concatenate([loss for start in starts for loss in answerer.losses(examples[start : start + 64])])


def _exact_values(checkpoint: Checkpoint, eye: Eye) -> Values:
    """The bank's values before they were rounded."""
    folder = shared("data", "caltech101")
    by_id = {row.id: row for row in read_rows(folder / "train.json", folder)}
    assert checkpoint.bank is not None
    rows = [by_id[checkpoint.bank.entry(number).source] for number in checkpoint.bank.ids]
    limit = checkpoint.config.memory.value_tokens
    ids = [checkpoint.prompt.memory_ids(row.memory_turns, limit) for row in rows]
    seen = eye(checkpoint.vision.model, checkpoint.config.image, checkpoint.model, rows, device="cpu")
    values = Values(ids, lambda entries: seen.pooled[list(entries)])
    return replace(values, latents=encode_values(checkpoint.model, values))


def _entry_bytes(checkpoint: Checkpoint, *, rounded: bool) -> float:
    """Of key, value and scales, as the bank's files hold them; values that are not rounded take four bytes a number."""
    if checkpoint.bank is None:
        return 0.0
    spec = checkpoint.bank.manifest.spec
    fp32 = spec.key_dim + 4 + spec.latents * spec.latent_dim * 4
    return checkpoint.bank.stats().entry_bytes if rounded else float(fp32)


def table(arms: dict[str, Any]) -> str:
    """The arms as Markdown, cheapest first."""
    rows = [
        (arm["title"], f"{arm['entry_bytes']:,.0f}", *(f"{arm[f'{kind}_loss']:.4f}" for kind in ("held_out", *KINDS)))
        for arm in sorted(arms.values(), key=lambda arm: float(arm["entry_bytes"]))
    ]
    return markdown_table(("memory", "bytes an entry", "held-out loss", "open questions", "yes or no"), rows)


if __name__ == "__main__":
    main()
