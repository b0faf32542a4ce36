"""The second stage, steps divided into passes, bf16, a killed run, several processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file  # noqa: E402

from tests.towers import train_tiny  # noqa: E402
from tinyalign_edge.bench.trained import loss_curve  # noqa: E402
from tinyalign_edge.data import read_rows  # noqa: E402
from tinyalign_edge.errors import InputError, MissingExtraError, TinyAlignError  # noqa: E402
from tinyalign_edge.train.answer import TorchAnswerer  # noqa: E402
from tinyalign_edge.train.checkpoint import load_checkpoint  # noqa: E402
from tinyalign_edge.train.loop import last_whole, load_trained  # noqa: E402
from tinyalign_edge.train.options import TrainOptions  # noqa: E402
from tinyalign_edge.train.processes import ANOTHER_STOPPED, Processes  # noqa: E402
from tinyalign_edge.train.run import _less_before, train  # noqa: E402
from tinyalign_edge.train.start import start_align  # noqa: E402
from tinyalign_edge.train.state import RunState  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def metrics(checkpoint: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (checkpoint / "metrics.jsonl").read_text("utf-8").splitlines()]


def instruct(world: Path, start: Path, out: Path, *, resume: bool = False, **options: Any) -> Path:
    chosen = {"steps": 6, "batch_size": 8, "eval_every": 2, "device": "cpu", "lm_learning_rate": 1e-3, **options}
    train(
        data=world / "train.json", images=world, start=start, out=out, resume=resume,
        options=TrainOptions(stage="instruct", **chosen),
    )  # fmt: skip
    return out


def losses(checkpoint: Path, world: Path) -> Any:
    side = TorchAnswerer(load_checkpoint(checkpoint))
    return np.concatenate(side.losses(side.prepare(read_rows(world / "test.json", world)[:8]).examples))


@pytest.mark.parametrize("rank", [0, 4])
def test_the_second_stage_trains_the_language_model_and_its_export_is_proved(
    rank: int, world: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    from tinyalign_edge.export.run import export

    if rank:
        pytest.importorskip("peft")
    first = checkpoints["tokens"]
    tuned = instruct(world, first, tmp_path / "tuned", lora_rank=rank)
    points = metrics(tuned)
    assert points[-1]["held_out_loss"] < points[0]["held_out_loss"]
    assert points[0]["held_out_loss"] == pytest.approx(metrics(first)[-1]["held_out_loss"], abs=1e-3)
    before, after = load_checkpoint(first), load_checkpoint(tuned)
    assert after.config.language.sha256 != before.config.language.sha256
    assert after.config.vision == before.config.vision
    assert after.config.memory.fingerprint == before.config.memory.fingerprint
    assert after.language.model.state_dict().keys() == before.language.model.state_dict().keys()  # nothing of peft
    manifest = export(tuned, tmp_path / "bundle")
    assert manifest.gate is not None
    assert manifest.gate.passed
    again = instruct(world, tuned, tmp_path / "again", steps=1)  # and on from there
    assert load_checkpoint(again).config.training.started_from == str(tuned)


@pytest.mark.skipif(find_spec("peft") is not None, reason="peft is installed")
def test_adapters_need_the_package_that_makes_them(world: Path, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(MissingExtraError, match=r"tinyalign-edge\[lora\]"):
        instruct(world, checkpoints["none"], tmp_path / "c", lora_rank=4)
    assert not (tmp_path / "c").exists()


def test_a_tuned_language_model_that_changed_is_refused(
    world: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    tuned = instruct(world, checkpoints["none"], tmp_path / "tuned", steps=1)
    other = instruct(world, checkpoints["none"], tmp_path / "other", steps=2)
    (other / "language" / "model.safetensors").replace(tuned / "language" / "model.safetensors")
    with pytest.raises(TinyAlignError, match="its weights changed since training"):
        load_checkpoint(tuned)


def test_each_stage_says_what_it_begins_with(
    world: Path, towers: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    given: dict[str, Any] = {"data": world / "train.json", "images": world, "out": tmp_path / "c"}
    with pytest.raises(InputError, match="--from"):
        train(options=TrainOptions(stage="instruct"), **given)
    with pytest.raises(InputError, match="leave them out"):
        train(options=TrainOptions(stage="instruct"), vision="v", lm="l", start=checkpoints["none"], **given)
    with pytest.raises(InputError, match="--vision and --lm"):
        train(options=TrainOptions(), **given)
    with pytest.raises(InputError, match="--lora 4"):
        train(options=TrainOptions(lora_rank=4), **given)
    with pytest.raises(InputError, match=r"vit: not a checkpoint \(its config\.json is of something else\)"):
        train(options=TrainOptions(stage="instruct"), start=towers / "vit", **given)
    with pytest.raises(InputError, match=r"vit: a model of kind siglip_vision_model is none; give a causal one"):
        train(options=TrainOptions(), vision=str(towers / "vit"), lm=str(towers / "vit"), **given)
    assert not (tmp_path / "c").exists()


Gradients = dict[int, dict[str, torch.Tensor]]  # by the step that they make, then by the weight's name


@pytest.fixture
def gradients(monkeypatch: Any) -> Gradients:
    """Those of the runs that follow, a later run's instead of an earlier one's.

    Passes are compared by their gradients: Adam turns the rounding of a gradient near zero into a whole step.
    """
    from tinyalign_edge.train.watcher import Watcher

    seen: Gradients = {}

    def look(self: Any, args: Any, state: Any, control: Any, *, model: Any = None, **rest: Any) -> None:
        given = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        if not self.before:  # the copy term alone, afterwards
            seen[state.global_step + 1] = given

    monkeypatch.setattr(Watcher, "on_pre_optimizer_step", look)
    return seen


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Equal but for rounding; passes that are weighed wrongly change whole tensors by a third."""
    assert one.keys() == other.keys()
    assert sum(grad.norm() for grad in other.values()) > 0.1
    for name, grad in other.items():
        assert (one[name] - grad).norm() <= 1e-3 * grad.norm() + 1e-6, name


