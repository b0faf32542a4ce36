"""Entries that carry both token ids of their text and latents of their picture."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

import tinyalign_edge as ta  # noqa: E402
from tests.test_examples import PICTURE, QUESTION, graphs, write_layout  # noqa: E402
from tests.towers import train_tiny  # noqa: E402
from tinyalign_edge.bundle import open_bundle  # noqa: E402
from tinyalign_edge.data import read_rows  # noqa: E402
from tinyalign_edge.evaluate import evaluate, single_questions  # noqa: E402
from tinyalign_edge.export.run import ExportOptions, export  # noqa: E402
from tinyalign_edge.export.value_graph import FILE, export_value_encoder  # noqa: E402
from tinyalign_edge.memory import Bank, Hybrid, token_ids_of  # noqa: E402
from tinyalign_edge.runtime.build import BuildOptions, build  # noqa: E402
from tinyalign_edge.runtime.copying import memory_texts  # noqa: E402
from tinyalign_edge.runtime.sessions import open_session  # noqa: E402
from tinyalign_edge.train.answer import TorchAnswerer  # noqa: E402
from tinyalign_edge.train.batches import Collate, Example, TokenTurn, Values  # noqa: E402
from tinyalign_edge.train.checkpoint import load_checkpoint  # noqa: E402
from tinyalign_edge.train.connector import MemoryConnector, PictureEncoder  # noqa: E402
from tinyalign_edge.train.settings import MemorySettings  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

CHANNELS, WIDTH = 20, 24
SETTINGS = MemorySettings("hybrid", latents=2, latent_dim=16, value_tokens=3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, world: Path, towers: Path) -> Path:
    """Enough steps for the value encoder to open."""
    folder = tmp_path_factory.mktemp("hybrid") / "checkpoint"
    return train_tiny(world, towers, folder, memory="hybrid", k=2, episodes=0.5, steps=12, learning_rate=1e-2)


@pytest.fixture(scope="module")
def hybrid_bundle(checkpoint: Path) -> Path:
    folder = checkpoint.with_name("bundle")
    export(checkpoint, folder, ExportOptions(precision="fp32"))
    return folder


def test_before_training_an_entry_is_its_text_after_places_that_say_what_the_mean_token_says() -> None:
    table = torch.randn(50, WIDTH)
    connector, encoder = MemoryConnector(SETTINGS, table), PictureEncoder(SETTINGS, CHANNELS)
    made = encoder(torch.randn(3, 5, CHANNELS))
    assert made.shape == (3, 2, 16)
    order = torch.tensor([0, 1, 6, 2, 3, 4, 5, 7, 8])
    values = connector.joined(made.flatten(0, 1), table[[7, 8, 9]], order)
    rank, similarity = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2]), torch.linspace(1, 0.5, 9)
    nothing = table.mean(dim=0)
    expected = torch.stack([nothing, nothing, table[7], *[nothing] * 4, table[8], table[9]])
    torch.testing.assert_close(connector(values, rank, similarity), expected)


def test_the_latents_of_a_picture_part_and_see_what_it_shows() -> None:
    torch.manual_seed(0)
    encoder = PictureEncoder(SETTINGS, CHANNELS)
    torch.nn.init.ones_(encoder.gate)
    first, second = encoder(torch.randn(2, 5, CHANNELS))
    assert not torch.allclose(first, second)
    assert not torch.allclose(first[0], first[1])


def test_a_batch_has_the_latents_of_each_entry_before_its_token_ids() -> None:
    latents = np.arange(3 * 2 * 16, dtype=np.float32).reshape(3, 2, 16)
    collate = Collate(SETTINGS, Values([(5,), (6, 7, 8), ()], latents=latents))
    picture, turns = np.zeros((4, CHANNELS), np.float32), (TokenTurn((3,), (4, 2)),)
    one, other = Example((1,), turns, picture, (1, 2), (0.9, 0.8)), Example((1,), turns, picture, (0,), (0.7,))
    batch = collate([one, other])
    memory = batch["memory"]
    assert batch["memory_mask"].sum(dim=1).tolist() == [2 + 3 + 2, 2 + 1]
    assert memory["rank"].tolist() == [0] * 5 + [1] * 2 + [0] * 3
    assert memory["token_ids"].tolist() == [6, 7, 8, 5]
    np.testing.assert_array_equal(memory["latents"], latents[[1, 2, 0]].reshape(6, 16))
    assert memory["order"].tolist() == [0, 1, 6, 7, 8, 2, 3, 4, 5, 9]
    assert SETTINGS.max_memory_tokens == 4 * (2 + 3)


def test_the_checkpoint_keeps_both_parts_of_an_entry_as_they_were_trained(checkpoint: Path, world: Path) -> None:
    opened = load_checkpoint(checkpoint)
    memory, bank = opened.config.memory, Bank(checkpoint / "memory")
    assert (memory.latents, memory.latent_dim, memory.copy_dim > 0) == (2, 96, True)
    assert (bank.manifest.spec.kind, bank.manifest.spec.latents) == ("hybrid", 2)
    assert load_file(checkpoint / "model.safetensors")["value_encoder.gate"].abs().amax(dim=1).min() > 0
    side = TorchAnswerer(opened)
    rows = {row.id: row for row in read_rows(world / "train.json", world)}
    entries = [bank.entry(number) for number in bank.ids[:5]]
    for entry, example in zip(entries, side.prepare([rows[entry.source] for entry in entries]).examples, strict=True):
        assert isinstance(entry.value, Hybrid)
        ids = opened.prompt.memory_ids(rows[entry.source].memory_turns, memory.value_tokens)
        assert entry.value.token_ids.tolist() == list(ids)
        made = side.latents(example, "whatever the text says")
        assert made is not None
        np.testing.assert_allclose(entry.value.latents, made, atol=np.abs(made).max() / 127)


def test_the_finished_latents_are_read_as_those_that_were_trained(checkpoint: Path, world: Path) -> None:
    side = TorchAnswerer(load_checkpoint(checkpoint))
    assert side.collate.values is not None
    bank, rows = side.checkpoint.bank, {row.id: row for row in read_rows(world / "train.json", world)}
    assert bank is not None
    pictures = side.prepare([rows[bank.entry(number).source] for number in bank.ids]).examples
    examples = side.prepare(single_questions(read_rows(world / "test.json", world))[:8]).examples
    finished = np.concatenate(side.losses(examples))
    ids = side.collate.values.token_ids
    side.collate.values = Values(ids, lambda some: np.stack([np.asarray(pictures[i].features) for i in some]))
    made = np.concatenate(side.losses(examples))
    np.testing.assert_allclose(finished, made, atol=0.02)
    side.collate.values = Values(ids, latents=np.zeros((len(ids), 2, 96), np.float32))
    assert np.abs(np.concatenate(side.losses(examples)) - made).max() > 0.02  # they are read


def test_token_ids_can_be_copied_and_latents_cannot(checkpoint: Path, world: Path) -> None:
    side = TorchAnswerer(load_checkpoint(checkpoint))
    model, settings = side.checkpoint.model, side.checkpoint.config.memory
    [example, other] = side.prepare(single_questions(read_rows(world / "test.json", world))[:2]).examples
    batch = side.collate([example, other])
    size = batch["memory_mask"].shape[1]
    texts = model.texts(torch.arange(2.0 * size).reshape(2, size, 1), batch["memory_mask"], batch["memory"])
    assert side.collate.values is not None
    ids = [side.collate.values.token_ids[row] for row in example.neighbours]
    words = sum(map(len, ids))
    assert texts.token_ids[0, :words].tolist() == [token for text in ids for token in text]
    assert texts.before[0, :words].tolist() == [token for text in ids for token in (-1, *text[:-1])]
    starts = [int(batch["memory_mask"][0].int().argmax()) + settings.latents]
    starts.append(starts[0] + len(ids[0]) + settings.latents)
    places = [start + i for start, text in zip(starts, ids, strict=True) for i in range(len(text))]
    assert texts.states[0, :words].tolist() == [[place - 1, place] for place in places]


def test_a_checkpoint_answers_with_and_without_its_memory(checkpoint: Path, world: Path) -> None:
    own, none = (
        evaluate(checkpoint, data=world / "test.json", images=world, memory=mode, limit=24)
        for mode in ("own", "none")  # type: ignore[arg-type]
    )
    assert own.n == none.n == 24
    assert own.nll_per_token != none.nll_per_token


def test_the_value_encoders_graph_computes_what_torch_computes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = PictureEncoder(SETTINGS, CHANNELS).eval()
    for weight in encoder.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    export_value_encoder(encoder, tmp_path, visual_tokens=5)
    session, features = open_session(tmp_path / FILE, threads=1), torch.randn(1, 5, CHANNELS)
    with torch.inference_mode():
        expected = encoder(features).numpy()
    found = session.run(["latents"], {"features": features.numpy()})[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_bundle_reads_and_copies_as_torch_does(checkpoint: Path, hybrid_bundle: Path, world: Path) -> None:
    manifest = open_bundle(hybrid_bundle)
    assert (manifest.memory.kind, manifest.memory.latents, manifest.memory.copy_file) == ("hybrid", 2, "copy.onnx")
    assert manifest.gate is not None
    assert manifest.gate.value_cosine_mean == pytest.approx(1, abs=1e-5)
    assert "as texts with 2 latents of its picture each" in (hybrid_bundle / "README.md").read_text("utf-8")
    side = TorchAnswerer(load_checkpoint(checkpoint))
    model = side.checkpoint.model
    rows = single_questions(read_rows(world / "test.json", world))[:8]
    examples = side.prepare(rows).examples
    with ta.load(hybrid_bundle) as device:
        for row, example, said in zip(rows, examples, side.answers(examples), strict=True):
            turn, image = row.turns[0], device.encode(row.path)
            batch = side.collate([example])
            inputs, size = batch["memory"], batch["memory_mask"].shape[1]
            with torch.inference_mode():
                tokens = model.memory_connector(model.values(inputs), inputs["rank"], inputs["similarity"]).numpy()
            np.testing.assert_allclose(image.memory_tokens, tokens, atol=1e-4)
            places = torch.arange(float(size)).reshape(1, size, 1)
            texts = model.texts(places, batch["memory_mask"], inputs)
            found = memory_texts([(len(example.before), image)], manifest.memory)
            wanted = (texts.states.int()[0], texts.token_ids[0], texts.before[0])
            given = (found.states, found.token_ids, found.before)
            one, other = (sorted(zip(*(part.tolist() for part in parts), strict=True)) for parts in (given, wanted))
            assert one == other
            logits, _ = device.answer_logits(image, turn.question, turn.answer)
            np.testing.assert_allclose(logits, side.logits(example), atol=1e-3)
            assert device.ask(image, turn.question).text == said


def test_the_graphs_alone_read_and_copy_it_too(hybrid_bundle: Path, tmp_path: Path) -> None:
    layout = write_layout(hybrid_bundle, tmp_path)
    with ta.load(hybrid_bundle) as model:
        answer = model.ask(PICTURE, QUESTION)
        assert answer.memories
    done = graphs(hybrid_bundle, layout, PICTURE, QUESTION)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"answer": answer.text, "memories": [entry.text for entry in answer.memories]}


def test_an_added_entry_is_read_with_the_latents_of_its_picture_and_forgotten(
    checkpoint: Path, hybrid_bundle: Path, world: Path, tmp_path: Path
) -> None:
    row = read_rows(world / "test.json", world)[0]
    side = TorchAnswerer(load_checkpoint(checkpoint))
    with ta.load(hybrid_bundle, memory_dir=tmp_path / "bank") as model:
        assert model.memory is not None
        before = model.encode(row.path)
        added = model.memory.add(row.path, "zygo")
        assert isinstance(added.value, Hybrid)
        assert model.prompt.text(added.value.token_ids.tolist()) == "zygo"
        made = side.latents(side.prepare([row]).examples[0], "")
        assert made is not None
        np.testing.assert_allclose(added.value.latents, made, atol=1.02 * np.abs(made).max() / 127)
        image = model.encode(row.path)
        assert image.memories[0].id == added.id
        assert len(image.memory_tokens) == sum(len(entry.value) for entry in image.memories)
        assert model.memory.forget(text="zygo") == (added.id,)
        assert [entry.id for entry in model.encode(row.path).memories] == [entry.id for entry in before.memories]


def test_an_entry_of_no_text_is_its_latents(hybrid_bundle: Path, world: Path) -> None:
    row = read_rows(world / "test.json", world)[0]
    with ta.load(hybrid_bundle) as model:
        entry = model.encode(row.path).memories[0]
        assert isinstance(entry.value, Hybrid)
        bare = replace(entry, value=Hybrid(np.zeros(0, np.int32), entry.value.latents))
        image = model.encode(row.path, memories=[bare])
        np.testing.assert_allclose(image.memory_tokens, model.memory_tokens([entry])[:2], atol=1e-5)
        assert model.answer_logits(image, "What is it?", "a circle")[0].shape[1] == model.manifest.decoder.vocab_size


def test_a_bank_built_of_the_training_rows_is_the_one_that_training_wrote(
    hybrid_bundle: Path, world: Path, tmp_path: Path
) -> None:
    build(hybrid_bundle, data=world / "train.json", images=world, out=tmp_path / "bank", options=BuildOptions())
    banks = Bank(tmp_path / "bank"), Bank(hybrid_bundle / "memory")
    built, trained = ({bank.entry(i).source: bank.entry(i).value for i in bank.ids} for bank in banks)
    for source, value in trained.items():
        assert isinstance(value, Hybrid)
        other = built[source]
        assert isinstance(other, Hybrid)
        assert token_ids_of(other).tolist() == token_ids_of(value).tolist()
        np.testing.assert_allclose(other.latents, value.latents, atol=1.02 * np.abs(value.latents).max() / 127)


def test_a_checkpoint_whose_latents_never_opened_is_exported(world: Path, towers: Path, tmp_path: Path) -> None:
    """Its latents are zero in torch and in the graph: they are equal, though they have no angle."""
    shut = train_tiny(world, towers, tmp_path / "c", memory="hybrid", steps=1)
    path = shut / "model.safetensors"
    weights = {name: weight.clone() for name, weight in load_file(path).items()}
    save_file({**weights, "value_encoder.gate": torch.zeros_like(weights["value_encoder.gate"])}, path)
    manifest = export(shut, tmp_path / "b", ExportOptions(precision="fp32"))
    assert manifest.gate is not None
    assert manifest.gate.value_cosine_mean == 1


def test_an_int8_export_passes_its_gate_and_evaluates_as_the_checkpoint(
    checkpoint: Path, world: Path, tmp_path: Path
) -> None:
    manifest = export(checkpoint, tmp_path / "int8")
    assert manifest.gate is not None
    assert manifest.gate.passed
    given: dict[str, Any] = {"data": world / "test.json", "images": world, "limit": 24}
    torch_side, device_side = (evaluate(folder, **given) for folder in (checkpoint, tmp_path / "int8"))
    assert abs(torch_side.nll_per_token / device_side.nll_per_token - 1) < 0.02
