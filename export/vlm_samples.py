"""Pictures and questions for the gate where none were given: drawn scenes, answered by the model itself."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from tinyalign_edge.data import Row, Turn, read_rows
from tinyalign_edge.demo.dataset import write_dataset
from tinyalign_edge.demo.world import make_scenes
from tinyalign_edge.export.vlm_reference import VlmReference

DRAWN = 216  # 16 to find the formats on, 200 for the gate


def drawn_questions(folder: Path, reference: VlmReference) -> list[Row]:
    """Draw scenes into the empty `folder` and ask one question about each; the answers are torch's own."""
    print(
        f"note: compared on {DRAWN} drawn pictures; give --calibration FILE.json and --images DIR for your own",
        file=sys.stderr,
    )
    write_dataset(folder, [], make_scenes(DRAWN, seed=0), seed=0)
    rows = read_rows(folder / "test.json", folder)
    answers = reference.answers(reference.prepare(rows).examples)
    return [
        replace(row, turns=(Turn(row.turns[0].question, answer),)) for row, answer in zip(rows, answers, strict=True)
    ]
