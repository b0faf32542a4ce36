"""Export: the bundle says what torch says, and nothing unproved is written."""

from __future__ import annotations

import copy
import json
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

pytest.importorskip("torch")

import torch
from transformers import LlamaForCausalLM

import tinyalign_edge as ta
from tests.towers import train_tiny
from tinyalign_edge import cli
from tinyalign_edge.bundle import GateResult, open_bundle
from tinyalign_edge.data import read_rows
from tinyalign_edge.evaluate import evaluate
from tinyalign_edge.export import components, gate, search, tune
from tinyalign_edge.export.plan import Plan
from tinyalign_edge.export.run import ExportOptions, export
from tinyalign_edge.train.answer import TorchAnswerer
from tinyalign_edge.train.checkpoint import load_checkpoint
from tinyalign_edge.train.towers import load_language

pytestmark = pytest.mark.filterwarnings("ignore")
FP32 = ExportOptions(precision="fp32")
KINDS = ("none", "tokens", "latents")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_memory_passes_the_gate(bundles: dict[str, Path], kind: str) -> None:
    manifest = open_bundle(bundles[kind])
    assert manifest.gate is not None
    assert manifest.gate.passed
    assert manifest.gate.fp32_max_logit_error < 1e-4
    assert manifest.memory.kind == kind
    assert (bundles[kind] / "memory").exists() == (kind != "none")


@pytest.mark.parametrize("kind", KINDS)
def test_the_fp32_bundle_answers_as_torch_does(
    checkpoints: dict[str, Path], world: Path, tmp_path: Path, kind: str
) -> None:
    export(checkpoints[kind], tmp_path / "fp32", FP32)
    rows = read_rows(world / "test.json", world)
    expected = TorchAnswerer(load_checkpoint(checkpoints[kind])).ask_all(rows)
    with ta.load(tmp_path / "fp32") as model:
        for row, asked in zip(rows, expected, strict=True):
            image = model.encode(row.path)
            assert model.ask(image, asked.question).text.strip() == asked.answer
            nll = model.answer_nll(image, asked.question, asked.reference)
            np.testing.assert_allclose(nll.sum(), asked.nll, rtol=1e-3)


def test_the_memory_reaches_the_answer(bundles: dict[str, Path], world: Path) -> None:
    rows = read_rows(world / "test.json", world)
    for kind in ("tokens", "latents"):
        with ta.load(bundles[kind]) as model:
            image, empty = model.encode(rows[0].path), model.encode(rows[0].path, memories=())
            assert len(image.memories) == model.manifest.memory.k
            question = rows[0].turns[0].question
            assert not np.allclose(model.answer_nll(image, question, "red"), model.answer_nll(empty, question, "red"))


def test_a_convolutional_encoder_exports(world: Path, towers: Path, tmp_path: Path) -> None:
    checkpoint = train_tiny(world, towers, tmp_path / "c", vision="cnn", visual_tokens=1, steps=20)
    assert export(checkpoint, tmp_path / "b").gate is not None
    graph = onnx.load(tmp_path / "b" / "encoder.onnx").graph
    int8 = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8}
    assert any(node.op_type == "DequantizeLinear" and node.input[0] in int8 for node in graph.node)


def test_a_second_export_gives_the_same_bytes(
    checkpoints: dict[str, Path], bundles: dict[str, Path], tmp_path: Path
) -> None:
    export(checkpoints["tokens"], tmp_path / "tokens")
    assert contents(tmp_path / "tokens") == contents(bundles["tokens"])


@pytest.fixture
def broken_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every scale of the encoder's int8 and weight-only products lands on another channel."""
    honest = components.quantize_graph

    def broken(model: onnx.ModelProto, plan: Plan) -> onnx.ModelProto:
        model = honest(model, plan)
        for tensor in model.graph.initializer:
            if tensor.name.endswith(".scales"):
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[::-1].copy(), tensor.name))
        return model

    monkeypatch.setattr(components, "quantize_graph", broken)


