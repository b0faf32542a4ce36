"""The int8 cache of keys and values: close, a quarter of the bytes, and refused where it is wrong."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

pytest.importorskip("torch")

import tinyalign_edge as ta
from tinyalign_edge.bench import kv as bench
from tinyalign_edge.bench.models.compare import divergence, onnx_logits, relative_error
from tinyalign_edge.bench.models.tiny import FUSED, TRACED, build, random_ids
from tinyalign_edge.bundle import open_bundle
from tinyalign_edge.errors import BundleError, GateError, TinyAlignError, UnsupportedError
from tinyalign_edge.export import run
from tinyalign_edge.export.cache_scales import Floats, cache_scales
from tinyalign_edge.export.decoder import export_decoder
from tinyalign_edge.export.families import Architecture, read_architecture
from tinyalign_edge.export.language import check_language
from tinyalign_edge.export.plan import Plan
from tinyalign_edge.export.run import ExportOptions, export
from tinyalign_edge.export.weights import StateDict
from tinyalign_edge.report import print_bundle
from tinyalign_edge.runtime.decoder import Decoder, missing_for_cache

LACKING = missing_for_cache("int8")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.skipif(bool(LACKING), reason=LACKING)]
IDS = random_ids(64)
INT8 = ExportOptions(kv="int8")


def decoders(name: str, folder: Path, cut: float = 1.0) -> tuple[Decoder, Decoder]:
    """A tiny model with a float32 and with an int8 cache, its scales made `cut` times as large."""
    model = build(FUSED[name])
    arch, weights = read_architecture(model.config), StateDict(model)
    (folder / "fp32").mkdir(parents=True)
    (folder / "int8").mkdir()
    exact = Decoder(folder / "fp32", export_decoder(arch, weights, folder / "fp32", plan=Plan("fp32")), threads=1)
    texts = [exact.embed(random_ids(64, seed=seed)) for seed in (2, 3)]
    scales = cache_scales(arch, exact, texts) * np.float32(cut)
    block = export_decoder(arch, weights, folder / "int8", plan=Plan("fp32"), scales=scales)
    return exact, Decoder(folder / "int8", block, threads=1)


@pytest.mark.parametrize("name", FUSED)
def test_an_int8_cache_stays_close_in_prefill_chunks_and_steps(name: str, tmp_path: Path) -> None:
    exact, small = decoders(name, tmp_path)
    for chunks in ([64], [20, 1, 11, 32], [32] + [1] * 32):
        wanted = onnx_logits(exact, IDS, chunks)
        assert 0 < divergence(onnx_logits(small, IDS, chunks), wanted) < 0.01


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_scales_that_are_too_small_show(name: str, tmp_path: Path) -> None:
    exact, small = decoders(name, tmp_path, cut=1 / 16)
    assert divergence(onnx_logits(small, IDS, [64]), onnx_logits(exact, IDS, [64])) > 0.3


def test_an_int8_cache_takes_a_quarter_of_the_bytes(tmp_path: Path) -> None:
    caches = [decoder.new_cache(100) for decoder in decoders("llama-heads-24", tmp_path)]
    assert caches[0].buffer.nbytes == 4 * caches[1].buffer.nbytes
    assert caches[1].buffer.nbytes == 100 * 2 * 2 * 4 * 32  # positions, layers, keys and values, heads, padded size


def test_an_int8_cache_is_saved_and_restored_as_it_is(tmp_path: Path) -> None:
    _, small = decoders("llama", tmp_path)
    rows, one, other = small.embed(IDS), small.new_cache(64), small.new_cache(50)
    small.forward(one, rows[:40])
    assert one.saved().keys_values.dtype == np.int8
    other.restore(one.saved())
    np.testing.assert_array_equal(small.forward(other, rows[40:44], 4), small.forward(one, rows[40:44], 4))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_draft_of_several_tokens_gives_the_logits_of_single_ones(name: str, tmp_path: Path) -> None:
    _, small = decoders(name, tmp_path)
    drafted, plain = (onnx_logits(small, IDS, [32, *steps]) for steps in ([8] * 4, [1] * 32))
    assert relative_error(drafted, plain) < 1e-5


def test_a_scale_covers_a_key_at_every_position(tmp_path: Path) -> None:
    exact, _ = decoders("llama", tmp_path)
    arch = read_architecture(build(FUSED["llama"]).config)
    text = exact.embed([5] * 128)  # one token turned to 128 places
    near, far = cache_scales(arch, exact, [text[:1]]), cache_scales(arch, exact, [text])
    np.testing.assert_allclose(near[0, 0], far[0, 0], rtol=1e-4)


def test_a_traced_model_has_no_int8_cache_and_that_is_said_first() -> None:
    with pytest.raises(
        UnsupportedError, match=r"model_type 'olmo2' is not supported.* has no int8 cache: use --kv fp32"
    ):
        check_language(build(TRACED["olmo2"]), kv="int8")


def test_an_onnxruntime_that_is_too_old_is_named_with_the_one_that_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, small = decoders("llama", tmp_path)
    monkeypatch.setattr(ort, "__version__", "1.24.1")
    with pytest.raises(
        BundleError, match=r"its int8 cache needs onnxruntime .* this is 1\.24\.1; upgrade .* --kv fp32$"
    ):
        Decoder(tmp_path / "int8", small.block)
    with pytest.raises(UnsupportedError, match=r"an int8 cache needs onnxruntime .* or use --kv fp32$"):
        export(tmp_path / "before-it-is-read", tmp_path / "b", INT8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp32", "int8"]


def test_a_float32_cache_asks_nothing_of_onnxruntimes_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, _ = decoders("llama", tmp_path)
    monkeypatch.setattr(ort, "__version__", "built here")
    assert Decoder(tmp_path / "fp32", exact.block).block.kv == "fp32"


def test_a_cache_that_is_not_what_the_manifest_says_is_refused(tmp_path: Path) -> None:
    exact, small = decoders("llama", tmp_path)
    for folder, block in (("fp32", small.block), ("int8", exact.block)):
        with pytest.raises(BundleError, match=r"'past_key_values\.0\.key' is tensor\(.*, the manifest says"):
            Decoder(tmp_path / folder, block)


def test_a_bundle_with_an_int8_cache_passes_the_gate_and_says_so(
    checkpoints: dict[str, Path], world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = export(checkpoints["tokens"], tmp_path / "b", INT8)
    assert manifest.gate is not None
    assert manifest.gate.passed
    assert open_bundle(tmp_path / "b").decoder.kv == "int8"
    assert f"kept in int8, {manifest.decoder.position_bytes} bytes" in (tmp_path / "b" / "README.md").read_text("utf-8")
    print_bundle(tmp_path / "b", manifest)
    assert f"int8, {manifest.decoder.position_bytes} bytes a position" in capsys.readouterr().out
    picture = next((world / "images").glob("*.png"))
    with ta.load(tmp_path / "b") as model:
        assert model.ask(picture, "What colour is the circle?").text


def test_scales_that_cut_are_caught_and_the_message_names_the_other_cache(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(arch: Architecture, decoder: Decoder, texts: object) -> Floats:
        return cache_scales(arch, decoder, texts) / 64  # type: ignore[arg-type]

    monkeypatch.setattr(run, "cache_scales", cut)
    with pytest.raises(GateError, match=r"mean KL is .*--kv fp32 loses less"):
        export(checkpoints["none"], tmp_path / "b", INT8)
    assert not list(tmp_path.iterdir())


def test_what_an_export_keeps_meanwhile_lies_beside_the_bundle_and_goes_with_a_failure(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_model: object, path: Path) -> None:
        assert path.parent.parent == tmp_path / "out"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run, "park", full)
    with pytest.raises(TinyAlignError, match=r"cannot be written \(No space left on device\); nothing was changed$"):
        export(checkpoints["none"], tmp_path / "out" / "b")
    assert not list((tmp_path / "out").iterdir())


def test_the_speed_of_both_caches_is_measured_on_the_same_model(tmp_path: Path) -> None:
    both = bench.write_decoders("smoke-lm", tmp_path, threads=1)
    lost = bench.compare_caches(both, np.load(tmp_path / "source" / bench.REFERENCE))
    assert lost["int8 against fp32"]["kl"] < 0.01
    rows = bench.measure(both, (32, 600), rounds=2, steps=2)
    assert [(row.kv, row.context) for row in rows] == [("fp32", 32), ("int8", 32), ("fp32", 600), ("int8", 600)]
    assert all(0 < row.least_per_s <= row.median_per_s <= row.most_per_s for row in rows)
