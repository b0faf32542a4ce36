"""Folding outlier channels into neighbouring weights leaves what every family computes as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from tinyalign_edge.bench.models.compare import onnx_logits, relative_error, torch_logits
from tinyalign_edge.bench.models.tiny import FUSED, build, random_ids
from tinyalign_edge.export.decoder import DECODER_FILE
from tinyalign_edge.export.families import read_architecture
from tinyalign_edge.export.language import export_language
from tinyalign_edge.export.plan import Plan
from tinyalign_edge.export.sensitivity import decoder_feed
from tinyalign_edge.export.smooth import smoothing_factors
from tinyalign_edge.runtime.decoder import Decoder

IDS = random_ids(48)


@pytest.mark.parametrize("name", FUSED)
def test_a_smoothed_model_computes_the_same(name: str, tmp_path: Path) -> None:
    model = build(FUSED[name])
    arch = read_architecture(model.config)
    block = export_language(model, tmp_path, plan=Plan("fp32"))
    feed = decoder_feed(block, Decoder(tmp_path, block, threads=1).embed(IDS), 1)
    factors = smoothing_factors(arch, tmp_path / DECODER_FILE, [feed])
    assert len(factors) == len(arch.layers) * (3 if arch.gated else 2)
    assert all(s.min() > 0 and s.max() > 1.2 * s.min() for s in factors.values())
    block = export_language(model, tmp_path, plan=Plan("fp32", smooth=True), smoothing=factors)
    logits = onnx_logits(Decoder(tmp_path, block, threads=1), IDS, [32, 16])
    assert relative_error(logits, torch_logits(model, IDS)) < 1e-4


def test_a_channel_that_is_always_zero_keeps_its_scale(tmp_path: Path) -> None:
    model = build(FUSED["llama"])
    model.model.layers[0].input_layernorm.weight.data[3] = 0
    block = export_language(model, tmp_path, plan=Plan("fp32"))
    feed = decoder_feed(block, Decoder(tmp_path, block, threads=1).embed(IDS), 1)
    factors = smoothing_factors(read_architecture(model.config), tmp_path / DECODER_FILE, [feed])
    assert factors["layers.0.qkv_proj"][3] == 1
    assert all(np.isfinite(s).all() for s in factors.values())
