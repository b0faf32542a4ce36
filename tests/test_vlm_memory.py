"""A memory for a whole vision-language model: the model stays what it was, and reads what it is taught."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from PIL import Image  # noqa: E402

import tinyalign_edge as ta  # noqa: E402
from tests.vlms import load_processor, load_vlm, processor_inputs  # noqa: E402
from tinyalign_edge.errors import InputError, UnsupportedError  # noqa: E402
from tinyalign_edge.export.run import ExportOptions, export  # noqa: E402
from tinyalign_edge.train import verdict  # noqa: E402
from tinyalign_edge.train.checkpoint import load_checkpoint  # noqa: E402
from tinyalign_edge.train.options import TrainOptions  # noqa: E402
from tinyalign_edge.train.run import train  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

QUESTION = "What colour is the circle?"
MEMORIES = {"llava-gemma2": "latents", "llava-siglip": "hybrid", "smolvlm": "tokens"}


def remember(world: Path, vlm: Path, out: Path, **options: Any) -> Path:
    given = {name: options.pop(name) for name in ("data", "chat_template") if name in options}
    chosen = {"steps": 4, "batch_size": 8, "eval_every": 2, "device": "cpu", **options}
    train(**{"data": world / "train.json", **given}, images=world, vlm=vlm, out=out, options=TrainOptions(**chosen))
    return out


def weights(model: Any) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kind", MEMORIES)
def test_a_whole_model_is_given_a_memory_that_can_be_taught_and_forgotten(
    kind: str, vlms: Path, world: Path, tmp_path: Path
) -> None:
    folder = remember(world, vlms / kind, tmp_path / "c", memory=MEMORIES[kind], steps=16, eval_every=16)
    points = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert points[-1]["held_out_loss"] < points[0]["held_out_loss"]
    manifest = export(folder, tmp_path / "b", ExportOptions(precision="fp32"))
    assert manifest.gate is not None
    assert manifest.gate.passed
    assert manifest.licences.keys() == {"model"}
    processor, own = load_processor(vlms / kind, kind), load_vlm(vlms / kind, kind)
    picture = Image.open(sorted((world / "images").glob("test-*.png"))[0]).convert("RGB")
    inputs = processor_inputs(processor, kind, picture, QUESTION)
    out = own.generate(**inputs, max_new_tokens=16, do_sample=False)
    said = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    with torch.inference_mode():
        first = own(**inputs).logits[0, -1].numpy()
    with ta.load(tmp_path / "b", memory=False) as model:
        assert model.ask(picture, QUESTION, max_new_tokens=16).text.strip() == said.strip()
        alone, _ = model.answer_logits(model.encode(picture), QUESTION, "red")
        np.testing.assert_allclose(alone[0], first, atol=1e-4 * np.abs(first).max())
    with ta.load(tmp_path / "b") as model:
        assert model.memory is not None
        assert 1 <= len(model.encode(picture).memories) <= 4
        reminded, _ = model.answer_logits(model.encode(picture), QUESTION, "red")
        assert np.abs(reminded[0] - first).max() > 1e-2 * np.abs(first).max()
        entry = model.memory.add(picture, "a large red cat.", source="album")
        assert model.encode(picture).memories[0].id == entry.id
        assert model.ask(picture, QUESTION).text
        assert model.memory.forget(source="album") == (entry.id,)
        again, _ = model.answer_logits(model.encode(picture), QUESTION, "red")
        np.testing.assert_array_equal(again, reminded)


@pytest.mark.parametrize("kind", ["llava-siglip", "smolvlm"])
def test_a_whole_model_with_a_memory_is_exported_to_int8_and_taught(
    kind: str, vlms: Path, world: Path, tmp_path: Path
) -> None:
    folder = remember(world, vlms / kind, tmp_path / "c", memory=MEMORIES[kind])
    export(folder, tmp_path / "b", ExportOptions())  # which is refused unless it is proved
    picture = sorted((world / "images").glob("test-*.png"))[0]
    with ta.load(tmp_path / "b") as model:
        assert model.memory is not None
        before, _ = model.answer_logits(model.encode(picture), QUESTION, "red")
        entry = model.memory.add(picture, "a large red cat.")
        assert model.encode(picture).memories[0].id == entry.id
        after, _ = model.answer_logits(model.encode(picture), QUESTION, "red")
        assert np.abs(after - before).max() > 0


def held_out(checkpoint: Path) -> list[float]:
    lines = (checkpoint / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["held_out_loss"] for line in lines]


def test_the_memory_of_a_whole_model_begins_nearly_closed_and_costs_it_less(
    vlms: Path, world: Path, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"steps": 1, "episodes": 0.0}
    gated = remember(world, vlms / "llava-siglip", tmp_path / "gated", **given)
    assert load_checkpoint(gated).config.memory.gate
    plain = remember(world, vlms / "llava-siglip", tmp_path / "plain", gate=False, **given)
    assert not load_checkpoint(plain).config.memory.gate
    assert held_out(gated)[0] < held_out(plain)[0]


def test_a_memory_that_makes_a_whole_model_worse_is_told(
    vlms: Path, world: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict, "RISEN", -1.0)  # so that the loss counts as risen, too
    monkeypatch.setattr(verdict, "LEAST", -1.0)
    remember(world, vlms / "llava-siglip", tmp_path / "c", gate=False, steps=1, episodes=0.0, learning_rate=1e-9)
    said = capsys.readouterr().err
    assert re.search(r"warning: the held-out loss is \d\.\d+ with the memory and \d\.\d+ without", said)
    assert "note: the held-out loss" not in said  # one advice, not two that contradict each other


def test_a_memory_that_helps_or_changes_nothing_is_not_told(
    vlms: Path, world: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"memory": "latents", "steps": 20, "memory_from": 0.0, "learning_rate": 3e-3}
    remember(world, vlms / "llava-gemma2", tmp_path / "c", **given)
    assert "makes the model worse" not in capsys.readouterr().err
    losses = iter([1.0, 1.0009])
    monkeypatch.setattr(verdict, "held_out_loss", lambda *_: next(losses))
    remember(world, vlms / "llava-siglip", tmp_path / "d", steps=1, episodes=0.0)
    assert "makes the model worse" not in capsys.readouterr().err
    assert not list(losses)


def test_nothing_of_the_model_itself_is_trained(vlms: Path, world: Path, tmp_path: Path) -> None:
    """Also where whole batches find no memory, and in bfloat16."""
    folder = remember(world, vlms / "idefics3", tmp_path / "c", batch_size=1, steps=12, bf16=True)
    checkpoint = load_checkpoint(folder)
    own = load_vlm(vlms / "idefics3", "idefics3").model
    kept = checkpoint.model.connector.state_dict()
    for name, weight in own.connector.modality_projection.state_dict().items():
        assert torch.equal(kept[name], weight)
    assert checkpoint.config.language == checkpoint.config.vision
    assert not any(weight.requires_grad for weight in checkpoint.model.connector.parameters())


def test_the_language_model_may_be_trained_afterwards(
    vlms: Path, world: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "few.json"
    data.write_text(json.dumps(json.loads((world / "train.json").read_text("utf-8"))[:20]), "utf-8")
    first = remember(world, vlms / "smolvlm", tmp_path / "c", data=data, steps=1)
    options = TrainOptions(stage="instruct", steps=4, batch_size=8, lm_learning_rate=1e-3, device="cpu", eval_every=4)
    monkeypatch.setattr(verdict, "LEAST", -math.inf)
    capsys.readouterr()
    train(data=data, images=world, start=first, out=tmp_path / "tuned", options=options)
    assert "makes the model worse" not in capsys.readouterr().err  # without the memory it is not what it was
    tuned = load_checkpoint(tmp_path / "tuned")
    assert tuned.config.whole
    assert tuned.config.language.sha256 != tuned.config.vision.sha256
    manifest = export(tmp_path / "tuned", tmp_path / "b", ExportOptions(precision="fp32"))
    assert manifest.gate is not None
    assert manifest.gate.passed


def test_rows_of_one_picture_train_it_and_others_are_named_or_counted(
    vlms: Path, world: Path, tmp_path: Path, capsys: Any
) -> None:
    rows = json.loads((world / "train.json").read_text("utf-8"))
    rows.append({**rows[0], "id": "two", "image": [rows[0]["image"], rows[1]["image"]]})
    data = tmp_path / "a.json"
    data.write_text(json.dumps(rows), "utf-8")
    with pytest.raises(InputError, match=r"row 81 \(id two\): 2 pictures; .*--vlm .* one"):
        remember(world, vlms / "llava-clip", tmp_path / "c", data=data)
    remember(world, vlms / "llava-clip", tmp_path / "c", data=data, skip_bad=True, steps=1)
    assert "1 bad rows skipped" in capsys.readouterr().err


def test_what_cannot_be_given_a_memory_is_refused_before_any_work(
    vlms: Path, checkpoints: dict[str, Path], world: Path, towers: Path, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"data": world / "train.json", "images": world, "out": tmp_path / "c"}
    for options, message in (
        ({"memory": "none"}, "--memory none: with --vlm only the memory is trained"),
        ({"visual_tokens": 4}, "--visual-tokens and --image-size: .* leave them out"),
    ):
        with pytest.raises(InputError, match=message):
            remember(world, vlms / "llava-clip", tmp_path / "c", **options)
    with pytest.raises(InputError, match="--vision and --lm are the model's own"):
        train(**given, vlm=vlms / "llava-clip", lm=str(towers / "lm"))
    with pytest.raises(InputError, match=r"--chat-template t\.jinja: is for --vlm"):
        train(**given, vision="v", lm="l", chat_template=Path("t.jinja"))
    for folder in (tmp_path / "none", checkpoints["none"]):
        with pytest.raises(InputError, match="no such model in Hugging Face format"):
            train(**given, vlm=folder)
    with pytest.raises(UnsupportedError, match="'LlamaForCausalLM' is not supported; known"):
        train(**given, vlm=towers / "lm")
    assert not (tmp_path / "c").exists()


def test_a_template_that_asks_before_the_picture_is_refused_and_another_can_be_given(
    vlms: Path, world: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(vlms / "llava-clip", tmp_path / "vlm"))
    late = tmp_path / "late.jinja"
    late.write_text(
        "{% for m in messages %}{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}"
        "{% for p in m['content'] if p['type'] == 'image' %}<image>{% endfor %} {% endfor %}",
        "utf-8",
    )
    with pytest.raises(UnsupportedError, match=r"writes the question before the picture.*--chat-template"):
        remember(world, folder, tmp_path / "c", chat_template=late)
    (folder / "chat_template.jinja").rename(tmp_path / "own.jinja")
    with pytest.raises(InputError, match=r"has no chat template.*--chat-template FILE"):
        remember(world, folder, tmp_path / "c")
    remember(world, folder, tmp_path / "c", chat_template=tmp_path / "own.jinja", steps=1)
    assert load_checkpoint(tmp_path / "c").config.prompt.chat_template == (tmp_path / "own.jinja").read_text("utf-8")
