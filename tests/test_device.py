"""What an app on a device uses, run on a stored bundle with the base dependencies alone.

`just test-lowest` runs this file in an environment that holds nothing else, at the oldest supported versions.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tinyalign_edge as ta
from tests.conftest import ROOT, STORED_BUNDLE
from tinyalign_edge.runtime.probe import run_probe
from tinyalign_edge.runtime.verify import verify

PICTURE = STORED_BUNDLE.parent / "picture.png"
EXPECTED = json.loads((STORED_BUNDLE.parent / "expected.json").read_text("utf-8"))
QUESTION, OTHER_QUESTION = EXPECTED["answers"]
HEAVY = ("torch", "transformers", "optimum", "onnx", "safetensors", "accelerate", "matplotlib")


@pytest.fixture(scope="module")
def model() -> ta.Model:
    return ta.load(STORED_BUNDLE, threads=1)


def test_the_stored_bundle_gives_the_stored_answers(model: ta.Model) -> None:
    image = model.encode(PICTURE)
    assert {question: model.ask(image, question).text for question in EXPECTED["answers"]} == EXPECTED["answers"]
    assert [memory.text for memory in image.memories] == EXPECTED["memories"]


def test_answering_imports_nothing_of_training_or_export() -> None:
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({HEAVY!r}))\n"  # importing one of them now raises
        "import tinyalign_edge as ta\n"
        "model = ta.load(sys.argv[1])\n"
        "print(model.ask(sys.argv[2], sys.argv[3]).text)"
    )
    command = [sys.executable, "-c", code, str(STORED_BUNDLE), str(PICTURE), QUESTION]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == EXPECTED["answers"][QUESTION] + "\n"


@pytest.mark.parametrize("first", ["tinyalign_edge.memory", "tinyalign_edge.runtime.model"])
def test_the_native_libraries_load_in_either_order(first: str) -> None:
    """onnxruntime crashes the process when usearch was imported before it; our modules must not."""
    subprocess.run([sys.executable, "-c", f"import {first}; import onnxruntime, usearch.index"], check=True)


def test_the_pieces_of_a_stream_make_up_the_answer(model: ta.Model) -> None:
    stream = model.stream(PICTURE, QUESTION)
    assert "".join(stream) == stream.result().text == EXPECTED["answers"][QUESTION]


def test_an_answer_tells_its_stages_tokens_and_memories(model: ta.Model) -> None:
    answer = model.ask(PICTURE, QUESTION, max_new_tokens=3)
    read = {"decode_image", "preprocess", "encode", "retrieve", "prefill"}
    assert set(answer.timings_ms) == {*read, "first_token", "per_token", "total"}
    assert (answer.tokens, answer.finish_reason) == (3, "length")
    assert len(answer.memories) == model.manifest.memory.k
    assert all(-1 <= memory.similarity <= 1 for memory in answer.memories)


def test_any_form_of_a_picture_is_accepted(model: ta.Model) -> None:
    pixels = np.asarray(Image.open(PICTURE).convert("RGB"))
    forms = (PICTURE, str(PICTURE), PICTURE.read_bytes(), Image.open(PICTURE), pixels)
    assert len({model.encode(form).visual_tokens.tobytes() for form in forms}) == 1


def test_without_memory_the_bank_stays_closed_and_nothing_is_retrieved() -> None:
    with ta.load(STORED_BUNDLE, memory=False) as model:
        assert model.memory is None
        assert model.ask(PICTURE, QUESTION).memories == ()


def test_given_memories_are_read_instead_of_searched_ones(model: ta.Model) -> None:
    assert model.memory is not None
    chosen = (model.memory.entry(3), model.memory.entry(9))
    image = model.encode(PICTURE, memories=chosen)
    assert image.memories == chosen
    assert len(image.memory_tokens) == sum(len(entry.value) for entry in chosen)
    with pytest.raises(ta.InputError, match="reads at most"):
        model.encode(PICTURE, memories=chosen * 5)


def test_what_is_taught_is_read_by_the_next_question_and_forgotten_by_the_one_after(bundle: Path) -> None:
    with ta.load(bundle) as model:
        assert model.memory is not None
        before = model.encode(PICTURE)
        entry = model.memory.add(PICTURE, " a large red  cat. ", source="album")
        assert (entry.text, entry.source, entry.time[-1]) == ("a large red  cat.", "album", "Z")
        assert model.prompt.text(entry.value.tolist()) == "a large red  cat."
        answer = model.ask(before, QUESTION)  # encoded before it was taught
        assert answer.memories[0].id == entry.id
        for again in (model.encode(PICTURE).memories, model.memory.search(PICTURE)):
            assert [memory.id for memory in again] == [memory.id for memory in answer.memories]
        assert model.memory.forget(source="album") == (entry.id,)
        for image in (before, model.encode(PICTURE)):
            answer = model.ask(image, QUESTION)
            assert answer.text == EXPECTED["answers"][QUESTION]
            assert [memory.text for memory in answer.memories] == EXPECTED["memories"]


def test_memories_that_were_given_stay_when_the_memory_changes(bundle: Path) -> None:
    with ta.load(bundle) as model:
        assert model.memory is not None
        image = model.encode(PICTURE, memories=(model.memory.entry(3),))
        model.memory.forget(id=3)
        assert [memory.id for memory in model.ask(image, QUESTION).memories] == [3]


def test_an_empty_memory_and_an_empty_text_are_no_trouble(bundle: Path) -> None:
    with ta.load(bundle) as model:
        assert model.memory is not None
        for number in model.memory.bank.ids:
            model.memory.forget(id=number)
        assert model.ask(PICTURE, QUESTION).memories == ()
        with pytest.raises(ta.InputError, match="text: it is empty"):
            model.memory.add(PICTURE, "  ")
        with pytest.raises(ta.InputError, match="must be at least 1"):
            model.memory.search(PICTURE, 0)
        assert [entry.text for entry in (model.memory.add(PICTURE, "red"), *model.memory.search(PICTURE))] == [
            "red"
        ] * 2


def test_a_memory_folder_of_its_own_leaves_the_bundle_as_it_was(bundle: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    with ta.load(bundle, memory_dir=tmp_path / "own") as model:
        assert model.memory is not None
        entry = model.memory.add(PICTURE, "a large red cat.")
    assert {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()} == before
    with ta.load(bundle, memory_dir=tmp_path / "own") as model, ta.load(bundle) as other:
        assert model.memory is not None and other.memory is not None
        assert model.memory.search(PICTURE)[0].id == entry.id
        assert len(model.memory) == len(other.memory) + 1


def test_a_given_answers_loss_is_that_of_its_logits(model: ta.Model) -> None:
    image = model.encode(PICTURE)
    logits, ids = model.answer_logits(image, QUESTION, "red")
    shares = np.exp(logits.astype(np.float64))
    expected = -np.log(shares[np.arange(len(ids)), ids] / shares.sum(axis=1))
    np.testing.assert_allclose(model.answer_nll(image, QUESTION, "red"), expected, rtol=1e-4)


def test_several_threads_share_one_model(model: ta.Model) -> None:
    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda _: model.ask(PICTURE, QUESTION).text, range(12)))
    assert set(texts) == {EXPECTED["answers"][QUESTION]}


def test_bad_questions_are_refused_and_the_model_stays_usable(model: ta.Model) -> None:
    with pytest.raises(ta.InputError, match="it is empty"):
        model.ask(PICTURE, " <image> ")
    with pytest.raises(ta.InputError, match="the context has"):
        model.ask(PICTURE, "why " * 400)
    with pytest.raises(ta.InputError, match="whole number of at least 1"):
        model.ask(PICTURE, QUESTION, max_new_tokens=0)
    assert model.ask(PICTURE, QUESTION).text == EXPECTED["answers"][QUESTION]


def test_a_closed_model_says_so() -> None:
    model = ta.load(STORED_BUNDLE)
    model.close()
    with pytest.raises(ta.InputError, match="closed"):
        model.ask(PICTURE, QUESTION)


def test_this_machine_computes_what_the_exporter_saw(model: ta.Model) -> None:
    assert run_probe(model).passed
    assert verify(STORED_BUNDLE).memory_entries == len(model.memory or ())


def test_a_machine_that_computes_something_else_fails_verification(bundle: Path) -> None:
    from dataclasses import replace

    from tinyalign_edge.bundle import MANIFEST, file_entries, open_bundle
    from tinyalign_edge.config import write_json

    manifest = open_bundle(bundle)
    probe = json.loads((bundle / manifest.probe_file).read_text("utf-8"))
    probe["logits"] = probe["logits"][::-1]
    write_json(bundle / manifest.probe_file, probe)
    write_json(bundle / MANIFEST, replace(manifest, files=file_entries(bundle)))
    with pytest.raises(ta.GateError, match="does not compute what the exporter saw"):
        verify(bundle)


@pytest.mark.parametrize(("key", "logits"), [(float("nan"), 1.0), (1.0, float("nan")), (0.9, 1.0), (1.0, 0.9)])
def test_a_probe_that_is_off_or_not_a_number_does_not_pass(key: float, logits: float) -> None:
    from tinyalign_edge.runtime.probe import ProbeResult

    assert not ProbeResult(key, logits).passed
    assert ProbeResult(1.0, 1.0).passed


def test_incomplete_characters_can_be_streamed(model: ta.Model) -> None:
    """tokenizers 0.21.0 panics here."""
    tokenizer = model.prompt.tokenizer
    lone_byte = tokenizer.token_to_id("Ã")
    decode = model.prompt.stream()
    pieces = [decode.step(tokenizer, token) for token in [tokenizer.token_to_id("Ġ"), *[lone_byte] * 30]]
    text = "".join(piece or "" for piece in [*pieces, decode.step(tokenizer, tokenizer.token_to_id("a"))])
    assert text.strip("\ufffd ") == "a"


def test_the_example_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that holds a bundle and two pictures."""
    text = (ROOT / "README.md").read_text("utf-8")
    (example,) = re.findall(r"## In an app\n\n```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "BUNDLE").symlink_to(STORED_BUNDLE)
    for name in ("photo.jpg", "other.jpg"):
        Image.open(PICTURE).convert("RGB").save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
