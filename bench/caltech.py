"""The Caltech-101 run: train with and without memory on real photographs, export, evaluate the int8 bundle.

    python -m tinyalign_edge.bench.caltech [--out runs/caltech] [--steps 800] [--memory tokens latents]

Rows, towers and settings are the study's (`bench/study/datasets.py`), with steps and key of its short runs, and the
learning rate that its trials chose.
Needs `TINYALIGN_SHARED`; writes `bench/results/caltech.json`, and the card of the first memory's bundle beside it. Runs
that are finished are not repeated.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tinyalign_edge.bench.record import RESULTS, record, shared
from tinyalign_edge.bench.study.datasets import SETTINGS, find_dataset
from tinyalign_edge.bench.study.plan import SHORT, SHORT_SETTINGS, Run
from tinyalign_edge.bench.trained import loss_curve, trained
from tinyalign_edge.bundle import open_bundle
from tinyalign_edge.config import to_json
from tinyalign_edge.evaluate import MemoryMode, Scores, evaluate
from tinyalign_edge.export.card import CARD
from tinyalign_edge.export.run import export
from tinyalign_edge.report import folder_bytes
from tinyalign_edge.train.options import TrainOptions

COMMAND = "python -m tinyalign_edge.bench.caltech"
LEARNING_RATE = 1e-2
STUDY_ARMS = {"none": f"baseline{SHORT}", "tokens": f"memory{SHORT}", "latents": "latents"}


def main() -> None:
    """Run what is missing and record everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/caltech"))
    parser.add_argument("--steps", type=int, default=SHORT_SETTINGS["caltech"]["steps"])
    parser.add_argument("--memory", nargs="*", default=["tokens", "latents"], choices=["tokens", "latents"])
    given = parser.parse_args()
    arms = ["none", *given.memory]
    result: dict[str, Any] = {"steps": given.steps, "arms": {arm: run_arm(arm, given.out, given.steps) for arm in arms}}
    options = f" --steps {given.steps} --memory {' '.join(given.memory)}"
    print(record("caltech", COMMAND + options, result))
    shutil.copyfile(given.out / f"{(given.memory or arms)[0]}-bundle" / CARD, RESULTS / "caltech-card.md")


def run_arm(arm: str, out: Path, steps: int) -> dict[str, Any]:
    """Train, export and evaluate one kind of memory."""
    checkpoint, bundle, data = out / arm, out / f"{arm}-bundle", find_dataset("caltech", out)
    trained(
        checkpoint,
        data=data.train,
        images=data.train_images,
        vision=data.vision,
        lm=data.lm,
        options=arm_options(arm, steps),
        label=f"Training {arm}",
    )
    export(checkpoint, bundle)
    manifest = open_bundle(bundle)
    result: dict[str, Any] = {
        "curve": loss_curve(checkpoint),
        "open": {"fp32": _scores(checkpoint, "test.json"), "int8": _scores(bundle, "test.json")},
        "yes_no": {"fp32": _scores(checkpoint, "test_yesno.json"), "int8": _scores(bundle, "test_yesno.json")},
        "gate": to_json(manifest.gate),
        "given_back": to_json(manifest.given_back),
        "smoothed": manifest.decoder.smoothed,
        "bundle_bytes": {
            **{name: entry.bytes for name, entry in manifest.files.items()},
            "total": folder_bytes(bundle),
        },
    }
    if arm != "none":
        result["open"]["int8_shuffled"] = _scores(bundle, "test.json", memory="shuffled")
    return result


def arm_options(arm: str, steps: int) -> TrainOptions:
    """The study's of this kind of memory, for so many steps."""
    return replace(
        Run("caltech", STUDY_ARMS[arm]).options(SETTINGS["caltech"]), steps=steps, learning_rate=LEARNING_RATE
    )


def _scores(target: Path, data: str, *, memory: MemoryMode = "own") -> dict[str, Any]:
    scores: Scores = evaluate(
        target, data=shared("data", "caltech101", data), images=shared("data", "caltech101"), memory=memory
    )
    return asdict(scores)


if __name__ == "__main__":
    main()
