"""What drafts from the memory save on captions: sentences of eight tokens and more, with related memories and without.

    python -m tinyalign_edge.bench.caption_drafts [--steps 400] [--precision int8] [--rounds 5] [--threads 2]
        [--out runs/caption-drafts]

89 COCO photographs with five captions each. Five views of a photograph (the whole, and four crops, two of them
mirrored) stand for five photographs of one thing, a caption to each. A bundle is trained on 64 of the photographs,
between frozen MobileNetV2 and caption model, and exported; kept in `--out`, and not made again for the same steps and
precision. Every view of the other 25 is then asked about, in three arms: `own`, where the memory holds the other four
views with their captions; `another's`, the memories of another photograph; `none`. The language model has been trained
on COCO's captions, these among them, without their photographs: the figures are about speed, not about quality.
Answers are compared in every round. Needs `TINYALIGN_SHARED` and an idle machine; writes
`bench/results/caption-drafts.json` (`caption-drafts-PRECISION.json` for others than int8).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from itertools import count
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

import tinyalign_edge as ta
from tinyalign_edge.bench.drafts import Asked, measure, print_table, teach
from tinyalign_edge.bench.record import record, shared
from tinyalign_edge.bench.trained import trained
from tinyalign_edge.bundle import MANIFEST
from tinyalign_edge.data import Row, read_rows
from tinyalign_edge.export.run import ExportOptions, export
from tinyalign_edge.folders import whole_folder
from tinyalign_edge.train.options import TrainOptions

COMMAND = "python -m tinyalign_edge.bench.caption_drafts"
TRAINED_ON = 64  # photographs
VIEWS = 5
KEPT = 0.85  # of each side of a photograph in a crop
QUESTION = "Describe the picture."


def main() -> None:
    """Train and export what is missing, measure, print a table."""
    given = _arguments()
    data, folder = given.out / "data", given.out / f"{given.steps}-steps"
    if not (data / "train.json").is_file():
        write_data(data)
    bundle = trained_bundle(data / "train.json", data, folder, given.steps, given.precision, "Training on captions")
    rows = read_rows(data / "held-out.json", data)[: given.limit]
    with (
        tempfile.TemporaryDirectory() as scratch,
        ta.load(bundle, threads=given.threads, memory_dir=Path(scratch) / "memory") as model,
    ):
        teach(model, rows)
        pairs = asked(model, rows)
        arms = {name: measure(model, pairs[name], given.new_tokens, given.rounds) for name in pairs}
    print_table(arms)
    options = f"--steps {given.steps} --precision {given.precision} --rounds {given.rounds} --threads {given.threads}"
    result = {"steps": given.steps, "precision": given.precision, "threads": given.threads, "arms": arms}
    name = "caption-drafts" + ("" if given.precision == "int8" else f"-{given.precision}")
    print(record(name, f"{COMMAND} {options}", result))


def write_data(folder: Path) -> None:
    """`train.json`, `held-out.json` and the views of all photographs, in the new folder `folder`."""
    source = shared("data", "coco_cc")
    captions = defaultdict[str, list[str]](list)
    for row in read_rows(source / "all.json", source):
        captions[row.image].append(row.turns[0].answer)
    with whole_folder(folder, marker="train.json") as target:
        (target / "views").mkdir()
        rows: list[list[dict[str, Any]]] = []
        for number, (name, texts) in enumerate(sorted(captions.items())):
            with Image.open(source / name) as photograph:
                photograph.load()
            rows.append([])
            for view, text in zip(range(VIEWS), texts, strict=True):
                file = f"views/{number}-{view}.jpg"
                view_of(photograph.convert("RGB"), view).save(target / file, quality=92)
                rows[-1].append(_row(f"{number}-{view}", file, text))
        parts = {"train.json": rows[:TRAINED_ON], "held-out.json": rows[TRAINED_ON:]}
        for name, part in parts.items():
            (target / name).write_text(json.dumps([row for rows_of_one in part for row in rows_of_one]), "utf-8")


def view_of(photograph: Image.Image, view: int) -> Image.Image:
    """The whole (0), or the crop of a corner (1 to 4); the last two mirrored."""
    if view == 0:
        return photograph
    width, height = (round(KEPT * side) for side in photograph.size)
    left, top = (view % 2) * (photograph.width - width), (view // 2 % 2) * (photograph.height - height)
    crop = photograph.crop((left, top, left + width, top + height))
    return ImageOps.mirror(crop) if view > 2 else crop


def trained_bundle(data: Path, images: Path, folder: Path, steps: int, precision: str, label: str) -> Path:
    """The bundle trained on `data` for so many steps, as it lies in `folder`; what is missing is made."""
    checkpoint, bundle = folder / "checkpoint", folder / precision
    trained(
        checkpoint,
        data=data,
        images=images,
        vision=str(shared("models", "mobilenet-v2-imagenet")),
        lm=str(shared("models", "caption-lm")),
        options=TrainOptions(memory="tokens", steps=steps, device="cpu"),
        label=label,
    )
    if not (bundle / MANIFEST).is_file():
        export(checkpoint, bundle, ExportOptions(precision=precision, allow_degraded=True))  # type: ignore[arg-type]
    return bundle


def asked(model: ta.Model, rows: list[Row]) -> dict[str, list[Asked]]:
    """Every view with the memories of each arm; its own caption is never among them."""
    if model.memory is None:
        raise ta.InputError("the bundle has no memory")
    k = model.manifest.memory.k
    own, others = list[Asked](), list[Asked]()
    for row in rows:
        near = [entry for entry in model.memory.search(row.path, k + 1) if entry.source != row.id][:k]
        own.append((model.encode(row.path, memories=near), QUESTION))
    for row, place in zip(rows, count(len(rows) // 2), strict=False):  # half-way round: another photograph
        other = own[place % len(rows)][0]
        others.append((model.encode(row.path, memories=other.memories), QUESTION))
    none = [(model.encode(row.path, memories=()), QUESTION) for row in rows]
    return {"own": own, "another's": others, "none": none}


def _row(name: str, image: str, text: str) -> dict[str, Any]:
    question = {"from": "human", "value": f"<image>\n{QUESTION}"}
    return {"id": name, "image": image, "conversations": [question, {"from": "gpt", "value": text}], "caption": text}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--precision", default="int8", choices=["int8", "int4", "fp32"])
    parser.add_argument("--limit", type=int, default=125, help="views that are asked about")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/caption-drafts"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
