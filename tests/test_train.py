"""Training: what is learnt, what is retrieved for whom, and that a run can be interrupted."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file  # noqa: E402

from tests.towers import train_tiny  # noqa: E402
from tinyalign_edge.bench.trained import loss_curve  # noqa: E402
from tinyalign_edge.data import Turn, read_rows  # noqa: E402
from tinyalign_edge.errors import BundleError, InputError, TinyAlignError  # noqa: E402
from tinyalign_edge.memory import Bank, Record, write_bank  # noqa: E402
from tinyalign_edge.train.answer import TorchAnswerer  # noqa: E402
from tinyalign_edge.train.batches import Example, Rows, without_memory  # noqa: E402
from tinyalign_edge.train.checkpoint import load_checkpoint  # noqa: E402
from tinyalign_edge.train.connector import pooling_matrix  # noqa: E402
from tinyalign_edge.train.keys import Keys  # noqa: E402
from tinyalign_edge.train.neighbours import retrieve  # noqa: E402
from tinyalign_edge.train.options import TrainOptions, check_options  # noqa: E402
from tinyalign_edge.train.run import train  # noqa: E402
from tinyalign_edge.train.settings import MemorySettings, TrainSettings  # noqa: E402
from tinyalign_edge.train.verdict import note_rise  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def metrics(checkpoint: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (checkpoint / "metrics.jsonl").read_text("utf-8").splitlines()]


def test_a_checkpoint_holds_config_weights_bank_and_metrics(checkpoints: dict[str, Path]) -> None:
    for kind, folder in checkpoints.items():
        names = {path.name for path in folder.iterdir()}
        bank = set() if kind == "none" else {"memory"}
        assert (
            names - {"tensorboard"}
            == {"config.json", "model.safetensors", "tokenizer.json", "metrics.jsonl", "samples", "curves.png"} | bank
        )
        assert [point["step"] for point in metrics(folder)] == [0, 2, 4, *([5] if kind == "tokens" else [])]


def test_tensorboard_shows_what_the_metrics_say(checkpoints: dict[str, Path]) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for folder in checkpoints.values():
        board = events.EventAccumulator(str(folder / "tensorboard")).Reload()
        for name in ("held_out_loss", "train_loss", "tokens_per_second"):
            shown = {event.step: event.value for event in board.Scalars(name)}
            known = {point["step"]: point[name] for point in metrics(folder) if point[name] is not None}
            assert {step: shown[step] for step in known} == pytest.approx(known, rel=1e-2)  # speeds are whole there
        assert {"learning_rate", "grad_norm"} <= set(board.Tags()["scalars"])


def test_training_lowers_the_held_out_loss(world: Path, towers: Path, tmp_path: Path, capsys: Any) -> None:
    points = metrics(train_tiny(world, towers, tmp_path / "c", steps=40, learning_rate=3e-3, eval_every=40))
    assert points[-1]["held_out_loss"] < points[0]["held_out_loss"] - 0.1
    assert "learnt by heart" not in capsys.readouterr().err


@pytest.mark.parametrize("memory", ["tokens", "latents"])
def test_processes_that_make_batches_ready_change_nothing(
    world: Path, towers: Path, tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_batch, pids = Rows.batch, tmp_path / "pids"

    def noted(self: Rows, positions: Sequence[int]) -> list[Example]:
        with pids.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return make_batch(self, positions)

    monkeypatch.setattr(Rows, "batch", noted)
    options: dict[str, Any] = {"memory": memory, "steps": 24, "cache_features": tmp_path / "features"}  # three epochs
    folders, makers = [], []
    for loaders in (0, 2):
        folders.append(train_tiny(world, towers, tmp_path / f"{loaders}", loaders=loaders, **options))
        makers.append(set(pids.read_text().split()))
        pids.unlink()
    assert makers[0] == {f"{os.getpid()}"}
    assert len(makers[1] - makers[0]) >= 2 * 3
    curves = [[(p["step"], p["held_out_loss"], p["train_loss"]) for p in metrics(folder)] for folder in folders]
    assert curves[0] == curves[1]
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.fixture
def in_loaders(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Has something happen before a batch's rows are made, in the processes that make batches ready alone."""
    make_batch = Rows.batch

    def patch(happen: Callable[[], None]) -> None:
        def made(self: Rows, positions: Sequence[int]) -> list[Example]:
            if torch.utils.data.get_worker_info():
                happen()
            return make_batch(self, positions)

        monkeypatch.setattr(Rows, "batch", made)

    return patch


