"""What drafts from the memory save where it holds the answer: notes about things, with their memories and without.

    python -m tinyalign_edge.bench.note_drafts [--steps 400] [--precision int8] [--rounds 5] [--threads 2]
        [--out runs/note-drafts]

Each class of Caltech-101 gets a note of where it is kept ("the anchor is kept on the third shelf, in the red box under
the stairs"): what an app would teach. A bundle is trained to say the note of what a picture shows, between frozen
MobileNetV2 and caption model, and exported; kept in `--out`, and not made again for the same steps and precision. Then
test pictures are asked about in the arms of `bench/drafts.py`: with their own memories, which hold the note, another
picture's, and none. Answers are compared in every round. Needs `TINYALIGN_SHARED` and an idle machine; writes
`bench/results/note-drafts.json` (`note-drafts-PRECISION.json` for others than int8).
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

import tinyalign_edge as ta
from tinyalign_edge.bench.caption_drafts import trained_bundle
from tinyalign_edge.bench.drafts import asked, measure, print_table
from tinyalign_edge.bench.record import record, shared
from tinyalign_edge.data import read_rows
from tinyalign_edge.folders import whole_folder

COMMAND = "python -m tinyalign_edge.bench.note_drafts"
QUESTION = "Where is it kept?"
SHELVES = ("first", "second", "third", "fourth", "fifth")
BOXES = ("red", "blue", "green", "yellow", "white", "black", "brown")
PLACES = ("under the stairs", "next to the window", "behind the door", "near the table", "in front of the wall")


def main() -> None:
    """Train and export what is missing, measure, print a table."""
    given = _arguments()
    data, folder, images = given.out / "data", given.out / f"{given.steps}-steps", shared("data", "caltech101")
    if not (data / "train.json").is_file():
        write_data(data, images)
    bundle = trained_bundle(data / "train.json", images, folder, given.steps, given.precision, "Training on notes")
    rows = read_rows(data / "test.json", images)
    chosen = np.random.default_rng(0).permutation(len(rows))[: given.limit]
    rows = [rows[i] for i in chosen]
    with ta.load(bundle, threads=given.threads) as model:
        pairs = {name: asked(model, rows, name, None) for name in ("own", "another's", "none")}
        right = [
            model.ask(image, question, max_new_tokens=given.new_tokens).text == row.turns[0].answer
            for (image, question), row in zip(pairs["own"], rows, strict=True)
        ]
        arms = {name: measure(model, pairs[name], given.new_tokens, given.rounds) for name in pairs}
    print_table(arms)
    print(f"{np.mean(right):.0%} of the answers with their own memories are the right note")
    options = f"--steps {given.steps} --precision {given.precision} --rounds {given.rounds} --threads {given.threads}"
    result = {"steps": given.steps, "precision": given.precision, "threads": given.threads}
    name = "note-drafts" + ("" if given.precision == "int8" else f"-{given.precision}")
    print(record(name, f"{COMMAND} {options}", {**result, "own_right": float(np.mean(right)), "arms": arms}))


def write_data(folder: Path, source: Path) -> None:
    """`train.json` and `test.json` in the new folder `folder`: a row for each picture, with the note of its class."""
    parts = {part: _named_pictures(source / f"{part}.json", source) for part in ("train", "test")}
    notes = notes_of({name for named in parts.values() for name in named.values()})
    with whole_folder(folder, marker="train.json") as target:
        for part, named in parts.items():
            rows = [_row(image, notes[name]) for image, name in named.items()]
            (target / f"{part}.json").write_text(json.dumps(rows), "utf-8")


def notes_of(names: set[str]) -> dict[str, str]:
    """A note for each class, no two with the same place."""
    places = list(itertools.product(SHELVES, BOXES, PLACES))
    drawn = np.random.default_rng(0).permutation(len(places))
    return {
        name: "the {} is kept on the {} shelf, in the {} box {}".format(name, *places[place])
        for name, place in zip(sorted(names), drawn, strict=False)
    }


def _named_pictures(data: Path, images: Path) -> dict[str, str]:
    """Of every picture that is named somewhere, its name without the article."""
    answers = ((row.image, turn.answer) for row in read_rows(data, images) for turn in row.turns)
    return {image: answer.partition(" ")[2] for image, answer in answers if " " in answer}


def _row(image: str, note: str) -> dict[str, Any]:
    question = {"from": "human", "value": f"<image>\n{QUESTION}"}
    return {"id": image, "image": image, "conversations": [question, {"from": "gpt", "value": note}], "caption": note}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--precision", default="int8", choices=["int8", "int4", "fp32"])
    parser.add_argument("--limit", type=int, default=100, help="pictures that are asked about")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/note-drafts"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