@pytest.mark.parametrize(("memory", "reconstruct"), [("tokens", 0.0), ("hybrid", 0.0), ("latents", 2.0)])
def test_a_step_in_several_passes_is_the_same_step(
    world: Path, towers: Path, tmp_path: Path, gradients: Gradients, memory: str, reconstruct: float
) -> None:
    """Answers differ in length, so passes weigh by their tokens; with a loss of the latents alone, too."""
    given: dict[str, Any] = {"memory": memory, "memory_from": 0.0, "reconstruct": reconstruct}
    whole = train_tiny(world, towers, tmp_path / "whole", **given)
    in_one = dict(gradients)
    gradients.clear()
    parts = train_tiny(world, towers, tmp_path / "parts", micro_batch=2, **given)
    assert_same(gradients[1], in_one[1])
    losses = [[point["held_out_loss"] for point in metrics(run)] for run in (parts, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    with pytest.raises(InputError, match="--batch-size 8: must be a multiple"):
        train_tiny(world, towers, tmp_path / "odd", micro_batch=3)


def test_a_run_may_go_on_with_smaller_passes(
    world: Path, towers: Path, tmp_path: Path, monkeypatch: Any, gradients: Gradients
) -> None:
    from tinyalign_edge.train.watcher import Watcher

    def interrupt(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt

    train_tiny(world, towers, tmp_path / "whole")
    in_one = dict(gradients)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Watcher, "on_step_end", interrupt)
        train_tiny(world, towers, tmp_path / "cut")
    gradients.clear()
    train(
        data=world / "train.json", images=world, vision=str(towers / "vit"), lm=str(towers / "lm"),
        out=tmp_path / "cut", resume=True,
        options=TrainOptions(steps=4, batch_size=8, visual_tokens=4, eval_every=2, device="cpu", micro_batch=2),
    )  # fmt: skip
    assert min(gradients) in (3, 4)  # states are written where the loss is evaluated
    assert_same(gradients[4], in_one[4])


@pytest.mark.parametrize("memory", ["paper", "none"])
def test_episodes_need_a_checkpoint_that_copies(world: Path, towers: Path, tmp_path: Path, memory: str) -> None:
    first = train_tiny(world, towers, tmp_path / "c", memory=memory, steps=1, eval_every=1)
    with pytest.raises(InputError, match=r"--episodes 0\.5: nothing is copied here"):
        instruct(world, first, tmp_path / "tuned", episodes=0.5)
    assert not (tmp_path / "tuned" / "config.json").exists()


def test_bf16_rounds_weights_and_no_rotary_frequencies(towers: Path) -> None:
    options = TrainOptions(bf16=True, visual_tokens=4)
    rounded, exact = (
        start_align(str(towers / "vit"), str(towers / "lm"), replace(options, bf16=bf16)).language.model
        for bf16 in (True, False)
    )
    assert {weight.dtype for weight in rounded.parameters()} == {torch.bfloat16}
    assert rounded.get_output_embeddings().weight is rounded.get_input_embeddings().weight
    found, wanted = (dict(model.named_buffers()) for model in (rounded, exact))
    frequencies = [name for name in wanted if "inv_freq" in name]
    assert frequencies
    for name in frequencies:
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], wanted[name])


