"""The vision encoders that are tested, each compared with torch on its tiny checkpoint: rows for `docs/models.md`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tinyalign_edge.bench.models.compare import relative_error
from tinyalign_edge.bench.models.tiny_encoders import ENCODERS, save_encoder
from tinyalign_edge.export.distances import row_cosines
from tinyalign_edge.export.encoder import trace_encoder
from tinyalign_edge.export.fuse import fused_attentions
from tinyalign_edge.export.processor import own_plan
from tinyalign_edge.export.quantize import quantize_graph
from tinyalign_edge.train.model import AlignModel
from tinyalign_edge.train.settings import ConnectorSettings, MemorySettings
from tinyalign_edge.train.towers import VisionTower, image_settings, load_vision, patch_features

WIDTH, VISUAL_TOKENS, KEY_DIM, PICTURES = 32, 4, 16, 4

Outputs = list[npt.NDArray[np.float32]]  # visual tokens (B, N, D), key (B, key_dim)


@dataclass(frozen=True)
class EncoderRow:
    """One line of the table. Errors are the largest difference, as a share of the largest value."""

    encoder: str
    features: str
    fp32_error: float  # of visual tokens
    fp32_key_error: float
    int8_cosine: float  # of visual tokens, mean
    attentions: int  # blocks that one operator computes


def encoder_rows() -> Iterator[EncoderRow]:
    """A row for every kind in `ENCODERS`; half a minute in all."""
    for name in ENCODERS:
        with tempfile.TemporaryDirectory() as folder:
            save_encoder(name, Path(folder))
            yield compare(name, Path(folder))


def compare(name: str, folder: Path, *, side: int | None = None) -> EncoderRow:
    """Export the encoder in `folder`, at `side` x `side` pixels if given, and compare it with torch."""
    tower = load_vision(str(folder), image=image_settings(str(folder), side))
    model = untrained(tower)
    size = (PICTURES, 3, tower.image.height, tower.image.width)
    pictures = np.random.default_rng(0).standard_normal(size, np.float32)
    expected = _torch_outputs(tower, model, pictures)
    graph = trace_encoder(tower, model)
    fp32, int8 = onnx_outputs(graph, pictures), onnx_outputs(quantize_graph(graph, own_plan("int8")), pictures)
    return EncoderRow(
        encoder=name,
        features=ENCODERS[name].features,
        fp32_error=relative_error(fp32[0], expected[0]),
        fp32_key_error=relative_error(fp32[1], expected[1]),
        int8_cosine=float(row_cosines(*(tokens.reshape(-1, WIDTH) for tokens in (int8[0], expected[0]))).mean()),
        attentions=fused_attentions(graph),
    )


def untrained(tower: VisionTower) -> AlignModel:
    """Connector and key for an encoder, random but for the key's axes, which are those of a few random pictures."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_attention_heads": 2}
    language = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=1, **sizes))
    connector = ConnectorSettings(*tower.grid, min(VISUAL_TOKENS, tower.grid[0] * tower.grid[1]), WIDTH)
    model = AlignModel(language, connector, MemorySettings(kind="none", key_dim=KEY_DIM)).eval()
    with torch.inference_mode():
        pictures = torch.randn(2 * KEY_DIM, 3, tower.image.height, tower.image.width)
        model.key.fit(model.key.regions(patch_features(tower.model, pictures)))
    return model


def onnx_outputs(graph: onnx.ModelProto, pictures: npt.NDArray[np.float32]) -> Outputs:
    """What onnxruntime computes, one picture at a time."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    single = [session.run(["visual_tokens", "key"], {"pixel_values": picture[None]}) for picture in pictures]
    return [np.concatenate(parts) for parts in zip(*single, strict=True)]


def _torch_outputs(tower: VisionTower, model: AlignModel, pictures: npt.NDArray[np.float32]) -> Outputs:
    with torch.inference_mode():
        grid = patch_features(tower.model, torch.from_numpy(pictures))
        return [model.connector(model.pool(grid)).numpy(), model.key(model.key.regions(grid)).numpy()]
