"""Make `tests/data/bundle-schema-1`: a tiny bundle with the answers it gave, for tests that have no torch.

    python -m tests.make_stored_bundle

Run it when the schema changes; once a version has been released, under a new name: the old folder then proves that
old bundles still open.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import tinyalign_edge as ta
from tests.conftest import STORED_BUNDLE
from tests.towers import save_lm, save_vit, train_tiny
from tinyalign_edge.demo.dataset import write_dataset
from tinyalign_edge.demo.world import make_scenes
from tinyalign_edge.export.run import ExportOptions, export

QUESTIONS = ("What colour is the circle?", "How many objects are there?")


def main() -> None:
    """Train, export, ask, store."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_dataset(folder / "world", make_scenes(80, seed=1), make_scenes(4, seed=2), seed=0)
        save_vit(folder / "vit")
        save_lm(folder / "lm")
        checkpoint = train_tiny(folder / "world", folder, folder / "checkpoint", memory="tokens", copy_words=False)
        export(checkpoint, STORED_BUNDLE, ExportOptions(target="portable"))  # right on every processor
        picture = STORED_BUNDLE.parent / "picture.png"
        shutil.copyfile(next((folder / "world" / "images").glob("test-*.png")), picture)
    model = ta.load(STORED_BUNDLE)
    answers = {question: model.ask(picture, question).text for question in QUESTIONS}
    memories = [memory.text for memory in model.encode(picture).memories]
    expected = {"answers": answers, "memories": memories}
    (STORED_BUNDLE.parent / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
