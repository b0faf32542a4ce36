"""What a bundle computes on one machine, compared on another by the exporter's own limits.

    python -m tests.same_answers record BUNDLE FILE.npz       # here
    python -m tests.same_answers compare BUNDLE FILE.npz      # there; exit code 1 if it differs too much

The pictures are drawn where it is recorded and travel in the file.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np

import tinyalign_edge as ta
from tinyalign_edge.demo.texts import questions
from tinyalign_edge.demo.world import draw, make_scenes
from tinyalign_edge.export.distances import divergences, log_softmax, row_cosines

PICTURES = 24


def record(bundle: Path, file: Path) -> None:
    """Answer questions about drawn pictures, and keep all that can be compared."""
    from tinyalign_edge.export.gate import LIMITS  # needs onnx, which is not there

    scenes = make_scenes(PICTURES, seed=3)
    asked = [questions(scene, random.Random(i))[0] for i, scene in enumerate(scenes)]
    pictures = np.stack([np.asarray(draw(scene).convert("RGB")) for scene in scenes])
    texts = np.array([(question.text, question.answer) for question in asked])
    limits = np.array([(name, sign, str(limit)) for name, (sign, limit) in LIMITS.items()])
    np.savez(file, limits=limits, pictures=pictures, texts=texts, **results(bundle, pictures, texts))


def compare(bundle: Path, file: Path) -> bool:
    """Print the figures of this machine beside those of the file; whether all are within the exporter's limits."""
    with np.load(file) as there:
        here = results(bundle, there["pictures"], there["texts"])
        log_p, log_q = (log_softmax(side["logits"]) for side in (there, here))
        figures = {
            "mean KL": float(divergences(log_p, log_q).mean()),
            "next-token agreement": float((log_p.argmax(axis=1) == log_q.argmax(axis=1)).mean()),
            "visual token cosine": float(row_cosines(there["visual_tokens"], here["visual_tokens"]).mean()),
        }
        limits = {name: (sign, float(limit)) for name, sign, limit in there["limits"].tolist()}
        same = {what: float((there[what] == here[what]).mean()) for what in ("answers", "memories")}
    print(", ".join(f"{name} {value:.7g}" for name, value in figures.items()))
    print(", ".join(f"{name} equal: {share:.1%}" for name, share in same.items()))
    wrong = []
    for name, value in figures.items():
        sign, limit = limits[name]
        if not (value <= limit if sign == "<=" else value >= limit):  # not a number is wrong
            wrong.append(f"{name} is {value:.5f}, must be {sign} {limit}")
    print(*wrong, sep="\n", end="\n" * bool(wrong), file=sys.stderr)
    return not wrong


def results(bundle: Path, pictures: Any, texts: Any) -> dict[str, Any]:
    """Of each picture: logits (A, V) for the reference answer, visual tokens (N, D), the answer, the memories' ids."""
    logits, tokens, answers, memories = [], [], [], []
    with ta.load(bundle, threads=1) as model:
        for picture, (question, reference) in zip(pictures, texts, strict=True):
            image = model.encode(picture)
            logits.append(model.answer_logits(image, question, reference)[0])
            tokens.append(image.visual_tokens)
            answers.append(model.ask(image, question).text)
            memories.append(
                [entry.id for entry in image.memories] + [-1] * (model.manifest.memory.k - len(image.memories))
            )
    kept = {"logits": np.concatenate(logits), "visual_tokens": np.concatenate(tokens)}
    return {**kept, "answers": np.array(answers), "memories": np.array(memories)}


if __name__ == "__main__":
    what, bundle, file = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if what == "record":
        record(bundle, file)
    else:
        sys.exit(not compare(bundle, file))
