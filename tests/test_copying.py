"""The copy term: words of the memory's texts in the answer, in torch and in the bundle alike."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from tests.towers import train_tiny  # noqa: E402
from tinyalign_edge.bundle import open_bundle  # noqa: E402
from tinyalign_edge.config import read_json, write_json  # noqa: E402
from tinyalign_edge.data import read_rows  # noqa: E402
from tinyalign_edge.errors import InputError  # noqa: E402
from tinyalign_edge.evaluate import single_questions  # noqa: E402
from tinyalign_edge.export.copy_graph import FILE, export_copy_head  # noqa: E402
from tinyalign_edge.export.run import ExportOptions, export  # noqa: E402
from tinyalign_edge.runtime.copying import memory_texts as copied_by_the_runtime  # noqa: E402
from tinyalign_edge.runtime.model import load  # noqa: E402
from tinyalign_edge.runtime.sessions import open_session  # noqa: E402
from tinyalign_edge.train.answer import TorchAnswerer  # noqa: E402
from tinyalign_edge.train.checkpoint import load_checkpoint  # noqa: E402
from tinyalign_edge.train.copying import CopyHead, Texts, label_losses, memory_texts, mix  # noqa: E402
from tinyalign_edge.train.settings import CONFIG  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

WIDTH, VOCABULARY = 24, 50
QUESTION = "What colour is the circle?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, world: Path, towers: Path) -> Path:
    """A few steps with episodes; then its copy term is made to copy about half of what it says."""
    folder = tmp_path_factory.mktemp("copying") / "checkpoint"
    train_tiny(world, towers, folder, copy_words=True, episodes=0.5, k=2, value_tokens=72)
    weights = load_file(folder / "model.safetensors")
    weights["copy_head.vocabulary.bias"].fill_(2.0)
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def copying_bundle(checkpoint: Path) -> Path:
    folder = checkpoint.with_name("bundle")
    export(checkpoint, folder, ExportOptions(precision="fp32"))
    return folder


def test_the_graph_computes_what_torch_computes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    head = CopyHead(WIDTH, 8).eval()
    for weight in head.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    export_copy_head(head, tmp_path, vocab_size=VOCABULARY)
    session = open_session(tmp_path / FILE, threads=1)
    for asked, tokens in ((1, 1), (3, 7)):
        logits, states = 20 * torch.randn(asked, VOCABULARY), torch.randn(asked, WIDTH)
        texts, ids = torch.randn(tokens, 2, WIDTH), torch.randint(VOCABULARY, (tokens,))
        read, before = torch.randint(3, (asked,)), torch.randint(3, (tokens,))
        similarity = torch.rand(1, tokens)
        mask = torch.ones(1, tokens, dtype=torch.bool)
        found = Texts(texts.flatten(1)[None], ids[None], before[None], mask, similarity)
        with torch.inference_mode():
            shares = head.shares(states[None], read[None], found)[0]
            expected = mix(logits, shares, ids.expand(asked, -1))
        feed = {
            "logits": logits.numpy(),
            "states": states.numpy(),
            "texts": texts.numpy(),
            "token_ids": ids.numpy(),
            "match": (read[:, None] == before).float().numpy(),
            "similarity": similarity.numpy(),
        }
        mixed = session.run(None, feed)[0]
        np.testing.assert_allclose(mixed, expected.numpy(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(np.exp(mixed).sum(axis=1), 1, rtol=1e-4)


def test_the_loss_of_labels_is_that_of_the_mixture() -> None:
    torch.manual_seed(0)
    labels = torch.tensor([3, 3, 7, 9])
    token_ids = torch.tensor([[3, 3, 5], [5, 6, 0], [7, 1, 0], [9, 9, 9]])  # twice, never, once, and nothing else
    scores = torch.randn(4, 4)
    scores[2, 3] = -torch.inf  # padding
    found = []
    for mixed in (True, False):
        logits, given = (
            (5 * torch.linspace(-1, 1, 4 * 12).sin().reshape(4, 12)).requires_grad_(),
            scores.clone().requires_grad_(),
        )
        shares = given.log_softmax(dim=-1)
        losses = (
            torch.nn.functional.cross_entropy(mix(logits, shares, token_ids), labels, reduction="none")
            if mixed
            else label_losses(logits, shares, token_ids, labels)
        )
        losses.sum().backward()
        found.append((losses.detach(), logits.grad, given.grad))
    for wanted, value in zip(*found, strict=True):
        torch.testing.assert_close(value, wanted)
        assert value.isfinite().all()


def test_memory_tokens_are_found_in_each_row_whatever_its_length() -> None:
    hidden = torch.arange(2 * 5, dtype=torch.float32).reshape(2, 5, 1)
    mask = torch.tensor([[False, True, True, True, False], [False, False, True, False, False]])
    alike = torch.tensor([0.9, 0.9, 0.5, 0.25])
    texts = memory_texts(hidden, mask, torch.tensor([7, 8, 9, 6]), torch.tensor([0, 0, 1, 0]), alike)
    assert texts.mask.tolist() == [[True, True, True], [True, False, False]]
    assert texts.token_ids[0].tolist() == [7, 8, 9]
    assert texts.token_ids[1, 0] == 6
    assert texts.before[0].tolist() == [-1, 7, -1]  # the third token begins another entry
    assert texts.states[0].tolist() == [[0, 1], [1, 2], [2, 3]]
    assert texts.states[1, 0].tolist() == [6, 7]
    torch.testing.assert_close(texts.similarity[texts.mask], alike)


def test_after_whole_entries_the_end_of_the_answer_can_be_copied() -> None:
    hidden = torch.arange(2 * 6, dtype=torch.float32).reshape(2, 6, 1)
    mask = torch.tensor([[False, True, True, True, True, True], [False, False, True, False, False, False]])
    token_ids, rank = torch.tensor([7, 8, 9, 4, 5, 6]), torch.tensor([0, 0, 1, 1, 1, 0])
    alike = torch.tensor([0.9, 0.9, 0.5, 0.5, 0.5, 0.25])
    texts = memory_texts(hidden, mask, token_ids, rank, alike, end=2, limit=3)  # that of three may have been cut
    assert texts.mask.tolist() == [[True] * 6, [True] + [False] * 4 + [True]]
    assert texts.token_ids[0].tolist() == [7, 8, 9, 4, 5, 2]
    assert texts.before[0].tolist() == [-1, 7, -1, 9, 4, 8]
    assert texts.states[0, 5].tolist() == [2, 2]
    assert (texts.token_ids[1, 5], texts.before[1, 5], texts.states[1, 5].tolist()) == (2, 6, [8, 8])
    torch.testing.assert_close(texts.similarity[0], torch.tensor([0.9, 0.9, 0.5, 0.5, 0.5, 0.9]))
    assert memory_texts(hidden, mask, token_ids, rank, alike, end=2, limit=1).mask.shape[1] == 5


def test_the_runtime_finds_the_same_in_an_entry(checkpoint: Path, copying_bundle: Path, world: Path) -> None:
    row = read_rows(world / "test.json", world)[0]
    with load(copying_bundle) as model:
        image = model.encode(row.path)
        block = model.manifest.memory
        values = [entry.value.astype(np.int64) for entry in image.memories]
        assert block.copy_end is not None
        assert any(len(value) < block.value_tokens for value in values)
        found = copied_by_the_runtime([(2, image)], block)
    size = 2 + len(image.memory_tokens) + len(image.visual_tokens)
    mask = torch.zeros(1, size, dtype=torch.bool)
    mask[0, 2 : 2 + len(image.memory_tokens)] = True
    sizes = [len(value) for value in values]
    rank = torch.tensor(np.repeat(np.arange(len(values)), sizes))
    alike = torch.tensor(np.repeat([entry.similarity for entry in image.memories], sizes))
    texts = memory_texts(torch.arange(size, dtype=torch.float32).reshape(1, size, 1), mask,
                         torch.tensor(np.concatenate(values)), rank, alike, end=block.copy_end,
                         limit=block.value_tokens)  # fmt: skip
    wanted = texts.states.int()[0], texts.token_ids[0], texts.before[0], texts.similarity[0]
    given = found.states, found.token_ids, found.before, found.similarity
    one, other = (sorted(zip(*(part.tolist() for part in parts), strict=True)) for parts in (given, wanted))
    assert one == other


def test_without_memories_nothing_is_copied(checkpoint: Path, world: Path) -> None:
    side = TorchAnswerer(load_checkpoint(checkpoint))
    rows = single_questions(read_rows(world / "test.json", world))[:3]
    without = side.prepare(rows, memory="none").examples
    before = [side.logits(example) for example in without]
    torch.nn.init.normal_(side.checkpoint.model.copy_head.vocabulary.weight)  # type: ignore[union-attr]
    assert all(np.array_equal(a, side.logits(example)) for a, example in zip(before, without, strict=True))


def test_the_bundle_copies_as_torch_does(checkpoint: Path, copying_bundle: Path, world: Path) -> None:
    manifest = open_bundle(copying_bundle)
    assert manifest.decoder.hidden
    assert manifest.memory.copy_file == FILE
    assert "copied into the answer" in (copying_bundle / "README.md").read_text("utf-8")
    side = TorchAnswerer(load_checkpoint(checkpoint))
    rows = single_questions(read_rows(world / "test.json", world))[:8]
    examples = side.prepare(rows).examples
    with load(copying_bundle) as model:
        for row, example, said in zip(rows, examples, side.answers(examples), strict=True):
            turn, image = row.turns[0], model.encode(row.path)
            logits, _ = model.answer_logits(image, turn.question, turn.answer)
            np.testing.assert_allclose(logits, side.logits(example), atol=1e-3)
            assert model.ask(image, turn.question).text == said


@pytest.mark.parametrize("first", [True, False])
def test_a_memory_at_the_very_beginning_is_copied_as_torch_does(
    checkpoint: Path, world: Path, tmp_path: Path, first: bool
) -> None:
    """Without a beginning-of-text token the first memory token has no position before it."""
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    config = read_json(checkpoint / CONFIG)
    assert config["memory"]["first"]
    config["prompt"]["prepend_bos"], config["memory"]["first"] = False, first
    write_json(tmp_path / "checkpoint" / CONFIG, config)
    export(tmp_path / "checkpoint", tmp_path / "bundle", ExportOptions(precision="fp32"))
    side = TorchAnswerer(load_checkpoint(tmp_path / "checkpoint"))
    row = single_questions(read_rows(world / "test.json", world))[0]
    [example] = side.prepare([row]).examples
    assert not example.before
    with load(tmp_path / "bundle") as model:
        logits, _ = model.answer_logits(model.encode(row.path), row.turns[0].question, row.turns[0].answer)
    np.testing.assert_allclose(logits, side.logits(example), atol=1e-3)


def test_what_is_copied_is_the_same_with_kept_prefixes_drafts_choices_and_turns(
    copying_bundle: Path, world: Path
) -> None:
    rows = read_rows(world / "test.json", world)
    with load(copying_bundle) as model, load(copying_bundle, cache_mb=0) as forgetful:
        image = model.encode(rows[0].path)
        first = model.ask(image, QUESTION)
        assert model.ask(image, QUESTION).text == first.text == forgetful.ask(rows[0].path, QUESTION).text
        assert model.ask(image, QUESTION, drafts=False).text == first.text
        chat = model.chat()
        assert chat.ask(QUESTION, rows[0].path).text == first.text
        choices = model.ask(image, QUESTION, choices=["red", "blue"])
        means = [-model.answer_nll(image, QUESTION, choice).mean() for choice in ("red", "blue")]
        np.testing.assert_allclose(choices.likelihoods, means, atol=1e-3)


def test_a_taught_word_is_copied(checkpoint: Path, world: Path, tmp_path: Path) -> None:
    """With a copy term that always copies, and the token that follows the one just read."""
    always = tmp_path / "always"
    shutil.copytree(checkpoint, always)
    weights = load_file(always / "model.safetensors")
    weights["copy_head.vocabulary.bias"].fill_(-60.0)
    weights["copy_head.match.bias"].fill_(40.0)
    save_file(weights, always / "model.safetensors")
    export(always, tmp_path / "bundle", ExportOptions(precision="fp32"))
    row = read_rows(world / "test.json", world)[0]
    with load(tmp_path / "bundle", memory_dir=tmp_path / "bank") as model:
        entry = model.memory.add(row.path, "zygo")  # type: ignore[union-attr]
        image = model.encode(row.path, memories=[entry])
        ids = entry.value.tolist()
        logits, answer = model.answer_logits(image, QUESTION, "zygo")
        assert answer[: len(ids)].tolist() == ids
        assert logits.argmax(axis=1)[1 : len(ids)].tolist() == ids[1:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"copy_words": True, "memory": "latents"}, "--copy"),
        ({"episodes": 0.5, "memory": "none"}, "--episodes"),
        ({"episodes": 1.5}, "--episodes"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    from tinyalign_edge.train.options import TrainOptions, check_options

    with pytest.raises(InputError, match=message):
        check_options(TrainOptions(**options))