def test_an_error_in_a_process_that_makes_batches_ready_is_one_line(
    world: Path, towers: Path, tmp_path: Path, in_loaders: Any
) -> None:
    def lost() -> None:
        raise InputError("rows.json: cannot be read (gone)")

    in_loaders(lost)
    with pytest.raises(InputError, match=r"^rows\.json: cannot be read \(gone\)$"):
        train_tiny(world, towers, tmp_path / "c", loaders=1)


def test_where_loaders_find_no_shared_memory_fewer_are_advised(
    world: Path, towers: Path, tmp_path: Path, in_loaders: Any
) -> None:
    in_loaders(lambda: os.kill(os.getpid(), signal.SIGBUS))
    told = r"^--loaders 2: one of these processes ended, .* shared memory, is short; --resume with fewer of them$"
    with pytest.raises(TinyAlignError, match=told):
        train_tiny(world, towers, tmp_path / "c", loaders=2)


def test_a_share_that_cannot_be_is_refused_by_the_name_that_it_is_given_by() -> None:
    for name, given in (("dropout", "--dropout"), ("warmup", "warmup"), ("weight_decay", "weight_decay")):
        with pytest.raises(InputError, match=rf"^{given} 1\.0: must be from 0 to below 1$"):
            check_options(TrainOptions(**{name: 1.0}))  # type: ignore[arg-type]


def test_loaders_that_cannot_be_had_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"--loaders -1: must be at least 0"):
        check_options(TrainOptions(loaders=-1))
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    check_options(TrainOptions())
    with pytest.raises(InputError, match=r"--loaders 2: needs an operating system whose processes fork"):
        check_options(TrainOptions(loaders=2))


def test_a_held_out_loss_that_was_lower_before_is_told(
    checkpoints: dict[str, Path], world: Path, tmp_path: Path, capsys: Any
) -> None:
    options = TrainOptions(stage="instruct", steps=4, batch_size=8, lm_learning_rate=0.3, device="cpu", eval_every=2)
    train(data=world / "train.json", images=world, start=checkpoints["none"], out=tmp_path / "c", options=options)
    points = metrics(tmp_path / "c")
    best, last = min(points, key=lambda point: point["held_out_loss"]), points[-1]
    assert last["held_out_loss"] > 1.1 * best["held_out_loss"]
    told = f"{best['held_out_loss']:.3f} after step {best['step']} and {last['held_out_loss']:.3f} after step 4"
    assert f"note: the held-out loss was {told}: a lower --lm-learning-rate may" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("held_out", "trained", "until", "stage", "whole", "told"),
    [
        ((2.0, 1.0, 1.0, 1.2), (None, 1.5, 1.0, 0.2), 6, "align", False,
         "was 1.000 after step 2 and 1.200 after step 6: the training data are being learnt by heart; more of them, "
         "fewer steps or --dropout may end lower"),
        ((2.0, 1.0, 1.0, 1.2), (None, 1.5, 1.0, 0.2), 6, "align", True, "fewer steps may end lower"),
        ((2.0, 1.0, 1.0, 1.2), (None, 1.5, 1.0, 0.2), 6, "instruct", False, "fewer steps may end lower"),
        ((1.0, 2.0, 2.1, 2.2), (None, 1.5, 1.6, 1.7), 6, "align", False, "a lower --learning-rate may end lower"),
        ((2.0, 1.0, 1.0, 1.2), (None, 1.5, 1.0, 0.2), 4, "align", False, None),  # then the copy term's own steps
        ((2.0, 1.0, 1.0, 1.09), (None, 1.5, 1.0, 0.2), 6, "align", False, None),
        ((1.0, 0.0, 0.0, 0.0004), (None, 1.5, 1.0, 0.2), 6, "align", False, None),
        ((1.0, 0.9, math.nan, math.inf), (None, 1.5, 1.0, 0.2), 6, "align", False, None),
        ((None, None, None, None), (None, 1.5, 1.0, 0.2), 6, "align", False, None),
    ],
)  # fmt: skip
def test_what_a_risen_held_out_loss_is_put_down_to(
    tmp_path: Path, capsys: Any, held_out: Any, trained: Any, until: int, stage: Any, whole: bool, told: str | None
) -> None:
    lines = [
        json.dumps({"step": 2 * i, "held_out_loss": held, "train_loss": train_loss})
        for i, (held, train_loss) in enumerate(zip(held_out, trained, strict=True))
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines), "utf-8")
    note_rise(tmp_path / "metrics.jsonl", TrainSettings((), "", steps=until, stage=stage), whole=whole)
    said = capsys.readouterr().err
    assert told in said if told else not said