@pytest.mark.usefixtures("broken_encoder")
def test_a_broken_quantisation_is_caught_and_the_old_bundle_stays(
    checkpoints: dict[str, Path], bundles: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(bundles["tokens"], tmp_path / "b")
    before = contents(tmp_path / "b")
    with pytest.raises(ta.GateError, match=r"visual token cosine is .* must be >= 0.999.*--allow-degraded") as caught:
        export(checkpoints["tokens"], tmp_path / "b")
    assert caught.value.exit_code == 3
    assert contents(tmp_path / "b") == before
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.usefixtures("broken_encoder")
def test_a_degraded_bundle_is_marked_and_warns_when_it_is_loaded(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = export(checkpoints["none"], tmp_path / "b", ExportOptions(allow_degraded=True))
    assert manifest.gate is not None
    assert not manifest.gate.passed
    assert any("visual token cosine" in failure for failure in manifest.gate.failures)
    assert "**Degraded" in (tmp_path / "b" / "README.md").read_text("utf-8")
    with pytest.warns(ta.DegradedWarning, match="visual token cosine is"):
        ta.load(tmp_path / "b").close()
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        monkeypatch.setattr(sys, "argv", ["tinyalign-edge", "verify", str(tmp_path / "b")])
        with pytest.raises(SystemExit):
            cli.main()
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("warning: ") and "degraded" in line for line in lines) == 1


def test_a_whole_that_fails_though_no_component_loses_much_has_matrices_given_back(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gate.LIMITS, "NLL change", ("<=", 0.0))
    monkeypatch.setitem(tune.LIMITS, "decoder", 1.0)
    monkeypatch.setattr(search, "MAX_GROWTH", 4.0)  # matrices this small grow more
    manifest = export(checkpoints["none"], tmp_path / "b", ExportOptions(allow_degraded=True))
    assert any(entry.component == "decoder" for entry in manifest.given_back)


def test_what_one_round_mends_the_next_does_not_undo(
    checkpoints: dict[str, Path], bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The language model is to blame in the first round only, vision in all."""
    results: list[GateResult] = []
    measure = gate.Gate.measure

    def kept(self: gate.Gate, exported: Any) -> GateResult:
        results.append(measure(self, exported))
        return results[-1]

    before = open_bundle(bundles["none"]).gate
    assert before is not None
    monkeypatch.setattr(gate.Gate, "measure", kept)
    monkeypatch.setitem(gate.LIMITS, "mean KL", ("<=", 0.999 * before.mean_kl))
    monkeypatch.setitem(gate.LIMITS, "visual token cosine", (">=", 2.0))
    monkeypatch.setitem(tune.LIMITS, "decoder", 1.0)
    monkeypatch.setattr(search, "MAX_GROWTH", 4.0)  # matrices this small grow more
    export(checkpoints["none"], tmp_path / "b", ExportOptions(allow_degraded=True))
    blamed = [gate.concerned(result) for result in results]
    assert blamed == [{"vision", "decoder"}, {"vision"}, {"vision"}, {"vision"}]


def test_what_fails_is_laid_to_a_component(bundles: dict[str, Path]) -> None:
    with ta.load(bundles["tokens"]) as model:
        measured = model.manifest.gate
    assert measured is not None
    for name, decoder_kl, wanted in (
        ("visual token cosine", 0.0, {"vision"}),
        ("memory token cosine", 0.0, {"memory"}),
        ("value cosine", 0.0, {"vision", "decoder"}),
        ("mean KL", 0.004, {"decoder"}),
        ("NLL change", 0.0001, {"vision", "memory"}),
    ):
        failures = (gate.failure(name, 0.02),)
        result = replace(measured, failures=failures, mean_kl=0.006, decoder_mean_kl=decoder_kl)
        assert gate.concerned(result) == wanted


def test_calibration_rows_need_their_images_and_are_read_before_any_work(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    given = ExportOptions(calibration=tmp_path / "rows.json")
    with pytest.raises(ta.InputError, match="--calibration and --images: give both"):
        export(checkpoints["none"], tmp_path / "b", given)
    with pytest.raises(ta.InputError, match=r"rows\.json: no such file"):
        export(checkpoints["none"], tmp_path / "b", replace(given, images=tmp_path))


OUTLIER, CHANNEL = 200.0, 5


def plant_outlier(checkpoint: Path, folder: Path, where: str) -> Path:
    """The same checkpoint on a language model that computes the same with one activation 200 times as large: what the
    MLP reads ("norm"), or what attention gives ("values").

    In a large language model a few channels are like this one.
    """
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    model = LlamaForCausalLM.from_pretrained(config["language"]["path"])
    layer, head_dim = model.model.layers[0], model.config.head_dim
    with torch.no_grad():
        if where == "norm":
            layer.post_attention_layernorm.weight[CHANNEL] *= OUTLIER
            for product in (layer.mlp.gate_proj, layer.mlp.up_proj):
                product.weight[:, CHANNEL] /= OUTLIER
        else:
            layer.self_attn.v_proj.weight[CHANNEL] *= OUTLIER
            layer.self_attn.o_proj.weight[:, CHANNEL::head_dim] /= OUTLIER
    shutil.copytree(config["language"]["path"], folder / "lm")
    model.save_pretrained(folder / "lm")
    shutil.copytree(checkpoint, folder / "checkpoint")
    config["language"] |= {"path": str(folder / "lm"), "sha256": load_language(str(folder / "lm")).ref.sha256}
    (folder / "checkpoint" / "config.json").write_text(json.dumps(config), "utf-8")
    return folder / "checkpoint"


def test_outliers_after_a_norm_are_folded_away_and_everything_stays_int8(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = plant_outlier(checkpoints["none"], tmp_path, "norm")
    with monkeypatch.context() as without:
        without.setattr(tune, "smoothing_factors", lambda *_: {})
        without.setattr(tune, "search", lambda base, *_: base)
        with pytest.raises(ta.GateError, match="mean KL is"):
            export(checkpoint, tmp_path / "b")
    manifest = export(checkpoint, tmp_path / "b")
    assert manifest.gate is not None
    assert manifest.gate.passed
    assert manifest.decoder.smoothed
    assert manifest.given_back == ()
    assert "SmoothQuant" in (tmp_path / "b" / "README.md").read_text("utf-8")


def test_outliers_that_cannot_be_folded_are_found_and_the_rest_stays_int8(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = plant_outlier(checkpoints["none"], tmp_path, "values")
    with monkeypatch.context() as without:
        without.setattr(tune, "search", lambda base, *_: base)
        with pytest.raises(ta.GateError, match="mean KL is"):
            export(checkpoint, tmp_path / "b")
    manifest = export(checkpoint, tmp_path / "b")
    assert manifest.gate is not None
    assert manifest.gate.passed
    given = {n.node: n for n in manifest.given_back}
    assert len(given) <= 2  # of 9
    assert {n.component for n in given.values()} == {"decoder"}
    found = given["layers.0.o_proj"]
    assert found.extra_bytes == {"fp32": 32 * (4 * 32 - 36), "int8_weight": 0}[found.format]
    nodes = {n.name: n.op_type for n in onnx.load(tmp_path / "b" / "decoder.onnx", load_external_data=False).graph.node}
    assert sum(kind == "DynamicQuantizeMatMul" for kind in nodes.values()) == 9 - len(given)
    assert "`layers.0.o_proj`" in (tmp_path / "b" / "README.md").read_text("utf-8")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupt_or_a_full_disk_leaves_the_old_bundle_whole(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    from tinyalign_edge.export import run

    export(checkpoints["none"], tmp_path / "b")
    before = contents(tmp_path / "b")

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(run, "Gate", fail)
    with pytest.raises((KeyboardInterrupt, ta.TinyAlignError)):
        export(checkpoints["none"], tmp_path / "b")
    assert contents(tmp_path / "b") == before
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_evaluation_of_checkpoint_and_bundle_agree(checkpoints: dict[str, Path], world: Path, tmp_path: Path) -> None:
    export(checkpoints["tokens"], tmp_path / "fp32", FP32)
    given: dict[str, Any] = {"data": world / "test.json", "images": world, "limit": 12}
    for memory in ("own", "none", "shuffled"):
        torch_side = evaluate(checkpoints["tokens"], memory=memory, **given)  # type: ignore[arg-type]
        device_side = evaluate(tmp_path / "fp32", memory=memory, **given)  # type: ignore[arg-type]
        assert torch_side.n == device_side.n == 12
        assert torch_side.exact_match == device_side.exact_match
        assert abs(torch_side.nll_per_token / device_side.nll_per_token - 1) < 1e-3


def test_logits_that_are_not_numbers_fail_the_gate() -> None:
    from tinyalign_edge.export.gate import failure

    assert failure("mean KL", float("nan")) == "mean KL is nan, must be <= 0.005"
    assert not failure("mean KL", 0.005)


def test_an_added_entry_is_what_training_would_have_written(
    checkpoints: dict[str, Path], bundles: dict[str, Path], world: Path, tmp_path: Path
) -> None:
    export(checkpoints["latents"], tmp_path / "fp32", FP32)
    shutil.copytree(bundles["latents"], tmp_path / "int8")
    rows = {row.id: row for row in read_rows(world / "train.json", world)}
    for precision, cosine in (("fp32", 0.99999), ("int8", 0.999)):
        with ta.load(tmp_path / precision) as model:
            assert model.memory is not None
            bank = model.memory.bank
            for written in [bank.entry(number) for number in bank.ids[:8]]:
                row = rows[written.source]
                added = model.memory.add(row.path, written.text)
                assert {added.id, written.id} == {entry.id for entry in model.memory.search(row.path, 2)}
                length = np.linalg.norm(added.value) * np.linalg.norm(written.value)
                assert added.value.ravel() @ written.value.ravel() >= cosine * length
                if precision == "fp32":
                    step = np.abs(written.value).max(axis=1, keepdims=True) / 127
                    assert np.all(np.abs(added.value - written.value) <= 1.02 * step)


def test_the_value_encoder_is_part_of_the_gate(
    checkpoints: dict[str, Path], bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = open_bundle(bundles["latents"]).gate
    assert found is not None
    assert found.value_cosine_mean is not None
    assert found.value_cosine_mean >= 0.999
    honest = components.export_value_encoder

    def broken(encoder: Any, folder: Path, **options: Any) -> None:
        honest(replace_means(encoder), folder, **options)

    def replace_means(encoder: Any) -> Any:
        other = copy.deepcopy(encoder)
        torch.nn.init.normal_(other.compress)
        return other

    monkeypatch.setattr(components, "export_value_encoder", broken)
    with pytest.raises(ta.GateError, match=r"value cosine is .* must be >= 0.999"):
        export(checkpoints["latents"], tmp_path / "b", FP32)
    assert not (tmp_path / "b").exists()


def test_the_papers_memory_is_refused_before_any_work(world: Path, towers: Path, tmp_path: Path) -> None:
    checkpoint = train_tiny(world, towers, tmp_path / "c", steps=1, memory="paper")
    with pytest.raises(
        ta.UnsupportedError, match=r"its memory is the paper's .* --memory tokens, latents or hybrid"
    ) as caught:
        export(checkpoint, tmp_path / "b")
    assert "\n" not in str(caught.value)