@pytest.mark.parametrize("memory", ["latents", "tokens", "hybrid"])
def test_bf16_trains_both_stages(world: Path, towers: Path, tmp_path: Path, memory: str) -> None:
    first = train_tiny(world, towers, tmp_path / "c", memory=memory, bf16=True)
    exact = train_tiny(world, towers, tmp_path / "d", memory=memory)
    rounded, wanted = ([point["held_out_loss"] for point in metrics(run)] for run in (first, exact))
    assert rounded[-1] == pytest.approx(wanted[-1], rel=0.02)
    assert rounded != wanted
    tuned = instruct(world, first, tmp_path / "tuned", bf16=True)
    assert metrics(tuned)[-1]["held_out_loss"] < metrics(tuned)[0]["held_out_loss"]
    assert np.isfinite(losses(tuned, world)).all()


def test_a_run_after_one_in_bf16_is_in_float32(world: Path, towers: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """transformers keeps a run's precision for those that follow in the same process."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    before = train_tiny(world, towers, tmp_path / "before")
    rounded = train_tiny(world, towers, tmp_path / "rounded", bf16=True)
    after = train_tiny(world, towers, tmp_path / "after")
    curves = [[point["held_out_loss"] for point in metrics(run)] for run in (before, rounded, after)]
    assert curves[2] == curves[0]
    assert curves[1] != curves[0]


def test_a_killed_run_resumes_to_the_same_curve_and_weights(world: Path, towers: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "tinyalign_edge", "train", "--data", str(world / "train.json"), "--images", str(world),
        "--vision", str(towers / "vit"), "--lm", str(towers / "lm"), "--steps", "30", "--batch-size", "8",
        "--visual-tokens", "4", "--eval-every", "5", "--device", "cpu",
    ]  # fmt: skip
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    cut = tmp_path / "cut"
    process = subprocess.Popen([*command, "--out", str(cut)], **quiet)
    saved = cut / "state" / "checkpoint-10" / "whole"
    while process.poll() is None and not saved.exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    newest = max((cut / "state").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    half = cut / "state" / "checkpoint-399"  # as if the kill had come while this was being written
    half.mkdir()
    (half / "trained.safetensors").write_bytes((newest / "trained.safetensors").read_bytes()[:100])
    options = {"steps": 30, "batch_size": 8, "visual_tokens": 4, "eval_every": 5, "device": "cpu"}
    for out, resume in ((cut, True), (tmp_path / "whole", False)):
        train(
            data=world / "train.json", images=world, vision=str(towers / "vit"), lm=str(towers / "lm"), out=out,
            options=TrainOptions(**options), resume=resume,  # type: ignore[arg-type]
        )  # fmt: skip
    assert loss_curve(cut) == loss_curve(tmp_path / "whole")
    expected, found = load_file(tmp_path / "whole" / "model.safetensors"), load_file(cut / "model.safetensors")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("rank", [0, 4])
def test_an_instruct_run_that_was_cut_while_it_learnt_to_copy_goes_on(
    world: Path, checkpoints: dict[str, Path], tmp_path: Path, rank: int, monkeypatch: Any
) -> None:
    if rank:
        pytest.importorskip("peft")
    from tinyalign_edge.train.watcher import Watcher

    on_step_end = Watcher.on_step_end

    def interrupt(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        on_step_end(self, args, state, control, **rest)
        if self.before and state.global_step == 1:
            raise KeyboardInterrupt

    whole = instruct(world, checkpoints["tokens"], tmp_path / "whole", lora_rank=rank, steps=8)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Watcher, "on_step_end", interrupt)
        instruct(world, checkpoints["tokens"], tmp_path / "cut", lora_rank=rank, steps=8)
    cut = instruct(world, checkpoints["tokens"], tmp_path / "cut", lora_rank=rank, steps=8, resume=True)
    assert loss_curve(cut) == loss_curve(whole)
    for file in ("model.safetensors", "language/model.safetensors"):
        expected, found = load_file(whole / file), load_file(cut / file)
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_last_step_notes_its_own_training_loss(world: Path, towers: Path, tmp_path: Path) -> None:
    options = {"memory": "none", "eval_every": 10, "batch_size": 8}
    long = metrics(train_tiny(world, towers, tmp_path / "long", steps=13, **options))
    assert [point["step"] for point in long] == [0, 10, 13]
    assert long[2]["train_loss"] != long[1]["train_loss"]


COMMAND_LINE = ("--module", "tinyalign_edge")


def in_two_processes(*command: str, program: Sequence[str] = COMMAND_LINE) -> subprocess.CompletedProcess[str]:
    """Run `tinyalign-edge` twice on the processor: with `--cpu`, accelerate starts one process alone."""
    launch = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", str(20000 + os.getpid() % 20000),
        *program,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(
        [*launch, *command], capture_output=True, text=True, env=environment, timeout=120, check=False
    )


def training_command(world: Path, towers: Path, out: Path) -> list[str]:
    return [
        "train", "--images", str(world), "--vision", str(towers / "vit"),
        "--lm", str(towers / "lm"), "--out", str(out), "--steps", "4", "--visual-tokens", "4", "--eval-every", "2",
        "--device", "cpu",
    ]  # fmt: skip


@pytest.mark.parametrize(("memory", "reconstruct"), [("latents", 2.0), ("tokens", 0.0)])
def test_two_processes_train_what_one_does(
    world: Path, towers: Path, tmp_path: Path, memory: str, reconstruct: float
) -> None:
    rows = json.loads((world / "train.json").read_text("utf-8"))
    damaged = [f"damaged-{memory}-{number}.png" for number in range(2)]  # each process meets one of them
    for name in damaged:
        (world / name).write_text(name, "utf-8")
    data = tmp_path / "damaged.json"
    data.write_text(json.dumps([*rows, 7, *({**rows[0], "image": name} for name in damaged)]), "utf-8")
    options: dict[str, Any] = {"memory": memory, "reconstruct": reconstruct, "steps": 12, "eval_every": 6}  # two epochs
    one = train_tiny(world, towers, tmp_path / "one", data=data, skip_bad=True, **options)
    ran = in_two_processes(
        *training_command(world, towers, tmp_path / "two"), "--data", str(data), "--skip-bad", "--batch-size", "8",
        "--memory", memory, "--reconstruct", str(reconstruct), "--cache-features", str(tmp_path / "features"),
        "--steps", "12", "--eval-every", "6",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    for told in (
        "note: caching the features of 82 pictures",
        "Reading pictures: 82 of 82",
        "Encoding pictures: 41 of 41",
        "Reading texts: ",
        "damaged.json row 81: ",
        *(f"{name}: not a picture" for name in damaged),
    ):
        assert ran.stderr.count(told) == 1, ran.stderr  # the first process alone says so
    assert [point["step"] for point in metrics(tmp_path / "two")] == [0, 6, 12, *([15] if memory == "tokens" else [])]
    for ours, theirs in zip(metrics(one), metrics(tmp_path / "two"), strict=True):
        assert theirs["held_out_loss"] == pytest.approx(ours["held_out_loss"], rel=1e-3)
        told = [name for name in ("train_loss", "own_loss") if ours.get(name) is not None]
        assert [theirs[name] for name in told] == pytest.approx([ours[name] for name in told], rel=1e-2)
    np.testing.assert_allclose(losses(tmp_path / "two", world), losses(one, world), rtol=0.02, atol=0.02)
    assert not (tmp_path / "two" / "state").exists()


def test_two_processes_train_adapters_as_one_does(world: Path, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    first, data = checkpoints["tokens"], world / "train.json"
    adapters: dict[str, Any] = {"lora_rank": 4, "lm_learning_rate": 1e-3, "steps": 4}
    one = instruct(world, first, tmp_path / "one", **adapters)
    ran = in_two_processes(
        "train", "--stage", "instruct", "--from", str(first), "--data", str(data), "--images", str(world),
        "--out", str(tmp_path / "two"), "--lora", "4", "--lm-learning-rate", "1e-3", "--steps", "4",
        "--batch-size", "8", "--eval-every", "2", "--device", "cpu",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    for ours, theirs in zip(metrics(one), metrics(tmp_path / "two"), strict=True):
        assert theirs["held_out_loss"] == pytest.approx(ours["held_out_loss"], rel=1e-3)
    begun, tuned = load_checkpoint(first), load_checkpoint(tmp_path / "two")
    assert tuned.config.language.sha256 != begun.config.language.sha256
    assert tuned.language.model.state_dict().keys() == begun.language.model.state_dict().keys()  # merged


LITTLE_ROOM = """
import os

from tinyalign_edge.cli import main
from tinyalign_edge.train.feature_cache import FeatureCache

FeatureCache.room = lambda self: 20_000 if os.environ["RANK"] == "0" else 1 << 40
main()
"""


def test_two_processes_encode_anew_where_the_first_finds_no_room(world: Path, towers: Path, tmp_path: Path) -> None:
    program = tmp_path / "little_room.py"
    program.write_text(LITTLE_ROOM, "utf-8")
    one = train_tiny(world, towers, tmp_path / "one", memory="latents")
    ran = in_two_processes(
        *training_command(world, towers, tmp_path / "two"), "--data", str(world / "train.json"), "--batch-size", "8",
        "--memory", "latents", program=(str(program),),
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("each step encodes its pictures anew") == 1
    for ours, theirs in zip(metrics(one), metrics(tmp_path / "two"), strict=True):
        assert theirs["held_out_loss"] == pytest.approx(ours["held_out_loss"], rel=1e-3)


ANOTHER_RUN = """
import os

from tinyalign_edge.cli import main
from tinyalign_edge.train.feature_cache import FeatureCache, Known

seen, known = [], FeatureCache.known


def looked(self, record):
    seen.append(1)
    return Known([], {}) if os.environ["RANK"] == "0" and len(seen) == 1 else known(self, record)


FeatureCache.known = looked
main()
"""


def test_two_processes_divide_what_the_first_finds_missing_while_another_run_fills_the_cache(
    world: Path, towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinyalign_edge.train import feature_cache

    cache = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(feature_cache, "SHARD_BYTES", 1)
        one = train_tiny(world, towers, tmp_path / "one", memory="none", cache_features=cache)
    shards = sorted(cache.rglob("*.features"))
    for shard in shards[1:]:
        shard.unlink()
    program = tmp_path / "another_run.py"
    program.write_text(ANOTHER_RUN, "utf-8")
    ran = in_two_processes(
        *training_command(world, towers, tmp_path / "two"), "--data", str(world / "train.json"), "--batch-size", "8",
        "--memory", "none", "--cache-features", str(cache), program=(str(program),),
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "skipped" not in ran.stderr
    for ours, theirs in zip(metrics(one), metrics(tmp_path / "two"), strict=True):
        assert theirs["held_out_loss"] == pytest.approx(ours["held_out_loss"], rel=1e-3)


def test_two_processes_say_once_that_the_cache_cannot_be_written(world: Path, towers: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ran = in_two_processes(
        *training_command(world, towers, tmp_path / "two"), "--data", str(world / "train.json"), "--batch-size", "8",
        "--cache-features", str(tmp_path / "file" / "cache"),
    )  # fmt: skip
    assert ran.returncode != 0
    assert ran.stderr.count("cannot be written (Not a directory); choose another folder (--cache-features DIR)") == 1


def test_two_processes_divide_a_step_among_them(world: Path, towers: Path, tmp_path: Path) -> None:
    data = ("--data", str(world / "train.json"))
    ran = in_two_processes(*training_command(world, towers, tmp_path / "two"), *data, "--batch-size", "9")
    assert ran.returncode != 0
    assert "--batch-size 9: must be a multiple of 2 process(es)" in ran.stderr


POISONED_IN_ONE = f"""
import os
import sys

import pytest

sys.path.append({str(Path(__file__).parents[1])!r})
from tests.test_stages import poison
from tinyalign_edge.cli import main

if os.environ["RANK"] == "1":
    poison(pytest.MonkeyPatch(), at=2, of=4)
main()
"""


def test_a_loss_that_is_not_finite_in_one_of_two_processes_stops_both_in_a_line_each(
    world: Path, towers: Path, tmp_path: Path
) -> None:
    program = tmp_path / "poisoned.py"
    program.write_text(POISONED_IN_ONE, "utf-8")
    out = tmp_path / "two"
    ran = in_two_processes(
        *training_command(world, towers, out), "--data", str(world / "train.json"), "--batch-size", "8",
        "--memory", "none", program=(str(program),),
    )  # fmt: skip
    assert ran.returncode != 0
    assert ran.stderr.count("error: the loss is nan at step 3; the last good state is kept") == 1, ran.stderr
    assert ran.stderr.count(f"error: {ANOTHER_STOPPED}\n") <= 1  # the launcher may end that process first
    assert "RuntimeError" not in ran.stderr
    assert last_whole(out / "state") == out / "state" / "checkpoint-2"


KILLED = """
import os
import signal

from tinyalign_edge.cli import main
from tinyalign_edge.train.watcher import Watcher

on_step_end = Watcher.on_step_end


def killed(self, args, state, control, **rest):
    on_step_end(self, args, state, control, **rest)
    if state.global_step == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)