def test_after_all_else_the_copy_term_trains_alone(world: Path, towers: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 8, "copy_words": True, "eval_every": 8}
    without = load_file(train_tiny(world, towers, tmp_path / "a", episodes=0.0, **options) / "model.safetensors")
    with_it = load_file(train_tiny(world, towers, tmp_path / "b", **options) / "model.safetensors")
    changed = {name for name in without if not torch.equal(without[name], with_it[name])}
    assert changed
    assert all(name.startswith("copy_head.") for name in changed)
    assert [point["step"] for point in metrics(tmp_path / "b")] == [0, 8, 10]


@pytest.mark.parametrize("memory", ["tokens", "latents"])
@pytest.mark.parametrize("first", [True, False])
def test_without_its_memory_a_batch_is_one_of_rows_that_have_no_neighbours(
    world: Path, towers: Path, tmp_path: Path, memory: str, first: bool
) -> None:

    folder = train_tiny(world, towers, tmp_path / "c", memory=memory, memory_first=first, learning_rate=1e-2)
    side = TorchAnswerer(load_checkpoint(folder))
    seen = side.prepare(read_rows(world / "test.json", world)[:6]).examples
    model, collate = side.checkpoint.model, side.collate
    assert any(example.neighbours for example in seen)
    with torch.inference_mode():
        with_it = model.answer_losses(**collate(seen))
        found = model.answer_losses(**without_memory(collate(seen)))
        alone = [replace(example, neighbours=(), similarity=()) for example in seen]
        expected = model.answer_losses(**collate(alone))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (with_it - expected).abs().max() > 1e-3


