"""The command line: what it prints, its exit codes, and errors of one line."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from tests.conftest import STORED_BUNDLE
from tinyalign_edge import cli
from tinyalign_edge.bundle import MANIFEST
from tinyalign_edge.files import file_sha256

PICTURE = STORED_BUNDLE.parent / "picture.png"
QUESTION = "What colour is the circle?"


class Outcome:
    """Exit code and output of one command."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> dict[str, object]:
        parsed: dict[str, object] = json.loads(self.out.splitlines()[-1])
        return parsed


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Run a command in this process, as `main` does."""

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["tinyalign-edge", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        code = ended.value.code
        return Outcome(code if isinstance(code, int) else 0, out, err)

    return call


def fails(outcome: Outcome, code: int, *parts: str) -> None:
    """The command ended with `code` and one line of error that holds `parts`."""
    line = outcome.err.strip().splitlines()[-1]
    assert outcome.code == code, outcome.err
    assert line.startswith("error: ")
    assert "Traceback" not in outcome.err
    for part in parts:
        assert part in line


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['tinyalign-edge', '--help']\n"
        "from tinyalign_edge import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'onnxruntime', 'usearch', 'PIL', 'tokenizers'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(
        command in done.stdout for command in ("demo", "train", "export", "ask", "eval", "verify", "inspect", "bench")
    )


def test_ask_prints_the_answer_and_as_json_all_about_it(run) -> None:  # type: ignore[no-untyped-def]
    plain, as_json = (
        run("ask", STORED_BUNDLE, PICTURE, QUESTION),
        run("ask", STORED_BUNDLE, PICTURE, QUESTION, "--json"),
    )
    assert plain.code == as_json.code == 0
    assert set(as_json.json) == {"text", "tokens", "finish_reason", "timings_ms", "memories"}
    assert as_json.json["text"] == plain.out.removesuffix("\n")
    memories = as_json.json["memories"]
    assert isinstance(memories, list)
    assert set(memories[0]) == {"text", "source", "similarity"}
    assert run("ask", STORED_BUNDLE, PICTURE, QUESTION, "--json", "--no-memory").json["memories"] == []


def test_verify_gives_the_digest_that_it_can_be_held_against(run) -> None:  # type: ignore[no-untyped-def]
    digest = file_sha256(STORED_BUNDLE / MANIFEST)
    assert run("verify", STORED_BUNDLE, "--json").json["manifest_sha256"] == digest
    assert run("verify", STORED_BUNDLE, "--expect-sha256", digest).code == 0
    fails(run("verify", STORED_BUNDLE, "--expect-sha256", "0" * 64), 2, "expected 0000", "fetch the bundle again")


def test_inspect_shows_components_and_files(run) -> None:  # type: ignore[no-untyped-def]
    shown = run("inspect", STORED_BUNDLE)
    assert all(part in shown.out for part in ("vision", "language model", "memory", "encoder.onnx", "lm.data"))
    assert run("inspect", STORED_BUNDLE, "--json").json["schema_version"] == 1


def test_bad_input_is_one_line_with_the_remedy(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "text.png").write_text("not a picture")
    fails(run("ask", tmp_path / "none", PICTURE, QUESTION), 2, "no such bundle folder", "tinyalign-edge export")
    fails(run("ask", tmp_path, PICTURE, QUESTION), 2, "not a bundle")
    fails(run("ask", STORED_BUNDLE, tmp_path / "gone.png", QUESTION), 2, "gone.png", "no such image file")
    fails(run("ask", STORED_BUNDLE, tmp_path / "text.png", QUESTION), 2, "text.png", "not a picture")
    fails(run("ask", STORED_BUNDLE, PICTURE, "  "), 2, "question: it is empty")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["ask"], "Missing argument"),
        (["ask", "--bogus"], "--bogus"),
        (["nope"], "nope"),
        (["demo", "--seed", "x"], "--seed"),
    ],
)
def test_a_wrong_command_line_is_one_line_too(run, arguments: list[str], part: str) -> None:  # type: ignore[no-untyped-def]
    outcome = run(*arguments)
    fails(outcome, 2, part, "--help")
    assert len(outcome.err.strip().splitlines()) == 1


def test_an_interrupt_is_one_line(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    from tinyalign_edge import bundle

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bundle, "open_bundle", interrupt)
    fails(run("inspect", STORED_BUNDLE), 130, "interrupted")


def test_a_changed_bundle_is_refused(run, bundle: Path) -> None:  # type: ignore[no-untyped-def]
    path = bundle / "decoder.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    fails(run("verify", bundle), 2, "decoder.onnx", "was changed")


def test_a_missing_extra_is_named_with_the_command_that_installs_it() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]\nfrom tinyalign_edge import cli; cli.main()"
    )
    arguments = ["tinyalign-edge", "train", "--data", "d", "--images", "i", "--vision", "v", "--lm", "l", "--out", "o"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        1,
        "error: this command needs torch: pip install 'tinyalign-edge[train]'\n",
    )


def test_training_errors_name_the_fault_and_leave_nothing(run, tmp_path: Path, world: Path, towers: Path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"

    def train(**changes: object) -> Outcome:
        given = {
            "data": world / "train.json",
            "images": world,
            "vision": towers / "vit",
            "lm": towers / "lm",
            "out": out,
        }
        options = [
            item for key, value in {**given, **changes}.items() for item in (f"--{key.replace('_', '-')}", value)
        ]
        outcome: Outcome = run("train", *options)
        assert not out.exists()
        return outcome

    bad_json, missing_image, truncated = (tmp_path / name for name in ("bad.json", "missing.json", "truncated.json"))
    bad_json.write_text("[1,\n2", "utf-8")
    rows = json.loads((world / "train.json").read_text("utf-8"))[:12]
    missing_image.write_text(json.dumps([*rows, {**rows[0], "id": "lost", "image": "images/lost.png"}]), "utf-8")
    (world / "images" / "cut.png").write_bytes((world / rows[0]["image"]).read_bytes()[:200])
    truncated.write_text(json.dumps([*rows, {**rows[0], "id": "cut", "image": "images/cut.png"}]), "utf-8")
    fails(train(data=bad_json), 2, "bad.json:2:2", "not valid JSON")
    fails(train(data=missing_image), 2, "row 13 (id lost)", "lost.png does not exist")
    fails(train(data=truncated), 2, "row 13 (id cut)", "cut.png", "truncated or damaged")
    fails(train(vision=tmp_path / "nowhere"), 2, "nowhere", "no such folder")
    fails(train(memory="text"), 2, "--memory text: not one of tokens, latents, hybrid, paper, none")
    fails(train(fraction=0), 2, "--fraction 0.0", "must be above 0")


def test_what_train_is_given_arrives_in_the_command_that_is_run(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("torch")
    from tinyalign_edge.train import command

    wanted: list[command.TrainCommand] = []

    def run_command(given: command.TrainCommand) -> None:
        wanted.append(given)  # another process wrote the checkpoint

    monkeypatch.setattr(command, "run_command", run_command)
    paths: dict[str, Any] = {
        "data": ("a.json", "b.json:0.5"), "images": Path("i"), "vision": "v", "lm": "l", "vlm": Path("whole"),
        "chat_template": Path("t.jinja"), "start": Path("first"), "out": Path("o"),
    }  # fmt: skip
    options = {
        "--memory": ("memory", "hybrid"), "--fraction": ("fraction", 0.5), "--epochs": ("epochs", 2),
        "--steps": ("steps", 7), "--batch-size": ("batch_size", 6), "--micro-batch": ("micro_batch", 3),
        "--learning-rate": ("learning_rate", 0.25), "--lm-learning-rate": ("lm_learning_rate", 0.125),
        "--lora": ("lora_rank", 16), "--dropout": ("dropout", 0.375), "--connector": ("connector", "mlp"),
        "--visual-tokens": ("visual_tokens", 9), "-k": ("k", 5), "--image-size": ("image_size", 64),
        "--key": ("key", "fused"), "--key-grid": ("key_grid", 2), "--key-dim": ("key_dim", 33),
        "--value-tokens": ("value_tokens", 11), "--latents": ("latents", 12), "--latent-dim": ("latent_dim", 40),
        "--episodes": ("episodes", 0.0625), "--memory-dropout": ("memory_dropout", 0.75),
        "--memory-from": ("memory_from", 0.625), "--reconstruct": ("reconstruct", 1.5), "--device": ("device", "cpu"),
        "--seed": ("seed", 3), "--eval-every": ("eval_every", 13), "--cache-features": ("cache_features", Path("c")),
        "--loaders": ("loaders", 2),
    }  # fmt: skip
    flags = {
        "--bf16": ("bf16", True), "--gate": ("gate", True), "--no-copy": ("copy_words", False),
        "--freeze-values": ("freeze_values", True), "--skip-bad": ("skip_bad", True),
    }  # fmt: skip
    done = run(
        "train", "--data", "a.json", "--data", "b.json:0.5", "--images", "i", "--vision", "v", "--lm", "l",
        "--vlm", "whole", "--chat-template", "t.jinja", "--from", "first", "--out", "o", "--recipe", "r",
        "--stage", "instruct", "--resume", *flags,
        *(item for option, (_, value) in options.items() for item in (option, value)),
    )  # fmt: skip
    assert (done.code, done.out) == (0, "")
    given = dict([*options.values(), *flags.values()])
    assert wanted == [command.TrainCommand("instruct", given, resume=True, recipe="r", **paths)]
    renamed = {"lora": "lora_rank", "neighbours": "k"}
    asked = {renamed.get(name, name) for name in inspect.signature(cli.train).parameters}
    assert asked == {*given, *paths, "recipe", "stage", "resume"}  # and there is no option beside these


def test_what_train_is_not_given_is_left_to_the_recipe(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("torch")
    from tinyalign_edge.train import command
    from tinyalign_edge.train.settings import MemorySettings

    wanted: list[command.TrainCommand] = []

    def run_command(given: command.TrainCommand) -> Any:
        wanted.append(given)
        return SimpleNamespace(memory=MemorySettings(key="fused" if given.out.name == "p" else "picture"))

    monkeypatch.setattr(command, "run_command", run_command)
    assert "its memory is for comparison only and cannot be exported" in run("train", "--out", "p").out
    wanted.clear()
    done = run("train", "--out", "o", "--no-bf16", "--no-gate", "--copy", "--no-freeze-values", "--neighbours", 2)
    assert "checkpoint: o" in done.out and "tinyalign-edge export o" in done.out
    (one,) = wanted
    assert one.options == {
        "bf16": False, "gate": False, "copy_words": True, "freeze_values": False, "k": 2, "skip_bad": False,
        "device": "auto",
    }  # fmt: skip
    nothing = {"data": (), "stage": "align", "resume": False, "out": Path("o"), "options": one.options}
    assert {field.name: getattr(one, field.name) for field in fields(one)} == {
        **dict.fromkeys(["images", "vision", "lm", "vlm", "chat_template", "start", "recipe"]), **nothing,
    }  # fmt: skip
    for option, value in (("--key", "text"), ("--stage", "align2"), ("--connector", "qformer"), ("--device", "tpu")):
        fails(run("train", "--out", "o", option, value), 2, f"{option} {value}: not one of")
    assert len(wanted) == 1


def test_eval_with_emi_prints_what_picture_and_memory_tell(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    rows = []
    for name, answer in (("red.png", "red"), ("blue.png", "blue"), ("green.png", "green")):
        Image.new("RGB", (32, 32), answer).save(tmp_path / name)
        said = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": answer}]
        rows.append({"id": name, "image": name, "conversations": said})
    (tmp_path / "data.json").write_text(json.dumps(rows), "utf-8")
    given = ("eval", STORED_BUNDLE, "--data", tmp_path / "data.json", "--images", tmp_path, "--emi")
    told = run(*given, "--json").json
    assert set(told) == {
        "n", "tokens", "image", "memory", "shuffled_memory",
        "nll_other_image", "nll_image", "nll_memory", "nll_shuffled_memory",
    }  # fmt: skip
    assert told["n"] == 3
    assert told["memory"] == pytest.approx(told["nll_image"] - told["nll_memory"])
    assert told["shuffled_memory"] == pytest.approx(told["nll_image"] - told["nll_shuffled_memory"])
    assert told["image"] == pytest.approx(told["nll_other_image"] - told["nll_image"])
    assert run(*given, "--json", "--limit", 2).json["n"] == 2
    shown = run(*given).out
    assert f"{told['memory']:+.4f} nats a token" in shown and f"{told['tokens']} of 3 questions" in shown
    for other in ("--no-memory", "--shuffle-memory"):
        fails(run(*given, other), 2, "--emi compares with and without memory itself")


@pytest.mark.filterwarnings("ignore")
def test_a_hub_id_without_a_network_is_one_line(run, tmp_path: Path, world: Path, towers: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub._is_offline_mode", True)
    given = ["--data", world / "train.json", "--images", world, "--lm", towers / "lm", "--out", tmp_path / "out"]
    fails(run("train", *given, "--vision", "some-org/some-encoder"), 2, "some-org/some-encoder", "the network")


@pytest.mark.filterwarnings("ignore")
def test_a_language_model_that_cannot_be_exported_is_refused_and_nothing_is_written(
    run,
    tmp_path: Path,
    world: Path,
    towers: Path,  # type: ignore[no-untyped-def]
) -> None:
    from tests.towers import save_lm, train_tiny

    (tmp_path / "towers").mkdir()
    (tmp_path / "towers" / "vit").symlink_to(towers / "vit")
    save_lm(tmp_path / "towers" / "lm", "cohere", steps=0)
    checkpoint = train_tiny(world, tmp_path / "towers", tmp_path / "checkpoint", steps=1)
    fails(run("export", checkpoint, "--out", tmp_path / "bundle"), 2, "'cohere': its trace holds for one size only")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_whole_model_exports_and_answers(run, tmp_path: Path, world: Path) -> None:  # type: ignore[no-untyped-def]
    from tests.vlms import save_vlm

    save_vlm(tmp_path / "vlm", "idefics3")
    samples = ("--calibration", world / "test.json", "--images", world)
    exported = run("export", tmp_path / "vlm", "--out", tmp_path / "bundle", *samples)
    assert exported.code == 0, exported.err
    assert "compared with torch" in exported.out
    asked = run("ask", tmp_path / "bundle", PICTURE, QUESTION, "--json")
    assert asked.json["memories"] == []
    assert asked.json["text"]
    assert run("verify", tmp_path / "bundle", "--json").json["probe_key_cosine"] is None
    assert "cosine of the logits" in run("verify", tmp_path / "bundle").out
    assert "none" in run("inspect", tmp_path / "bundle").out
    fails(run("export", tmp_path, "--out", tmp_path / "b"), 2, "not a checkpoint")


def test_memory_is_taught_searched_and_made_to_forget(run, bundle: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    before = run("memory", "stats", bundle, "--json").json
    added = run("memory", "add", bundle, PICTURE, "a large red cat.", "--json").json
    assert (added["id"], added["text"], added["source"]) == (before["entries"], "a large red cat.", str(PICTURE))
    found = run("memory", "search", bundle, PICTURE, "-k", 2, "--json").json["memories"]
    assert [len(found), found[0]["id"], found[0]["similarity"] > 0.99] == [2, added["id"], True]
    assert "a large red cat." in run("memory", "search", bundle, PICTURE).out
    assert run("ask", bundle, PICTURE, QUESTION, "--json").json["memories"][0]["text"] == "a large red cat."
    assert run("memory", "forget", bundle, "--text", "a large red cat.", "--json").json == {"forgotten": [added["id"]]}
    assert b"red cat" not in b"".join(path.read_bytes() for path in (bundle / "memory").iterdir())
    assert run("memory", "stats", bundle, "--json").json["entries"] == before["entries"]
    assert "entries" in run("memory", "stats", bundle).out


def test_memory_of_its_own_folder(run, bundle: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    own = ("--memory-dir", tmp_path / "own")
    assert "remembered as entry" in run("memory", "add", bundle, PICTURE, "a cat", "--source", "album", *own).out
    assert run("ask", bundle, PICTURE, QUESTION, "--json", *own).json["memories"][0]["source"] == "album"
    assert run("ask", bundle, PICTURE, QUESTION, "--json").json["memories"][0]["source"] != "album"
    assert "forgotten: 1" in run("memory", "forget", bundle, "--source", "album", *own).out


def test_memory_commands_say_what_is_wrong(run, bundle: Path) -> None:  # type: ignore[no-untyped-def]
    fails(run("memory", "forget", bundle, "--text", "no such text"), 2, "--text no such text", "memory search")
    fails(run("memory", "forget", bundle), 2, "give one of --id, --source and --text")
    fails(run("memory", "forget", bundle, "--id", 1, "--text", "x"), 2, "give one of")
    fails(run("memory", "add", bundle, PICTURE, " "), 2, "text: it is empty")
    fails(run("memory", "add", bundle, bundle / "none.png", "x"), 2, "none.png")


def test_the_graph_of_a_large_memory_is_built_anew(run, bundle: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    from tinyalign_edge.memory import rebuild

    assert "faster without a graph" in run("memory", "rebuild", bundle).out
    monkeypatch.setattr(rebuild, "SWITCH_OVER", 10)
    entries = run("memory", "stats", bundle, "--verify", "--json").json["entries"]
    assert run("memory", "rebuild", bundle, "--json").json == {"graph_entries": entries, "entries": entries}
    assert f"over {entries} entries" in run("memory", "stats", bundle).out
    run("memory", "forget", bundle, "--id", 0)
    assert run("memory", "stats", bundle, "--json").json["graph_entries"] == 0


def test_memory_is_built_from_data(run, bundle: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    asked = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a cat"}]
    rows = [{"id": f"row {i}", "image": PICTURE.name, "conversations": asked} for i in range(30)]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, [*rows, rows[0]])), "utf-8")
    given = ("memory", "build", bundle, "--data", data, "--images", PICTURE.parent)
    part = run(*given, "--out", tmp_path / "own", "--shard", "1/2", "--shard-rows", 20)
    assert "shards: 1 of 2 are done" in part.out
    built = run(*given, "--memory-dir", tmp_path / "own", "--shard", "2/2", "--shard-rows", 20, "--json").json
    assert (built["complete"], built["entries"], built["duplicates"]) == (True, 30, 1)
    own = run("memory", "search", bundle, PICTURE, "--memory-dir", tmp_path / "own", "--json").json["memories"]
    assert [memory["text"] for memory in own] == ["a cat"] * 4
    assert run(*given, "--out", tmp_path / "own", "--thumbnails").code == 0
    shown = run(
        "memory", "search", bundle, PICTURE, "--memory-dir", tmp_path / "own", "--sheet", tmp_path / "sheet.png"
    )
    assert shown.code == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (4 * 160, 172)
        assert len(sheet.getcolors(1 << 20) or ()) > 50  # the pictures are on it
    missing = run("memory", "search", bundle, PICTURE, "--sheet", tmp_path / "no" / "sheet.png")
    fails(missing, 2, "sheet.png: cannot be written")
    fitted = run(*given, "--budget-mb", 0.02, "--held-out", data)
    assert "nats a token" in fitted.out
    assert run("memory", "stats", bundle, "--json").json["entries"] == 1  # near-duplicates of one answer
    fails(run(*given, "--held-out", data), 2, "--held-out: give --budget-mb too")
    for wrong in ("nan", "inf", "-1"):
        fails(run(*given, f"--budget-mb={wrong}"), 2, f"--budget-mb {wrong}: must be above 0")
    fails(run(*given, "--shard", "2"), 2, "--shard 2: must be I/N")