Watcher.on_step_end = killed
main()
"""


def test_two_processes_of_which_one_was_killed_resume_to_the_same_curve_and_weights(
    world: Path, towers: Path, tmp_path: Path
) -> None:
    program = tmp_path / "killed.py"
    program.write_text(KILLED, "utf-8")
    data = ("--data", str(world / "train.json"), "--batch-size", "8")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert in_two_processes(*training_command(world, towers, whole), *data).returncode == 0
    ran = in_two_processes(*training_command(world, towers, cut), *data, program=(str(program),))
    assert ran.returncode != 0
    assert last_whole(cut / "state") is not None
    ran = in_two_processes(*training_command(world, towers, cut), *data, "--resume")
    assert ran.returncode == 0, ran.stderr
    assert loss_curve(cut) == loss_curve(whole)
    expected, found = load_file(whole / "model.safetensors"), load_file(cut / "model.safetensors")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_out_of_memory_ends_with_advice(world: Path, towers: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from tinyalign_edge.train.model import AlignModel

    answer_losses = AlignModel.answer_losses

    def hungry(self: Any, **batch: Any) -> Any:
        if len(batch["labels"]) > 4:
            torch.empty(1 << 50)
        return answer_losses(self, **batch)

    monkeypatch.setattr(AlignModel, "answer_losses", hungry)
    with pytest.raises(TinyAlignError, match="out of memory with 8 rows at once; --resume --micro-batch 4"):
        train_tiny(world, towers, tmp_path / "c")
    train(
        data=world / "train.json", images=world, vision=str(towers / "vit"), lm=str(towers / "lm"),
        out=tmp_path / "c", resume=True,
        options=TrainOptions(steps=4, batch_size=8, visual_tokens=4, eval_every=2, device="cpu", micro_batch=4),
    )  # fmt: skip
    assert [point["step"] for point in metrics(tmp_path / "c")] == [0, 2, 4, 5]


@pytest.mark.parametrize(
    ("batch_size", "micro_batch", "advice"),
    [
        (9, 9, "--resume --micro-batch 3 "),
        (50, 25, "--resume --micro-batch 10 "),
        (8, 1, r"in a new run use fewer --neighbours, --value-tokens, --visual-tokens or --bf16$"),
    ],
)
def test_fewer_rows_at_once_are_advised_where_a_step_has_them(
    world: Path, towers: Path, tmp_path: Path, monkeypatch: Any, batch_size: int, micro_batch: int, advice: str
) -> None:
    monkeypatch.setattr("tinyalign_edge.train.model.AlignModel.hidden", out_of_memory)
    with pytest.raises(TinyAlignError, match=f"out of memory with {micro_batch} rows at once; {advice}"):
        train_tiny(world, towers, tmp_path / "c", batch_size=batch_size, micro_batch=micro_batch)


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({}, r"--resume --micro-batch 4 gives the same results in less \(in a new run: --lora RANK or --bf16\)"),
        ({"bf16": True, "micro_batch": 1}, "in a new run use --lora RANK$"),
        ({"lora_rank": 4}, r"--resume --micro-batch 4 goes on in less \(in a new run: --bf16\)"),
        ({"lora_rank": 4, "bf16": True, "micro_batch": 1}, "in a new run use a smaller language model$"),
    ],
)
def test_the_second_stage_is_advised_what_it_takes(
    world: Path, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: Any, options: dict[str, Any], advice: str
) -> None:
    if "lora_rank" in options:
        pytest.importorskip("peft")
    with monkeypatch.context() as patch:
        patch.setattr("tinyalign_edge.train.model.AlignModel.hidden", out_of_memory)
        with pytest.raises(TinyAlignError, match=rf"out of memory with \d rows at once; {advice}"):
            instruct(world, checkpoints["tokens"], tmp_path / "c", **options)
    poison(monkeypatch, at=0, of=6)
    with pytest.raises(TinyAlignError, match="with a lower --learning-rate or --lm-learning-rate and another --out"):
        instruct(world, checkpoints["tokens"], tmp_path / "d", **options)


def out_of_memory(*_: Any, **__: Any) -> Any:
    return torch.empty(1 << 50)


@pytest.mark.parametrize(
    ("part", "cached", "advice"),
    [
        ("start.load_language", False, "while the models are loaded; use smaller ones or a machine with more memory$"),
        ("encode.patch_features", False, r"while pictures are encoded; use fewer pixels \(--image-size\)$"),
        (
            "prepare.retrieve",
            False,
            r"before the steps; keep features on disk \(--cache-features DIR\) or train on fewer rows \(--fraction\)$",
        ),
        ("prepare.retrieve", True, r"before the steps; train on fewer rows \(--fraction\)$"),
    ],
)
def test_out_of_memory_before_the_steps_ends_with_advice_that_fits(
    world: Path, towers: Path, tmp_path: Path, monkeypatch: Any, part: str, cached: bool, advice: str
) -> None:
    monkeypatch.setattr(f"tinyalign_edge.train.{part}", out_of_memory)
    with pytest.raises(TinyAlignError, match=f"^out of memory {advice}"):
        train_tiny(world, towers, tmp_path / "c", cache_features=tmp_path / "features" if cached else None)


def test_advice_when_memory_runs_out_before_the_steps_is_of_ways_that_are_left(tmp_path: Path) -> None:
    def advice(processes: int, cached: bool, resumed: bool) -> str:
        state = RunState(tmp_path / f"{resumed}", resume=resumed)
        options = TrainOptions(cache_features=tmp_path if cached else None)
        among = Processes("cpu")
        among.count = processes
        return _less_before(options, state, among)

    begun = tmp_path / "True" / "state" / "run.json"
    begun.parent.mkdir(parents=True)
    begun.write_text("{}", "utf-8")
    fewer, on_disk = "train on fewer rows (--fraction)", "keep features on disk (--cache-features DIR)"
    assert advice(1, False, False) == f"{on_disk} or {fewer}"
    assert advice(2, False, False) == advice(1, True, False) == fewer  # several processes have them there
    assert advice(1, False, True) == on_disk
    assert advice(1, True, True) == advice(2, False, True) == "use a machine with more memory"


def test_out_of_memory_after_the_steps_costs_none_of_them(
    world: Path, towers: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    given: dict[str, Any] = {"memory": "latents", "steps": 1}
    with monkeypatch.context() as patch:
        patch.setattr("tinyalign_edge.train.finish.encode_values", out_of_memory)
        with pytest.raises(
            TinyAlignError, match=r"^out of memory after the last step; --resume alone makes the checkpoint"
        ):
            train_tiny(world, towers, tmp_path / "c", **given)
    monkeypatch.setattr("tinyalign_edge.train.model.AlignModel.forward", out_of_memory)  # no step is made again
    assert load_checkpoint(train_tiny(world, towers, tmp_path / "c", resume=True, **given)).config.training.steps == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_what_is_trained_on_cuda_in_bf16_is_read_on_the_processor(world: Path, towers: Path, tmp_path: Path) -> None:
    folder = train_tiny(
        world,
        towers,
        tmp_path / "c",
        memory="tokens",
        device="cuda",
        bf16=True,
        steps=20,
        learning_rate=3e-3,
        eval_every=20,
    )
    points = metrics(folder)
    assert points[1]["held_out_loss"] < points[0]["held_out_loss"]
    assert load_checkpoint(folder).config.training.device == "cuda"
    assert np.isfinite(losses(folder, world)).all()


def poison(monkeypatch: Any, *, at: int, of: int) -> None:
    """Make the loss of step `at` NaN, counted from 0, in the loop that has `of` steps."""
    from tinyalign_edge.train.loop import AlignTrainer

    compute_loss = AlignTrainer.compute_loss

    def poisoned(self: Any, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        if self.state.global_step == at and self.args.max_steps == of:
            inputs = {**inputs, "features": torch.full_like(inputs["features"], float("nan"))}
        return compute_loss(self, model, inputs, *args, **options)

    monkeypatch.setattr(AlignTrainer, "compute_loss", poisoned)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_state(
    world: Path, towers: Path, tmp_path: Path, monkeypatch: Any
) -> None:

    advice = "a lower --learning-rate and another --out, or remove this one"
    with monkeypatch.context() as patch:
        poison(patch, at=3, of=6)
        message = rf"the loss is nan at step 4; the last good state is kept, .*{advice}"
        with pytest.raises(TinyAlignError, match=message):
            train_tiny(world, towers, tmp_path / "c", steps=6, memory="none")
    kept = last_whole(tmp_path / "c" / "state")
    assert kept == tmp_path / "c" / "state" / "checkpoint-2"
    assert [point["step"] for point in metrics(tmp_path / "c")] == [0, 2]
    options = TrainOptions(steps=6, batch_size=8, visual_tokens=4, eval_every=2, device="cpu", memory="none")
    model = start_align(str(towers / "vit"), str(towers / "lm"), options).model
    before = {name: weight.clone() for name, weight in model.trained_state().items()}
    load_trained(model, kept)
    after = model.trained_state()
    assert all(weight.isfinite().all() for weight in after.values())
    assert any(not torch.equal(after[name], before[name]) for name in before)
    whole = train_tiny(world, towers, tmp_path / "whole", steps=6, memory="none")
    train(
        data=world / "train.json", images=world, vision=str(towers / "vit"), lm=str(towers / "lm"),
        out=tmp_path / "c", options=options, resume=True,
    )  # fmt: skip
    expected, found = load_file(whole / "model.safetensors"), load_file(tmp_path / "c" / "model.safetensors")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert loss_curve(tmp_path / "c") == loss_curve(whole)
    shutil.rmtree(tmp_path / "c")
    train_tiny(world, towers, tmp_path / "c", steps=1, memory="none", learning_rate=1e-4)  # as the message says


def test_where_no_state_is_kept_yet_none_is_promised(
    world: Path, towers: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    poison(monkeypatch, at=0, of=6)
    with pytest.raises(
        TinyAlignError, match=r"the loss is nan at step 1; no state is kept yet: train anew with a lower"
    ):
        train_tiny(world, towers, tmp_path / "c", steps=6)


def test_steps_of_the_copy_term_alone_are_counted_on(
    world: Path, towers: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    poison(monkeypatch, at=0, of=2)
    with pytest.raises(TinyAlignError, match=r"the loss is nan at step 9; the last good state is kept"):
        train_tiny(world, towers, tmp_path / "c", steps=8)


def test_metrics_are_json_whatever_the_loss(world: Path, towers: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from tinyalign_edge.train import watcher

    monkeypatch.setattr(watcher, "held_out_loss", lambda *_: float("nan"))
    made = train_tiny(world, towers, tmp_path / "c", memory="none")
    text = (made / "metrics.jsonl").read_text("utf-8")
    assert "NaN" not in text
    assert all(json.loads(line)["held_out_loss"] is None for line in text.splitlines())


def test_what_stops_one_process_is_said_once_and_leaves_nothing(world: Path, towers: Path, tmp_path: Path) -> None:
    (world / "not-a-picture.png").write_text("no", "utf-8")
    rows = json.loads((world / "train.json").read_text("utf-8"))
    data = tmp_path / "bad.json"
    data.write_text(json.dumps([{**rows[0], "image": "not-a-picture.png"}, *rows]), "utf-8")
    ran = in_two_processes(*training_command(world, towers, tmp_path / "two"), "--data", str(data))
    assert ran.returncode != 0
    told = {line.partition("error: ")[2] for line in ran.stderr.splitlines() if line.startswith("error: ")}
    told.remove("another process of this run has stopped; what it said is the reason")
    (reason,) = told
    assert "not-a-picture.png: not a picture" in reason
    assert not (tmp_path / "two").exists()