def test_where_no_answer_is_a_name_the_copy_term_gets_no_steps_of_its_own(
    world: Path, towers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = json.loads((world / "train.json").read_text("utf-8"))
    for number, row in enumerate(rows):
        row.pop("caption", None)
        row["conversations"] = [
            {"from": "human", "value": "<image>\nIs it?"},
            {"from": "gpt", "value": ["yes", "no"][number % 2]},
        ]
    data = tmp_path / "closed.json"
    data.write_text(json.dumps(rows), "utf-8")
    folder = train_tiny(world, towers, tmp_path / "c", data=data)
    assert "no answer is a name" in capsys.readouterr().err
    assert [point["step"] for point in metrics(folder)] == [0, 2, 4]
    training = load_checkpoint(folder).config.training
    assert (training.episodes, training.copying_steps) == (0.1, 0)


def test_the_memory_is_seen_from_a_share_of_the_steps_on(
    world: Path, towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinyalign_edge.train import loop

    alone = []
    monkeypatch.setattr(loop, "without_memory", lambda batch: (alone.append(1), without_memory(batch))[1])
    for share, steps in ((0.0, 0), (0.5, 4), (0.99, 7), (None, 2)):
        alone.clear()
        train_tiny(world, towers, tmp_path / str(share), memory_from=share, steps=8, eval_every=8)
        assert len(alone) == steps
    for given in ({"memory_from": 1}, {"memory_from": 0.5, "memory": "none"}):
        with pytest.raises(InputError, match=r"--memory-from"):
            train_tiny(world, towers, tmp_path / "wrong", **given)


@pytest.mark.parametrize("at", [(0, 5), (0, 6), (6, 1)], ids=["training", "its last step", "copying"])
def test_an_interrupted_run_resumes_to_the_same_weights(
    world: Path, towers: Path, tmp_path: Path, monkeypatch: Any, at: tuple[int, int]
) -> None:
    from tinyalign_edge.train import connector, run, watcher
    from tinyalign_edge.train.options import TrainOptions
    from tinyalign_edge.train.run import train

    whole = train_tiny(world, towers, tmp_path / "whole", steps=6)
    on_step_end = watcher.Watcher.on_step_end

    def interrupt(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        on_step_end(self, args, state, control, **rest)
        if (self.before, state.global_step) == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(watcher.Watcher, "on_step_end", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(world, towers, tmp_path / "cut", steps=6)
    monkeypatch.setattr(watcher.Watcher, "on_step_end", on_step_end)
    with pytest.raises(InputError, match="--resume"):
        train_tiny(world, towers, tmp_path / "cut", steps=6)
    begun = tmp_path / "cut" / "state" / "run.json"
    older = json.loads(begun.read_text("utf-8"))
    del older["training"]["random_values"]  # of before there was this setting
    begun.write_text(json.dumps({**older, "of_later_code": 1}), "utf-8")
    with pytest.raises(BundleError, match=r"run\.json.*'of_later_code'.* train anew with another --out$"):
        train_tiny(world, towers, tmp_path / "cut", steps=6, resume=True)
    begun.write_text(json.dumps(older), "utf-8")
    given: dict[str, Any] = {"data": world / "train.json", "images": world, "out": tmp_path / "cut", "resume": True}
    given |= {"vision": str(towers / "vit"), "lm": str(towers / "lm")}
    options = {"batch_size": 8, "visual_tokens": 4, "eval_every": 2, "device": "cpu"}
    with monkeypatch.context() as patch:
        patch.setattr(run, "see", lambda *_, **__: pytest.fail("other settings are refused before the long work"))
        others: dict[str, Any] = {**options, "batch_size": 4, "learning_rate": 1e-4, "k": 3, "seed": 1}
        wrong = r"memory\.k, training\.batch_size, .*training\.learning_rate, .*training\.seed"
        with pytest.raises(InputError, match=f"other settings.*{wrong}"):
            train(options=TrainOptions(steps=6, **others), **given)
    with pytest.raises(InputError, match=r"other settings \(training\.steps\)"):
        train(options=TrainOptions(steps=7, **options), **given)  # type: ignore[arg-type]
    monkeypatch.setattr(connector, "principal_axes", lambda *_: pytest.fail("the keys must stay what they were"))
    train(options=TrainOptions(steps=6, **options), **given)  # type: ignore[arg-type]
    expected, found = load_file(whole / "model.safetensors"), load_file(tmp_path / "cut" / "model.safetensors")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert loss_curve(tmp_path / "cut") == loss_curve(whole)
    assert not (tmp_path / "cut" / "state").exists()


def test_with_a_fraction_the_bank_holds_only_that_share(world: Path, towers: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(train_tiny(world, towers, tmp_path / "c", steps=1, fraction=0.4))
    assert checkpoint.bank is not None
    assert len(checkpoint.bank) == round(72 * 0.4)


def test_the_bank_keeps_captions_and_their_sources(checkpoints: dict[str, Path], world: Path) -> None:
    captions = {row["id"]: row["caption"] for row in json.loads((world / "train.json").read_text("utf-8"))}
    bank = Bank(checkpoints["tokens"] / "memory")
    entries = [bank.entry(number) for number in bank.ids]
    assert all(captions[entry.source] == entry.text for entry in entries)


def test_without_captions_the_language_model_reads_questions_and_answers(
    world: Path, towers: Path, tmp_path: Path
) -> None:
    rows = json.loads((world / "train.json").read_text("utf-8"))
    for row in rows:
        del row["caption"]
    (tmp_path / "asked.json").write_text(json.dumps(rows), "utf-8")
    checkpoint = load_checkpoint(train_tiny(world, towers, tmp_path / "c", data=tmp_path / "asked.json", steps=1))
    assert checkpoint.bank is not None
    for entry in map(checkpoint.bank.entry, checkpoint.bank.ids):
        assert entry.question
        assert entry.text in checkpoint.prompt.text(entry.value.tolist())


def test_of_a_long_first_turn_the_question_is_cut_and_later_turns_are_whole(checkpoints: dict[str, Path]) -> None:
    prompt = load_checkpoint(checkpoints["none"]).prompt
    size = {text: len(prompt.memory_ids([Turn("", text)], 99)) for text in ("What colour?", "red", "How many?", "two")}
    turns = [Turn("What colour?", "red"), Turn("How many?", "two")]

    def read(limit: int) -> str:
        ids = prompt.memory_ids(turns, limit)
        assert len(ids) <= limit
        return prompt.text(ids)

    assert read(sum(size.values())) == "What colour? red How many? two"
    assert read(sum(size.values()) - 1) == "What colour? red"
    assert read(size["red"]) == "red"
    assert read(size["red"] + 1).endswith("red")


def test_no_example_retrieves_itself_or_its_near_duplicate() -> None:
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(60, 16)).astype(np.float32)
    keys[1] = keys[0] + 1e-4  # a near-duplicate picture
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    pictures = [(i // 2 if i > 50 else i,) for i in range(60)]
    found = retrieve(pictures, Keys(keys, keys, np.arange(60), keys[:3]), MemorySettings(k=4, floor=-1))
    for i, near in enumerate(found.training.rows):
        assert i not in near
        assert all(pictures[j] != pictures[i] for j in near if j >= 0)
    assert 1 not in found.training.rows[0]
    assert 0 not in found.training.rows[1]
    assert found.held_out.rows[2, 0] == 2  # held-out pictures may find anything


def test_no_row_of_several_pictures_retrieves_one_that_shares_any_of_them() -> None:
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(6, 8)).astype(np.float32)
    keys[1:3] = keys[0] + 0.3 * keys[1:3]  # alike, and no duplicates
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    pictures = [(0, 7), (1,), (2, 8, 7), (7,), (1, 2), (5,)]
    found = retrieve(pictures, Keys(keys, keys, np.arange(6), keys[:0]), MemorySettings(k=5, floor=-1))
    near = [{int(j) for j in row if j >= 0} for row in found.training.rows]
    allowed = [{j for j in range(6) if not set(pictures[i]) & set(pictures[j])} for i in range(6)]
    lost = [allowed[i] - near[i] for i in range(6)]  # below the floor, which one in a hundred does not reach
    assert all(near[i] <= allowed[i] for i in range(6))
    assert sum(map(len, lost)) <= 20
    assert 1 in near[0]


def test_with_a_fused_key_near_duplicates_are_known_by_their_pictures() -> None:
    rng = np.random.default_rng(0)
    entries, queries, pictures = (rng.normal(size=(count, 16)).astype(np.float32) for count in (30, 60, 30))
    pictures[1] = pictures[0] + 1e-4
    for vectors in (entries, queries, pictures):
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    own = np.repeat(np.arange(30), 2)
    found = retrieve(
        [(i,) for i in range(30)], Keys(entries, queries, own, queries[:3], pictures), MemorySettings(k=28, floor=-1)
    )
    assert found.training.rows.shape == (60, 28)
    for question, near in enumerate(found.training.rows):
        assert own[question] not in near
    assert not {0, 1} & {*found.training.rows[:4].ravel().tolist()}


def test_the_papers_memory_is_trained_saved_and_read_side_by_side(world: Path, towers: Path, tmp_path: Path) -> None:
    folder = train_tiny(world, towers, tmp_path / "c", steps=20, memory="paper", learning_rate=3e-3, eval_every=20)
    checkpoint = load_checkpoint(folder)
    bank, points = checkpoint.bank, metrics(folder)
    assert bank is not None
    spec = bank.manifest.spec
    assert (spec.kind, spec.key_dim, spec.latents, spec.latent_dim) == ("latents", 32, 32, 96)
    assert points[-1]["held_out_loss"] < points[0]["held_out_loss"]
    side = TorchAnswerer(checkpoint)
    rows = read_rows(world / "train.json", world)[:8]
    examples = side.prepare(rows).examples
    batch = side.collate(examples)
    assert batch["memory_mask"].sum(dim=1).tolist() == [32 if example.neighbours else 0 for example in examples]
    for example, row in zip(examples, rows, strict=True):  # the saved encoder makes again what training wrote
        made, kept = (
            side.latents(example, str(row.caption)),
            [e for e in map(bank.entry, bank.ids) if e.source == row.id],
        )
        if kept:
            np.testing.assert_allclose(made, kept[0].value, atol=np.abs(kept[0].value).max() / 127)


def test_latents_of_another_value_encoder_are_told_apart(
    checkpoints: dict[str, Path], world: Path, towers: Path, tmp_path: Path
) -> None:
    shorter = train_tiny(world, towers, tmp_path / "c", steps=1, memory="latents")
    banks = [Bank(folder / "memory") for folder in (checkpoints["latents"], checkpoints["tokens"], shorter)]
    fingerprints = [bank.manifest.spec.fingerprint for bank in banks]
    assert len({*fingerprints}) == 3
    assert [load_checkpoint(shorter).config.memory.fingerprint] == fingerprints[2:]
    with pytest.raises(InputError, match="merge banks of one encoder"):
        banks[0].merge(banks[2])


def test_a_fused_key_depends_on_the_question(world: Path, towers: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    side = TorchAnswerer(load_checkpoint(train_tiny(world, towers, tmp_path / "c", steps=1, key="fused")))
    row = read_rows(world / "test.json", world)[0]
    asked = side.prepare([replace(row, turns=(Turn(text, "red"),)) for text in ("What colour?", "How many?")])
    assert not np.allclose(asked.keys[0], asked.keys[1], atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(asked.keys, axis=1), 1, rtol=1e-5)


def test_an_entry_of_default_size_takes_at_most_a_kilobyte(tmp_path: Path) -> None:
    settings, released_bytes = MemorySettings(), 22_528
    keys = np.random.default_rng(0).normal(size=(50, settings.key_dim)).astype(np.float32)
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    values: dict[str, Any] = {
        "token_ids": [[1] * settings.value_tokens] * 50,
        "latents": np.ones((50, settings.latents, settings.latent_dim), np.float32),
    }
    for kind, value in values.items():
        write_bank(tmp_path / kind, keys, [Record("a")] * 50, fingerprint="f", vocab_size=9, **{kind: value})
        entry_bytes = Bank(tmp_path / kind).stats().entry_bytes
        assert entry_bytes <= 1024
        assert entry_bytes <= released_bytes / 20


def test_sizes_of_keys_and_values_are_options(world: Path, towers: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"steps": 1, "fraction": 0.2}
    small = load_checkpoint(train_tiny(world, towers, tmp_path / "t", key_dim=16, value_tokens=3, **given)).bank
    assert small is not None
    assert small.manifest.spec.key_dim == 16
    assert max(len(small.entry(number).value) for number in small.ids) == 3
    sizes: dict[str, Any] = {"memory": "latents", "latents": 5, "latent_dim": 16}
    latents = load_checkpoint(train_tiny(world, towers, tmp_path / "l", **sizes, **given)).bank
    assert latents is not None
    assert latents.entry(0).value.shape == (5, 16)
    for wrong, message in (
        ({"key": "fused", "key_dim": 16}, "--key-dim 16: a fused key has the width 32"),
        ({"memory": "latents", "latent_dim": 30}, "--latent-dim 30: must be a multiple of 8"),
        ({"memory": "none", "key": "fused"}, "--key fused: there is no key with --memory none"),
        ({"value_tokens": 0}, "--value-tokens 0: must be at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            train_tiny(world, towers, tmp_path / "wrong", **wrong)
    assert not (tmp_path / "wrong").exists()


def test_a_closed_gate_tells_nothing_of_what_was_retrieved() -> None:
    from tinyalign_edge.train.connector import MemoryConnector

    table = torch.randn(50, 16)
    plain, gated = (MemoryConnector(MemorySettings(gate=gate), table) for gate in (False, True))
    values, rank, similarity = table[:8], torch.arange(8) % 4, torch.linspace(0, 1, 8)
    assert torch.equal(plain(values, rank, similarity), values)
    torch.testing.assert_close(gated(values, rank, similarity), values, atol=0.1, rtol=0)  # it begins open
    with torch.no_grad():
        gated.gate.bias.fill_(-50)
    torch.testing.assert_close(gated(values, rank, similarity), table.mean(dim=0).expand(8, -1))


@pytest.mark.parametrize("memory", ["tokens", "latents", "hybrid"])
def test_a_gate_is_trained_saved_and_exported(world: Path, towers: Path, tmp_path: Path, memory: str) -> None:
    import tinyalign_edge as ta
    from tinyalign_edge.export.run import ExportOptions, export

    folder = train_tiny(world, towers, tmp_path / "c", memory=memory, gate=True, learning_rate=3e-2)
    weights = load_file(folder / "model.safetensors")
    assert weights["memory_connector.gate.weight"].abs().max() > 0
    manifest = export(folder, tmp_path / "b", ExportOptions(precision="fp32"))
    assert manifest.gate is not None
    assert manifest.gate.passed
    side = TorchAnswerer(load_checkpoint(folder))
    row = read_rows(world / "test.json", world)[0]
    (example,) = side.prepare([row]).examples
    inputs = side.collate([example])["memory"]
    model = side.checkpoint.model
    with ta.load(tmp_path / "b") as exported, torch.inference_mode():
        expected = model.memory_connector(model.values(inputs), inputs["rank"], inputs["similarity"]).numpy()
        found = exported.memory_tokens(side.memories(example))
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    with pytest.raises(InputError, match="--gate: there is none with --memory none"):
        train_tiny(world, towers, tmp_path / "d", memory="none", gate=True)


def test_each_turn_is_trained_as_if_it_were_asked_alone(checkpoints: dict[str, Path], world: Path) -> None:
    side = TorchAnswerer(load_checkpoint(checkpoints["tokens"]))
    rows = [row for row in read_rows(world / "train.json", world) if len(row.turns) > 2][:4]
    from dataclasses import replace

    single = [replace(row, turns=(turn,)) for row in rows for turn in row.turns]
    alone = side.losses(side.prepare(single).examples)
    together = []
    for row in rows:
        asked = side.prepare([replace(row, turns=(turn,)) for turn in row.turns]).examples
        together.append(replace(asked[0], turns=tuple(example.turns[0] for example in asked)))
    np.testing.assert_allclose(np.concatenate(side.losses(together)), np.concatenate(alone), rtol=1e-4, atol=1e-5)


def test_generation_follows_the_most_likely_tokens(checkpoints: dict[str, Path], world: Path) -> None:
    """Batched generation with padding on the left says what one example at a time says."""
    side = TorchAnswerer(load_checkpoint(checkpoints["tokens"]))
    examples: tuple[Example, ...] = side.prepare(read_rows(world / "test.json", world)[:6]).examples
    assert side.answers(examples) == [side.answers([example])[0] for example in examples]


def test_convolutional_encoders_train_too(world: Path, towers: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(train_tiny(world, towers, tmp_path / "c", vision="cnn", visual_tokens=1, steps=1))
    assert checkpoint.config.connector.visual_tokens == 1


def test_a_chosen_image_size_holds_in_training_and_export(world: Path, towers: Path, tmp_path: Path) -> None:
    from tinyalign_edge.export.encoder import encoder_graph

    checkpoint = load_checkpoint(train_tiny(world, towers, tmp_path / "c", steps=1, image_size=48))
    assert (checkpoint.config.image.height, checkpoint.config.image.width) == (48, 48)
    assert checkpoint.config.connector.grid_height == 6
    dims = encoder_graph(checkpoint).graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_value for dim in dims] == [1, 3, 48, 48]
    with pytest.raises(InputError, match=r"50 x 50 pixels do not divide into patches of 8"):
        train_tiny(world, towers, tmp_path / "wrong", image_size=50)
    assert not (tmp_path / "wrong").exists()


def test_pooling_averages_each_cell() -> None:
    grid = torch.arange(16.0).reshape(4, 4)
    assert (pooling_matrix(4, 4, 4) @ grid.flatten()).tolist() == [2.5, 4.5, 10.5, 12.5]
    assert torch.equal(pooling_matrix(4, 4, 16), torch.eye(16))


def test_a_tower_that_changed_since_training_is_refused(world: Path, towers: Path, tmp_path: Path) -> None:
    from tests.towers import save_lm, save_vit

    save_vit(tmp_path / "towers" / "vit")
    save_lm(tmp_path / "towers" / "lm")
    checkpoint = train_tiny(world, tmp_path / "towers", tmp_path / "c", steps=1)
    save_lm(tmp_path / "towers" / "lm", num_hidden_layers=3)
    with pytest.raises(BundleError, match="its weights changed since training"):
        load_checkpoint(checkpoint)


def test_a_checkpoint_of_the_first_schema_opens(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """As it was written before connectors, stages and several files had settings."""
    old = shutil.copytree(checkpoints["tokens"], tmp_path / "old")
    config = json.loads((old / "config.json").read_text("utf-8"))
    kept = ("images", "steps", "batch_size", "learning_rate", "warmup", "fraction", "seed", "device", "eval_every")
    training = {name: config["training"][name] for name in kept} | {"data": config["training"]["data"][0]["path"]}
    config |= {"schema_version": 1, "training": training}
    del config["connector"]["kind"], config["memory"]["key"]
    (old / "config.json").write_text(json.dumps(config), "utf-8")
    opened = load_checkpoint(old).config
    assert opened.training.data[0].path == training["data"]
    assert opened.connector == load_checkpoint(checkpoints["tokens"]).config.connector


def test_rows_without_any_picture_are_refused(world: Path, towers: Path, tmp_path: Path) -> None:
    rows = json.loads((world / "train.json").read_text("utf-8"))[:12]
    for row in rows:
        del row["image"]
        row["conversations"][0]["value"] = row["conversations"][0]["value"].replace("<image>\n", "")
    (tmp_path / "text.json").write_text(json.dumps(rows), "utf-8")
    with pytest.raises(InputError, match=r"text\.json: no row has a picture"):
        train_tiny(world, towers, tmp_path / "c", data=tmp_path / "text.json")
    assert not (tmp_path / "c").exists()


def test_sizes_that_the_pictures_have_no_room_for_are_refused(world: Path, towers: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"eval_every": 0}, "--eval-every 0: must be at least 1"),
        ({"key_grid": 5}, r"--key-grid 5: the encoder sees 4 x 4 patches"),
        ({"visual_tokens": 50}, r"--visual-tokens 50: from 4 x 4 patches --connector pooled gives 1 to 16"),
        ({"lora_rank": 2, "lora_alpha": -4, "stage": "instruct"}, "lora_alpha -4: must be at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            train_tiny(world, towers, tmp_path / "c", **options)  # type: ignore[arg-type]
        assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("out", ["file/sub", "/proc/nope", "n" * 300])
def test_a_folder_that_cannot_be_written_is_found_before_anything_is_read(
    out: str, world: Path, towers: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=rf"{out}: cannot be written \(.+\); choose another --out"):
        train_tiny(world, towers, tmp_path / out, data=tmp_path / "gone.json")
