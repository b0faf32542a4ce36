"""Entries that carry both token ids of their text and latents of their picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file  # noqa: E402

from tests.towers import train_tiny  # noqa: E402
from tinyalign_edge.data import read_rows  # noqa: E402
from tinyalign_edge.evaluate import evaluate, single_questions  # noqa: E402
from tinyalign_edge.memory import Bank, Hybrid  # noqa: E402
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
