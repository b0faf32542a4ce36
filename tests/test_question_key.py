"""Keys that tell what is asked beside what is seen: in training, in the bundle and in what is taught."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.towers import train_tiny  # noqa: E402
from tinyalign_edge.bench import teach  # noqa: E402
from tinyalign_edge.bench.study.eye import Eye  # noqa: E402
from tinyalign_edge.bundle import open_bundle  # noqa: E402
from tinyalign_edge.data import Turn, read_rows  # noqa: E402
from tinyalign_edge.errors import InputError  # noqa: E402
from tinyalign_edge.export.question_graph import FILE, export_question_key  # noqa: E402
from tinyalign_edge.export.run import ExportOptions, export  # noqa: E402
from tinyalign_edge.memory.side_by_side import joined  # noqa: E402
from tinyalign_edge.runtime.answerer import BundleAnswerer  # noqa: E402
from tinyalign_edge.runtime.build import BuildOptions, build  # noqa: E402
from tinyalign_edge.runtime.memory import open_bank  # noqa: E402
from tinyalign_edge.runtime.model import Model, load  # noqa: E402
from tinyalign_edge.runtime.sessions import open_session  # noqa: E402
from tinyalign_edge.train.answer import TorchAnswerer  # noqa: E402
from tinyalign_edge.train.checkpoint import load_checkpoint  # noqa: E402
from tinyalign_edge.train.options import TrainOptions, check_options  # noqa: E402
from tinyalign_edge.train.question_key import QuestionKey  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

COLOUR, COUNT = "What colour is the circle?", "How many shapes are there?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, world: Path, towers: Path) -> Path:
    folder = tmp_path_factory.mktemp("asking") / "checkpoint"
    return train_tiny(world, towers, folder, key="question", k=3, memory_from=0.0)


@pytest.fixture(scope="module")
def asking_bundle(checkpoint: Path) -> Path:
    folder = checkpoint.with_name("bundle")
    export(checkpoint, folder, ExportOptions(precision="fp32"))
    return folder


@pytest.fixture
def taught(asking_bundle: Path, tmp_path: Path) -> Any:
    with load(asking_bundle, memory_dir=tmp_path / "memory") as model:
        yield model


def found(model: Model, picture: Path, question: str) -> list[tuple[str, str]]:
    return [(entry.question, entry.source) for entry in model.encode(picture, question=question).memories]


def test_cosines_of_keys_are_weighted_means_of_those_of_their_parts() -> None:
    random = np.random.default_rng(0)
    pictures, questions = (
        (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
        for x in (random.normal(size=(5, 8)), random.normal(size=(5, 4)))
    )
    keys = joined(pictures, questions, 0.7)
    wanted = 0.3 * pictures @ pictures.T + 0.7 * questions @ questions.T
    assert np.allclose(keys @ keys.T, wanted, atol=1e-6)
    nothing = joined(pictures, np.zeros((5, 4), np.float32), 0.7)
    assert np.array_equal(nothing[:, :8], pictures)
    assert not nothing[:, 8:].any()


def test_of_many_held_out_questions_evenly_spaced_ones_are_evaluated(
    world: Path, towers: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from tinyalign_edge.train import prepare
    from tinyalign_edge.train.watcher import Watcher

    seen = []
    begin = Watcher.on_train_begin

    def look(self: Any, *args: Any, **given: Any) -> None:
        seen.append(self.held_out)
        begin(self, *args, **given)

    monkeypatch.setattr(Watcher, "on_train_begin", look)
    for most in (prepare.HELD_OUT_ASKED, 5):
        monkeypatch.setattr(prepare, "HELD_OUT_ASKED", most)
        train_tiny(world, towers, tmp_path / str(most), key="question", steps=1, episodes=0.0)
    every, some = ([example.turns for example in examples] for examples in seen)
    assert len(some) <= 5 < len(every)
    assert some == every[:: -(-len(every) // 5)]


def test_the_graph_computes_what_torch_computes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    key, texts = QuestionKey(12, 6), [torch.randn(n, 12) for n in (1, 4, 9)]
    words = torch.cat([key.words(text[None], torch.ones(1, len(text), dtype=torch.bool)) for text in texts])
    key.fit(words)
    export_question_key(key, tmp_path)
    session: Any = open_session(tmp_path / FILE, threads=1)
    for text, wanted in zip(texts, key(words), strict=True):
        made = session.run(["question"], {"text": text.numpy()})[0]
        assert np.allclose(made, wanted.numpy(), atol=1e-5)
        assert np.linalg.norm(made) == pytest.approx(1, abs=1e-5)


def test_the_only_question_there_is_tells_nothing() -> None:
    torch.manual_seed(0)
    key = QuestionKey(12, 6)
    words = key.words(torch.randn(1, 5, 12), torch.ones(1, 5, dtype=torch.bool))
    key.fit(words.repeat(7, 1))
    assert not key(words).any()


def test_padding_does_not_change_a_key() -> None:
    torch.manual_seed(0)
    key, text = QuestionKey(12, 6), torch.randn(1, 3, 12)
    padded = torch.cat([text, torch.randn(1, 2, 12)], dim=1)
    short, long = torch.ones(1, 3, dtype=torch.bool), torch.tensor([[True, True, True, False, False]])
    assert torch.allclose(key.words(padded, long), key.words(text, short), atol=1e-6)


def test_every_question_is_an_entry_of_its_own(checkpoint: Path, world: Path) -> None:
    bank = load_checkpoint(checkpoint).bank
    assert bank is not None
    entries = [bank.entry(number) for number in bank.ids]
    rows = {row.id: row for row in read_rows(world / "train.json", world)}
    sources = {entry.source for entry in entries}
    assert len(entries) == sum(len(rows[source].turns) for source in sources) > len(sources)
    assert {entry.question for entry in entries if entry.source == entries[0].source} == {
        turn.question for turn in rows[entries[0].source].turns
    }


def test_the_bundle_finds_and_reads_what_torch_does(checkpoint: Path, asking_bundle: Path, world: Path) -> None:
    seen = read_rows(world / "test.json", world)[:8]
    rows = [*seen, *(replace(row, turns=(Turn(asked, "red"),)) for row in seen for asked in (COLOUR, COUNT))]
    answerer = TorchAnswerer(load_checkpoint(checkpoint))
    examples = answerer.prepare(rows).examples
    wanted = list(answerer.reference_losses(rows))
    with load(asking_bundle) as model:
        near = [[entry.id for entry in model.encode(row.path, question=row.turns[0].question).memories] for row in rows]
        said = list(BundleAnswerer(model).reference_losses(rows))
        shuffled = list(BundleAnswerer(model).reference_losses(rows, memory="shuffled"))
    assert near == [[entry.id for entry in answerer.memories(example)] for example in examples]
    assert len({tuple(ids) for ids in near}) > len({row.image for row in rows})  # another question, other memories
    assert [loss for loss, _ in said] == pytest.approx([loss for loss, _ in wanted], abs=1e-3)
    others = list(answerer.reference_losses(rows, memory="shuffled"))
    assert [loss for loss, _ in shuffled] == pytest.approx([loss for loss, _ in others], abs=1e-3)


def test_memories_are_retrieved_when_the_question_is_known(asking_bundle: Path, world: Path) -> None:
    picture = read_rows(world / "test.json", world)[0].path
    with load(asking_bundle) as model:
        image = model.encode(picture)
        assert image.memories == ()
        later, at_once = model.ask(image, COLOUR), model.ask(picture, COLOUR)
        assert later.text == at_once.text
        assert [e.id for e in later.memories] == [e.id for e in at_once.memories] != []
        assert np.array_equal(model.answer_nll(image, COLOUR, "red"), model.answer_nll(
            model.encode(picture, question=COLOUR), COLOUR, "red"
        ))  # fmt: skip
        assert found(model, picture, COLOUR) != found(model, picture, COUNT)
        asked = model.encode(picture, question=COUNT)
        assert model.renewed(asked, COUNT) is asked
        assert [e.question for e in model.renewed(asked, COLOUR).memories] == [
            q for q, _ in found(model, picture, COLOUR)
        ]
        given = model.encode(picture, memories=asked.memories)
        assert model.renewed(given, COLOUR).memories == asked.memories


def test_a_conversation_remembers_by_what_a_picture_comes_with(asking_bundle: Path, world: Path) -> None:
    picture = read_rows(world / "test.json", world)[0].path
    with load(asking_bundle) as model:
        talk = model.chat()
        talk.ask(COUNT, picture)
        talk.ask("And their colour?")
        assert [e.question for e in talk.exchanges[0].images[0].memories] == [
            q for q, _ in found(model, picture, COUNT)
        ]


def test_what_is_taught_is_found_by_its_question(taught: Model, world: Path) -> None:
    assert taught.memory is not None
    picture = read_rows(world / "test.json", world)[0].path
    with pytest.raises(InputError, match="question: it is empty"):
        taught.memory.add(picture, "a zebra")
    image = taught.encode(picture)
    taught.ask(image, COLOUR)
    entry = taught.memory.add(picture, "ultramarine", question=COLOUR, source="me")
    assert (entry.text, entry.question) == ("ultramarine", COLOUR)
    assert found(taught, picture, COLOUR)[0] == (COLOUR, "me")
    assert "me" not in [source for _, source in found(taught, picture, COUNT)]
    assert taught.renewed(image, COLOUR).memories[0].text == "ultramarine"
    assert taught.memory.search(picture, 1)[0].source == "me"  # by the picture alone
    assert taught.memory.search(picture, 1, question=COLOUR)[0].similarity == pytest.approx(1, abs=0.01)
    assert taught.memory.forget(source="me")
    assert found(taught, picture, COLOUR)[0] != (COLOUR, "me")


def test_teaching_by_example_tells_a_bundle_what_is_asked(
    checkpoint: Path, asking_bundle: Path, world: Path, tmp_path: Path
) -> None:
    rows = read_rows(world / "test.json", world)[:4]
    asked = [replace(row, turns=(Turn(question, ""),)) for row in rows for question in (COLOUR, COUNT)]
    lessons = [replace(row, turns=(replace(row.turns[0], answer=f"zab {i}"),)) for i, row in enumerate(asked)]
    in_onnx = teach.BundlePupil(asking_bundle, tmp_path / "bundle")
    in_torch = teach.TorchPupil(checkpoint, tmp_path / "torch", Eye())
    for pupil in (in_onnx, in_torch):  # one picture is taught an answer to each question
        pupil.teach(lessons[:4])
        assert pupil.nearest(asked[:4]) == ["zab 0", "zab 1", "zab 2", "zab 3"]
    assert in_onnx.nearest(asked) == in_torch.nearest(asked)


def test_a_memory_that_is_built_anew_is_the_one_of_the_training(
    checkpoint: Path, asking_bundle: Path, world: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(asking_bundle, bundle)
    before = open_bank(bundle, open_bundle(bundle))
    built = build(bundle, data=world / "train.json", images=world, options=BuildOptions())
    bank = open_bank(bundle, open_bundle(bundle))
    assert built.entries == len(bank) >= len(before)  # what training held out is in it now, too
    keys = {(e.source, e.question): e for e in map(bank.entry, bank.ids)}
    with load(bundle) as model:
        for old in [before.entry(number) for number in list(before.ids)[::9]]:
            new = keys[old.source, old.question]
            assert (new.text, new.value.tolist()) == (old.text, old.value.tolist())
            row = next(row for row in read_rows(world / "train.json", world) if row.id == old.source)
            best = model.memory.search(row.path, 1, question=old.question)[0]  # type: ignore[union-attr]
            assert best.question == old.question
            assert best.similarity == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("memory", ["none", "paper"])
def test_a_memory_without_such_keys_is_named(memory: Any) -> None:
    with pytest.raises(InputError, match="--key question"):
        check_options(TrainOptions(memory=memory, key="question"))
