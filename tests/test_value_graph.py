"""The value encoder's graph computes what torch computes, whatever its weights and however long the text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tinyalign_edge.export.value_graph import FILE, export_value_encoder  # noqa: E402
from tinyalign_edge.runtime.sessions import open_session  # noqa: E402
from tinyalign_edge.train.connector import ValueEncoder  # noqa: E402
from tinyalign_edge.train.settings import MemorySettings  # noqa: E402

REGIONS, CHANNELS, WIDTH = 3, 20, 24


def test_the_graph_computes_what_torch_computes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = ValueEncoder(MemorySettings("latents", latents=4, latent_dim=16), CHANNELS, torch.randn(50, WIDTH)).eval()
    for weight in encoder.parameters():  # trained ones may be so small that a mistake does not show
        torch.nn.init.normal_(weight, std=0.5)
    export_value_encoder(encoder, tmp_path, visual_tokens=REGIONS)
    session = open_session(tmp_path / FILE, threads=1)
    for length in (1, 4, 9):
        features, text = torch.randn(1, REGIONS, CHANNELS), torch.randn(1, length, WIDTH)
        with torch.inference_mode():
            expected = encoder(features, text, torch.ones(1, length, dtype=torch.bool)).numpy()
        found = session.run(["latents"], {"features": features.numpy(), "text": text.numpy()})[0]
        assert found.shape == (1, 4, 16)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
