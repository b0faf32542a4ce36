"""What trains the latents: an own loss by which they say their text, and a value encoder that stays as it begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file  # noqa: E402

from tests.test_cli import fails, run  # noqa: E402, F401
from tests.towers import train_tiny  # noqa: E402
from tinyalign_edge.data import read_rows  # noqa: E402
from tinyalign_edge.errors import InputError  # noqa: E402
from tinyalign_edge.train.answer import TorchAnswerer  # noqa: E402
from tinyalign_edge.train.batches import Values, without_memory  # noqa: E402
from tinyalign_edge.train.checkpoint import load_checkpoint  # noqa: E402
from tinyalign_edge.train.model import IGNORED, AlignModel  # noqa: E402
from tinyalign_edge.train.options import TrainOptions  # noqa: E402
from tinyalign_edge.train.recipe import load_recipe  # noqa: E402
from tinyalign_edge.train.reconstruct import sum_over_answers, text_losses, vocabulary_of  # noqa: E402
from tinyalign_edge.train.run import train  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

LATENTS: dict[str, Any] = {"memory": "latents", "memory_from": 0.0}


def test_a_token_is_known_by_the_direction_of_its_embedding() -> None:
    torch.manual_seed(0)
    table, far = torch.randn(50, 16) + 3, torch.randn(2, 3, 16)
    ids, mask = torch.tensor([[7, 8, 9, 4], [5, 0, 0, 0]]), torch.tensor([[True] * 4, [True] + [False] * 3])
    exact, vocabulary = table[ids[:, :3]], vocabulary_of(table)
    losses, entries = text_losses(exact, ids, mask, vocabulary)
    assert entries.tolist() == [0, 0, 0, 1]  # three latents say three tokens; after a short text there is no demand
    assert losses.max() < 0.1
    longer = table.mean(dim=0) + 5 * (exact - table.mean(dim=0))
    torch.testing.assert_close(text_losses(longer, ids, mask, vocabulary)[0], losses, atol=1e-4, rtol=0)
    assert text_losses(far, ids, mask, vocabulary)[0].mean() > 5
    more = text_losses(torch.cat([exact, far], dim=1), ids[:, :2], mask[:, :2], vocabulary)[0]
    assert torch.equal(more, losses[[0, 1, 3]])  # more latents than tokens


def test_in_parts_the_loss_and_its_gradients_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    vocabulary, tokens = vocabulary_of(torch.randn(50, 16)), torch.randn(5, 3, 16)
    ids, mask = torch.randint(50, (5, 4)), torch.ones(5, 4, dtype=torch.bool)
    found = []
    for at_once in (100, 4):
        monkeypatch.setattr("tinyalign_edge.train.reconstruct.AT_ONCE", at_once)
        read = tokens.clone().requires_grad_()
        losses, _ = text_losses(read, ids, mask, vocabulary)
        losses.sum().backward()
        found.append((losses.detach(), read.grad))
    assert len(found[0][0]) == 15
    torch.testing.assert_close(found[1], found[0])
    assert len(text_losses(tokens, ids, ~mask, vocabulary)[0]) == 0


def test_the_vocabulary_is_made_once_while_it_does_not_train(
    checkpoints: dict[str, Path], world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    monkeypatch.setattr(
        "tinyalign_edge.train.model.vocabulary_of", lambda table: made.append(table) or vocabulary_of(table)
    )
    model, batch = as_in_training(checkpoints["latents"], world)
    inputs = batch["memory"], batch["memory_mask"], batch["labels"]
    with torch.inference_mode():
        first = model.own_losses(*inputs)
    model.own_losses(*inputs).backward()
    assert len(made) == 1
    model.language.requires_grad_(True)
    with torch.no_grad():
        model.language.get_input_embeddings().weight.mul_(-1)
    assert model.own_losses(*inputs) != first
    assert len(made) == 2


def test_each_answer_token_adds_the_mean_of_its_rows_memory() -> None:
    losses, rows = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 2])
    found = sum_over_answers(losses, rows, torch.tensor([2, 7, 3]))
    assert found.item() == 2 * 2.0 + 7 * 0.0 + 3 * 5.0


def as_in_training(checkpoint: Path, world: Path) -> tuple[AlignModel, dict[str, Any]]:
    """The model, and a batch of test pictures whose memory is made anew from features and texts."""
    side = TorchAnswerer(load_checkpoint(checkpoint))
    bank, prompt = side.checkpoint.bank, side.checkpoint.prompt
    assert bank is not None
    rows = {row.id: row for row in read_rows(world / "train.json", world)}
    entries = [rows[bank.entry(number).source] for number in bank.ids]
    pictures = [example.features for example in side.prepare(entries).examples]
    ids = [prompt.memory_ids(row.memory_turns, 24) for row in entries]
    side.collate.values = Values(ids, lambda some: [pictures[i] for i in some])  # type: ignore[arg-type, return-value]
    batch = side.collate(side.prepare(read_rows(world / "test.json", world)[:16]).examples)
    assert batch["memory"] is not None
    return side.checkpoint.model, batch


def unsaid(checkpoint: Path, world: Path) -> float:
    """The own loss of the latents that test pictures find."""
    model, batch = as_in_training(checkpoint, world)
    with torch.inference_mode():
        own = model.own_losses(batch["memory"], batch["memory_mask"], batch["labels"])
    return float(own / (batch["labels"] != IGNORED).sum())


def test_with_a_loss_of_their_own_latents_say_their_text_and_are_read_as_before(
    world: Path, towers: Path, tmp_path: Path
) -> None:
    narrow: dict[str, Any] = {**LATENTS, "latent_dim": 8, "steps": 30, "eval_every": 30, "learning_rate": 1e-2}
    start = unsaid(train_tiny(world, towers, tmp_path / "start", **{**narrow, "learning_rate": 1e-9}), world)
    plain, taught = (
        train_tiny(world, towers, tmp_path / str(weight), reconstruct=weight, **narrow) for weight in (0.0, 1.0)
    )
    assert unsaid(taught, world) < 0.7 * min(start, unsaid(plain, world))
    points = [json.loads(line) for line in (taught / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert points[-1]["held_out_loss"] < points[0]["held_out_loss"]
    config = load_checkpoint(taught).config.training
    assert (config.reconstruct, config.freeze_values) == (1.0, False)


def test_the_own_loss_is_added_by_its_weight_where_there_is_a_memory(checkpoints: dict[str, Path], world: Path) -> None:
    model, batch = as_in_training(checkpoints["latents"], world)
    own = unsaid(checkpoints["latents"], world)
    assert own > 0.01
    answers = int((batch["labels"] != IGNORED).sum())
    with torch.inference_mode():
        mean = model.answer_losses(**batch).mean()
        assert model(**batch)["loss"] == mean
        model.reconstruct = 2.0
        assert float(model(**batch)["loss"]) == pytest.approx(float(mean) + 2 * own, rel=1e-5)
        part = model(num_items_in_batch=4 * answers, **batch)["loss"]  # of a step of four such passes
        assert float(part) == pytest.approx((float(mean) + 2 * own) / 4, rel=1e-5)
        alone = without_memory(batch)
        assert model(**alone)["loss"] == model.answer_losses(**alone).mean()


def test_the_own_loss_is_told_apart_from_that_of_the_answers(
    world: Path, towers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(name: str, **given: Any) -> list[dict[str, Any]]:
        given = {"eval_every": 1, **given}
        folder = train_tiny(world, towers, tmp_path / name, **LATENTS, steps=2, learning_rate=1e-9, **given)
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]

    plain, parts, taught = told("plain"), told("parts", reconstruct=2.0, micro_batch=2), told("taught", reconstruct=2.0)
    last = taught[-1]
    assert f"loss {last['train_loss']:.3f}, own loss {last['own_loss']:.3f}, " in capsys.readouterr().err
    assert "own_loss" not in plain[-1]
    assert taught[0]["own_loss"] is taught[0]["train_loss"] is None
    for ours, theirs, in_parts in zip(plain[1:], taught[1:], parts[1:], strict=True):
        assert theirs["own_loss"] > 0.01
        assert in_parts["own_loss"] == pytest.approx(theirs["own_loss"], rel=1e-3)
        assert theirs["train_loss"] == pytest.approx(ours["train_loss"], abs=1e-3)
        assert in_parts["train_loss"] == pytest.approx(ours["train_loss"], abs=1e-3)
    both = told("both", reconstruct=2.0, eval_every=2)[-1]
    for key in ("own_loss", "train_loss"):  # of several steps: their mean
        assert both[key] == pytest.approx(sum(point[key] for point in taught[1:]) / 2, abs=1e-3)


def test_a_frozen_value_encoder_stays_as_it_begins_and_all_else_trains(
    world: Path, towers: Path, tmp_path: Path
) -> None:
    first, longer, free = (
        load_file(train_tiny(world, towers, tmp_path / name, **LATENTS, **given) / "model.safetensors")
        for name, given in {
            "first": {"freeze_values": True, "steps": 1},
            "longer": {"freeze_values": True, "steps": 4},
            "free": {"steps": 4},
        }.items()
    )
    encoder = [name for name in first if name.startswith("value_encoder.")]
    assert all(torch.equal(first[name], longer[name]) for name in encoder)
    assert longer["value_encoder.gate"].abs().max() == 0
    assert free["value_encoder.gate"].abs().max() > 0
    for name in ("memory_connector.down.weight", "memory_connector.expand.weight", "connector.up.weight"):
        assert not torch.equal(first[name], longer[name])
    assert load_checkpoint(tmp_path / "longer").config.training.freeze_values


def test_latents_can_begin_in_random_directions_which_the_seed_decides(
    world: Path, towers: Path, tmp_path: Path
) -> None:
    one, same, other, plain = (
        load_file(
            train_tiny(world, towers, tmp_path / name, **{**LATENTS, "latent_dim": 16, "learning_rate": 1e-9, **given})
            / "model.safetensors"
        )
        for name, given in {
            "one": {"random_values": True, "seed": 1},
            "same": {"random_values": True, "seed": 1},
            "other": {"random_values": True, "seed": 2},
            "plain": {"seed": 1},
        }.items()
    )
    said = {}
    for name, found in {"one": one, "plain": plain}.items():
        compress, expand = found["value_encoder.compress"], found["memory_connector.expand.weight"]
        said[name] = (expand @ compress).trace() / len(compress)  # 1: what is compressed comes back as it was
        assert torch.linalg.norm(compress) == pytest.approx(len(compress) ** 0.5, rel=1e-3)
    assert said["plain"] == pytest.approx(1.0, abs=1e-3) and abs(said["one"]) < 0.5
    assert torch.equal(one["value_encoder.compress"], same["value_encoder.compress"])
    assert not torch.equal(one["value_encoder.compress"], other["value_encoder.compress"])


def test_a_run_goes_on_with_the_same_loss_and_the_same_parts_alone(
    world: Path, towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinyalign_edge.train.watcher import Watcher

    given: dict[str, Any] = {**LATENTS, "reconstruct": 0.5, "freeze_values": True}
    whole = load_file(train_tiny(world, towers, tmp_path / "whole", **given) / "model.safetensors")

    def interrupt(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Watcher, "on_step_end", interrupt)
        train_tiny(world, towers, tmp_path / "cut", **given)

    def go_on(**options: Any) -> None:
        train(
            data=world / "train.json", images=world, vision=str(towers / "vit"), lm=str(towers / "lm"),
            out=tmp_path / "cut", resume=True,
            options=TrainOptions(steps=4, batch_size=8, visual_tokens=4, eval_every=2, device="cpu", **options),
        )  # fmt: skip

    with pytest.raises(InputError, match=r"other settings \(training\.freeze_values, training\.reconstruct\)"):
        go_on(**LATENTS)
    go_on(**given)
    found = load_file(tmp_path / "cut" / "model.safetensors")
    assert all(torch.equal(whole[name], found[name]) for name in whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reconstruct": 0.5}, r"--reconstruct 0\.5: is for --memory latents, this is tokens"),
        ({"reconstruct": 0.5, "memory": "hybrid"}, r"--reconstruct 0\.5: .* this is hybrid"),
        ({"reconstruct": -1.0, "memory": "latents"}, r"--reconstruct -1\.0: must be from 0 to below 10"),
        ({"reconstruct": float("nan"), "memory": "latents"}, "--reconstruct nan: must be"),
        ({"random_values": True}, "random_values: is for new latents, this is tokens in stage align"),
        ({"freeze_values": True}, "--freeze-values: no value encoder trains with --memory tokens"),
        ({"freeze_values": True, "memory": "paper"}, "--freeze-values: .* --memory paper; use latents"),
        ({"freeze_values": True, "memory": "hybrid"}, "--freeze-values: .* --memory hybrid begin at zero .* latents"),
    ],
)
def test_what_has_no_latents_to_train_is_refused(
    options: dict[str, Any], message: str, world: Path, towers: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        train_tiny(world, towers, tmp_path / "c", **options)
    assert not (tmp_path / "c").exists()


def test_the_second_stage_looks_at_the_checkpoints_memory(
    checkpoints: dict[str, Path], world: Path, tmp_path: Path
) -> None:
    def tune(kind: str, **options: Any) -> Path:
        given: dict[str, Any] = {"stage": "instruct", "steps": 2, "batch_size": 8, "eval_every": 2, "device": "cpu"}
        train(
            data=world / "train.json", images=world, start=checkpoints[kind], out=tmp_path / kind,
            options=TrainOptions(**given, **options),
        )  # fmt: skip
        return tmp_path / kind / "model.safetensors"

    for options in ({"reconstruct": 0.5}, {"freeze_values": True}):
        with pytest.raises(InputError, match=rf"--{next(iter(options)).replace('_', '-')}.* tokens"):
            tune("tokens", **options)
    before = load_file(checkpoints["latents"] / "model.safetensors")
    after = load_file(tune("latents", reconstruct=0.5, freeze_values=True))
    kept = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith("value_encoder.")} <= kept
    assert "memory_connector.expand.weight" not in kept


def test_the_command_line_has_both(run: Any, tmp_path: Path) -> None:  # noqa: F811
    given = ("train", "--data", "d", "--images", tmp_path, "--vision", "v", "--lm", "l", "--out", tmp_path / "c")
    fails(run(*given, "--reconstruct", "0.5"), 2, "--reconstruct 0.5: is for --memory latents")
    fails(run(*given, "--freeze-values"), 2, "--freeze-values: no value encoder trains with --memory tokens")


def test_a_recipe_has_both(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    stage = "memory = 'latents'\nreconstruct = 0.5\nfreeze_values = true"
    recipe.write_text(
        f'description = "d"\n[towers]\nvision = "v"\nlm = "l"\n[align]\n{stage}\n[instruct]\nreconstruct = 0.1\n',
        "utf-8",
    )
    found = load_recipe(str(recipe))
    assert found.align.options == {"memory": "latents", "reconstruct": 0.5, "freeze_values": True}
    assert found.instruct.options == {"reconstruct": 0.1}
