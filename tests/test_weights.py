"""Towers that are damaged, incomplete or of a wrong kind: one line says so before any long work, nothing is written."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from tinyalign_edge import cli
from tinyalign_edge.errors import InputError
from tinyalign_edge.train.towers import load_language, load_vision
from tinyalign_edge.train.weights import INDEX, check_weights

pytestmark = pytest.mark.filterwarnings("ignore")
Fault = Callable[[Path], object]
Run = Callable[..., str]
WEIGHTS = "model.safetensors"
QUERY = "vision_model.encoder.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command that fails; returns its one line of error."""

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["tinyalign-edge", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        lines = capsys.readouterr().err.strip().splitlines()
        assert ended.value.code == 2, lines
        assert len(lines) == 1
        return lines[0]

    return call


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def configure(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **settings}), "utf-8")


def cut(folder: Path, share: float = 0.5) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: int(len(data) * share)])


def shard(folder: Path) -> None:
    """The same weights in two files with an index."""
    tensors = sorted(load_file(folder / WEIGHTS).items())
    halves = {"model-1.safetensors": tensors[::2], "model-2.safetensors": tensors[1::2]}
    for name, half in halves.items():
        save_file(dict(half), folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: name for name, half in halves.items() for key, _ in half}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    (folder / WEIGHTS).unlink()


def lose_a_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-2.safetensors").unlink()


def lose_a_weight_of_a_shard(folder: Path) -> None:
    shard(folder)
    half = load_file(folder / "model-1.safetensors")
    half.pop(min(half))
    save_file(half, folder / "model-1.safetensors", metadata={"format": "pt"})


def pickle_only(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def put(value: float) -> Fault:
    def edit(folder: Path) -> None:
        change(folder, lambda tensors: tensors[QUERY][3].__setitem__(5, value))

    return edit


def segmenter(folder: Path) -> None:
    """A kind whose output has no `last_hidden_state`."""
    swin = hf.SwinConfig(image_size=32, embed_dim=12, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4)
    swin.out_features = ["stage1", "stage2", "stage3", "stage4"]
    detr = hf.DetrConfig(d_model=16, decoder_layers=1, decoder_ffn_dim=16, decoder_attention_heads=1)
    config = hf.MaskFormerConfig(backbone_config=swin, decoder_config=detr, fpn_feature_size=32, mask_feature_size=32)
    hf.MaskFormerModel(config).save_pretrained(folder)
    hf.SiglipImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)


VISION_FAULTS: dict[str, tuple[Fault, list[str]]] = {
    "cut in half": (cut, [WEIGHTS, "is damaged or cut short", "fetch it again"]),
    "cut in the header": (lambda folder: cut(folder, 0.001), [WEIGHTS, "is damaged or cut short"]),
    "not safetensors at all": (lambda f: (f / WEIGHTS).write_bytes(b"<html>404</html>"), ["is damaged or cut short"]),
    "a shard missing": (lose_a_shard, ["model-2.safetensors is missing", "index.json names"]),
    "a shard incomplete": (lose_a_weight_of_a_shard, ["model-1.safetensors lacks 'vision_model"]),
    "NaN": (put(float("nan")), [f"weight '{QUERY}' in {WEIGHTS} holds NaN or infinity"]),
    "infinity": (put(float("-inf")), [f"weight '{QUERY}' in {WEIGHTS} holds NaN or infinity"]),
    "another width": (
        lambda folder: configure(folder, intermediate_size=80),
        ["'vision_model.encoder.layers.0.mlp.fc1.bias' has shape (64,), config.json says (80,)"],
    ),
    "fewer layers in the config": (
        lambda folder: configure(folder, num_hidden_layers=1),
        ["weight 'vision_model.encoder.layers.1.", "has no place in the model that config.json describes"],
    ),
    "more layers in the config": (
        lambda folder: configure(folder, num_hidden_layers=3),
        ["weight 'vision_model.encoder.layers.2.", "which config.json asks for, is not in the safetensors"],
    ),
    "pickle": (pickle_only, [f"has no {WEIGHTS}", "pytorch_model.bin is not read"]),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), [f"has no {WEIGHTS}; save it with"]),
    "unknown kind": (lambda folder: configure(folder, model_type="resampler9"), ["model_type 'resampler9' is not one"]),
    "remote code": (
        lambda folder: configure(folder, model_type="mine", auto_map={"AutoModel": "modeling.Mine"}),
        ["model_type 'mine' needs code from the folder (auto_map), and no remote code is run"],
    ),
    "no last_hidden_state": (segmenter, ["MaskFormerModel gives no last_hidden_state"]),
    "a config that is not JSON": (lambda folder: (folder / "config.json").write_text("{"), ["config.json:1:2"]),
    "a processor that is not JSON": (
        lambda folder: (folder / "preprocessor_config.json").write_text("["),
        ["preprocessor_config.json", "not"],
    ),
}


def copied(towers: Path, name: str, tmp_path: Path, fault: Fault) -> Path:
    folder = shutil.copytree(towers / name, tmp_path / name)
    fault(folder)
    return folder


@pytest.mark.parametrize("fault", VISION_FAULTS)
def test_a_faulty_vision_encoder_stops_training_before_it_begins(
    error: Run, world: Path, towers: Path, tmp_path: Path, fault: str
) -> None:
    break_it, parts = VISION_FAULTS[fault]
    folder, out = copied(towers, "vit", tmp_path, break_it), tmp_path / "out"
    given = ["--data", world / "train.json", "--images", world, "--lm", towers / "lm", "--out", out]
    line = error("train", *given, "--vision", folder)
    assert str(folder) in line
    assert all(part in line for part in parts), line
    assert not out.exists()


