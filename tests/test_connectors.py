"""How patches become visual tokens: in training, and in what is exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.towers import train_tiny  # noqa: E402
from tinyalign_edge.errors import InputError  # noqa: E402
from tinyalign_edge.train.checkpoint import load_checkpoint  # noqa: E402
from tinyalign_edge.train.command import TrainCommand, run_command  # noqa: E402
from tinyalign_edge.train.connector import Connector, Patches  # noqa: E402
from tinyalign_edge.train.options import TrainOptions, connector_settings  # noqa: E402
from tinyalign_edge.train.paper import FusedKey  # noqa: E402
from tinyalign_edge.train.settings import ConnectorKind, ConnectorSettings  # noqa: E402


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "tokens"), [("pixel_shuffle", 4), ("mlp", 16)])
def test_each_connector_trains_and_its_export_is_proved(
    kind: ConnectorKind, tokens: int, world: Path, towers: Path, tmp_path: Path
) -> None:
    from tinyalign_edge.export.run import export

    out = train_tiny(world, towers, tmp_path / "c", connector=kind, visual_tokens=None, memory="latents")
    manifest = export(out, tmp_path / "bundle")
    assert manifest.vision.visual_tokens == tokens
    assert manifest.gate is not None
    assert manifest.gate.passed


def test_pixel_shuffle_puts_blocks_of_patches_side_by_side() -> None:
    grid = torch.arange(16.0).reshape(1, 4, 4, 1)
    blocks = Patches(ConnectorSettings(4, 4, 1, 4, 8, "pixel_shuffle"))(grid)
    assert blocks[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    every = Patches(ConnectorSettings(4, 4, 1, 16, 8, "mlp"))(grid)
    assert every.flatten().tolist() == list(range(16))


def test_a_number_of_tokens_that_a_connector_cannot_give_is_refused() -> None:
    def settings(kind: ConnectorKind, tokens: int | None, side: int = 12) -> ConnectorSettings:
        return connector_settings(TrainOptions(connector=kind, visual_tokens=tokens), (side, side, 8), 32)

    assert settings("pixel_shuffle", None).visual_tokens == 36
    assert settings("pixel_shuffle", 9).input_dim == 8 * 16
    assert settings("pooled", None).visual_tokens == 16
    assert settings("mlp", None).visual_tokens == 144
    with pytest.raises(InputError, match=r"--visual-tokens 20: .* --connector pixel_shuffle gives 36, 16, 9, 4, 1"):
        settings("pixel_shuffle", 20)
    with pytest.raises(InputError, match=r"--visual-tokens 20: .* --connector mlp gives 144"):
        settings("mlp", 20)
    with pytest.raises(InputError, match="use another --connector"):
        settings("pixel_shuffle", None, side=1)


def test_dropout_is_of_training_alone_and_of_the_connector_alone(world: Path, towers: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"memory": "none", "steps": 8, "eval_every": 8}
    plain, dropped = (
        load_checkpoint(train_tiny(world, towers, tmp_path / str(share), dropout=share, **options))
        for share in (0.0, 0.5)
    )
    assert dropped.config.training.dropout == 0.5
    assert not torch.equal(plain.model.connector.up.weight, dropped.model.connector.up.weight)
    features = torch.randn(2, 4, plain.config.connector.input_dim)
    with torch.inference_mode():
        assert torch.equal(dropped.model.connector(features), dropped.model.connector(features))
    fused = FusedKey(Connector(plain.config.connector, 1.0, dropout=0.5)).train()
    text, mask = torch.randn(2, 3, plain.config.connector.width), torch.ones(2, 3, dtype=torch.bool)
    assert torch.equal(fused(features, text, mask), fused(features, text, mask))
    given: dict[str, Any] = {"options": {"dropout": 0.5}, "data": ("d",), "images": tmp_path, "out": tmp_path / "o"}
    given |= {"vision": None, "lm": None, "chat_template": None, "resume": False, "recipe": None}
    for stage, vlm, start in (("instruct", None, tmp_path), ("align", tmp_path, None)):
        with pytest.raises(InputError, match=r"dropout 0\.5"):
            run_command(TrainCommand(stage=stage, vlm=vlm, start=start, **given))  # type: ignore[arg-type]