def slow_tokenizer(folder: Path) -> None:
    for file in folder.glob("token*"):
        file.unlink()
    hf.ByT5Tokenizer().save_pretrained(folder)


def add_bias(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}))


def name_a_shard_outside(folder: Path) -> None:
    shard(folder)
    index = json.loads((folder / INDEX).read_text("utf-8"))
    index["weight_map"] = {name: f"../{file}" for name, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index), "utf-8")


LANGUAGE_FAULTS: dict[str, tuple[Fault, list[str]]] = {
    "a bias that the config does not have": (
        add_bias,
        ["weight 'model.layers.0.self_attn.q_proj.bias' has no place in the model that config.json describes"],
    ),
    "a shard outside the folder": (name_a_shard_outside, ["names '../", "which is not a plain file name"]),
    "cut in half": (cut, [WEIGHTS, "is damaged or cut short"]),
    "NaN": (
        lambda folder: change(folder, lambda tensors: tensors["model.norm.weight"].fill_(float("nan"))),
        ["weight 'model.norm.weight' in model.safetensors holds NaN"],
    ),
    "another width": (
        lambda folder: configure(folder, intermediate_size=80),
        ["'model.layers.0.mlp.down_proj.weight' has shape (32, 64), config.json says (32, 80)"],
    ),
    "fewer layers in the config": (
        lambda folder: configure(folder, num_hidden_layers=1),
        ["weight 'model.layers.1.", "has no place"],
    ),
    "more layers in the config": (
        lambda folder: configure(folder, num_hidden_layers=3),
        ["weight 'model.layers.2.", "is not in the safetensors files"],
    ),
    "tokens without rows": (
        lambda folder: configure(folder, vocab_size=200),
        ["300 tokens but an embedding of 200 rows"],
    ),
    "no fast tokenizer": (slow_tokenizer, ["tokenizer has no fast form"]),
    "pickle": (pickle_only, ["pytorch_model.bin is not read"]),
    "unknown kind": (lambda folder: configure(folder, model_type="llama99"), ["model_type 'llama99' is not one"]),
}


@pytest.mark.parametrize("fault", LANGUAGE_FAULTS)
def test_a_faulty_language_model_stops_training_before_it_begins(
    error: Run, world: Path, towers: Path, tmp_path: Path, fault: str
) -> None:
    break_it, parts = LANGUAGE_FAULTS[fault]
    folder, out = copied(towers, "lm", tmp_path, break_it), tmp_path / "out"
    given = ["--data", world / "train.json", "--images", world, "--vision", towers / "vit", "--out", out]
    line = error("train", *given, "--lm", folder)
    assert str(folder) in line
    assert all(part in line for part in parts), line
    assert not out.exists()


@pytest.mark.parametrize("fault", ["cut in half", "NaN", "another width", "remote code"])
def test_a_faulty_encoder_stops_an_export_before_it_begins(
    error: Run, checkpoints: dict[str, Path], towers: Path, tmp_path: Path, fault: str
) -> None:
    break_it, parts = VISION_FAULTS[fault]
    checkpoint = shutil.copytree(checkpoints["none"], tmp_path / "checkpoint")
    settings = json.loads((checkpoint / "config.json").read_text("utf-8"))
    folder = copied(towers, "vit", tmp_path, break_it)
    configure(checkpoint, vision={**settings["vision"], "path": str(folder)})
    line = error("export", checkpoint, "--out", tmp_path / "bundle")
    assert all(part in line for part in parts), line
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "vit"}


def test_a_language_model_is_not_a_vision_encoder(towers: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(towers / "lm", tmp_path / "lm")
    shutil.copy(towers / "vit" / "preprocessor_config.json", folder)
    with pytest.raises(InputError, match="LlamaModel cannot encode a picture"):
        load_vision(str(folder))


def test_what_is_not_used_of_a_checkpoint_may_be_there_or_lack(towers: Path, tmp_path: Path) -> None:
    """A classifier's folder has a head that is not read and no pooler; a shard is as good as one file."""
    config = hf.ViTConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config.image_size, config.patch_size = 32, 8
    hf.ViTForImageClassification(config).save_pretrained(tmp_path / "classifier")
    hf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "classifier")
    assert load_vision(str(tmp_path / "classifier")).grid == (4, 4, 16)
    sharded = copied(towers, "vit", tmp_path, shard)
    assert load_vision(str(sharded)).grid == load_vision(str(towers / "vit")).grid


def test_untied_and_tied_language_models_of_half_precision_load(towers: Path, tmp_path: Path) -> None:
    for tied in (True, False):
        folder = shutil.copytree(towers / "lm", tmp_path / str(tied))
        config = hf.AutoConfig.from_pretrained(folder, tie_word_embeddings=tied)
        hf.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        assert load_language(str(folder)).model.dtype == torch.float32


def test_integers_and_empty_weights_are_finite(tmp_path: Path) -> None:
    tensors = {"ids": torch.arange(4), "empty": torch.zeros(0, 3), "large": torch.full((2,), 3e38)}
    save_file(tensors, tmp_path / WEIGHTS)
    check_weights(str(tmp_path), "tower")
