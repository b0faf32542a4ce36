"""A language model of a family that `families` does not know, traced by torch into a graph with the same contract.

The model runs as transformers wrote it: plain attention over explicit masks instead of the fused operator, and a
product for each linear layer. It is right, slower, and a tied embedding is stored twice.
"""

from __future__ import annotations

import inspect
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from tinyalign_edge.bundle import DecoderBlock
from tinyalign_edge.errors import BundleError, UnsupportedError, first_line
from tinyalign_edge.export.decoder import DATA_FILE, DECODER_FILE, EMBED_FILE
from tinyalign_edge.export.embedding import embed_graph, embedding_format
from tinyalign_edge.export.gemm import split_gemm
from tinyalign_edge.export.graph import DataFile, tensor
from tinyalign_edge.export.limits import refuse_large
from tinyalign_edge.export.plan import PRECISIONS, Plan
from tinyalign_edge.export.quantize import quantize_graph
from tinyalign_edge.export.rotary import longest_position
from tinyalign_edge.runtime.decoder import Decoder
from tinyalign_edge.train.model import body_name

OPSET = 18
TRACED_TOKENS, TRACED_CAPACITY = 5, 12  # sizes of the example that is traced; all are free in the graph
CHECKED_TOKENS = 9
MAX_ERROR = 1e-3  # of float32 logits, relative to their scale
NEEDED = ("inputs_embeds", "past_key_values", "attention_mask", "position_ids")
WINDOW = "sliding_attention"


@dataclass(frozen=True)
class Shape:
    """What the buffers of a model look like, found by running it."""

    layers: int
    kv_heads: int
    head_dim: int
    width: int
    vocab_size: int
    max_positions: int


def probe(model: PreTrainedModel) -> Shape:
    """Run two tokens through the model and see what it leaves in its cache.

    Raises:
        UnsupportedError: it does not take embeddings and a cache, or its layers keep something else than keys and
            values of one shape.
    """
    refuse_large(model, _kind(model))
    missing = [name for name in NEEDED if name not in inspect.signature(model.forward).parameters]
    if missing:
        raise UnsupportedError(f"{_kind(model)}: its forward takes no {missing[0]}, so it cannot be exported")
    cache = DynamicCache()
    with torch.inference_mode():
        embeds = model.get_input_embeddings()(torch.zeros(1, 2, dtype=torch.long))
        try:
            logits = model(inputs_embeds=embeds, past_key_values=cache, use_cache=True).logits
        except Exception as error:  # whatever the model's own code raises
            raise UnsupportedError(f"{_kind(model)} does not run on embeddings ({first_line(error)})") from None
    kept = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    shapes = {tuple(part.shape) for part in kept if part is not None}
    longest = getattr(model.config, "max_position_embeddings", None)
    if len(shapes) != 1 or len(cache.layers) != model.config.num_hidden_layers or not longest:
        raise UnsupportedError(f"{_kind(model)}: its layers do not keep keys and values of one shape")
    unknown = set(getattr(model.config, "layer_types", None) or ()) - {"full_attention", WINDOW}
    if unknown:
        raise UnsupportedError(f"{_kind(model)}: layer type {min(unknown)!r} is not supported")
    _, kv_heads, _, head_dim = shapes.pop()
    settings = model.config.to_dict() | {"max_position_embeddings": longest}
    return Shape(len(cache.layers), kv_heads, head_dim, embeds.shape[-1], logits.shape[-1], longest_position(settings))


def trace_decoder(model: PreTrainedModel, folder: Path, *, plan: Plan, hidden: bool = False) -> DecoderBlock:
    """Write the files that `export_decoder` writes, from a trace of the model itself.

    The products with constant matrices get the formats of `plan` by the names of their nodes.

    Raises:
        UnsupportedError: torch cannot export the model; one line says why.
    """
    shape = probe(model)
    block = DecoderBlock(
        file=DECODER_FILE,
        embed_file=EMBED_FILE,
        data_files=(DATA_FILE,),
        precision=PRECISIONS[plan.base],
        layers=shape.layers,
        width=shape.width,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        max_positions=shape.max_positions,
        graph="traced",
        hidden=hidden,
    )
    data = DataFile(folder / DATA_FILE)
    decoder = _trace_layers(model, block)
    split_gemm(decoder.graph)
    decoder = quantize_graph(decoder, plan)
    _save(decoder, folder / DECODER_FILE, data)
    table = model.get_input_embeddings()
    if type(table) is nn.Embedding:
        own = replace(plan, base=embedding_format(plan), given_back={})
        embed_graph(table.weight.detach().float().numpy(), own).save(folder / EMBED_FILE, data=data)
    else:  # one that does more than look up, such as scaling
        _save(_trace_embedding(table, model), folder / EMBED_FILE, data)
    _check(model, block, folder)
    return block


class _Buffers(Cache):
    """Keys and values in buffers of fixed capacity (B, kv_heads, S, head_dim), written at given positions."""

    def __init__(self, buffers: list[Tensor], positions: Tensor, total: Tensor) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.buffers = buffers  # key, value of layer 0, key, value of layer 1, ...
        self._positions = positions  # (T,) of the new tokens
        self._total = total  # positions that are valid afterwards

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, cache_kwargs: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Write the new keys and values (B, kv_heads, T, head_dim); returns all valid ones."""
        read = []
        for i, new in enumerate((key_states, value_states), 2 * layer_idx):
            index = self._positions[None, None, :, None].expand(new.shape)
            self.buffers[i] = self.buffers[i].scatter(2, index, new)
            read.append(self.buffers[i][:, :, : self._total])
        return read[0], read[1]

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self._positions[0]


class _Layers(nn.Module):
    """The model with the inputs and outputs of `DecoderBlock`."""

    def __init__(self, model: PreTrainedModel, *, hidden: bool) -> None:
        super().__init__()
        self.model, self.hidden = model, hidden
        self.accepted = set(inspect.signature(model.forward).parameters)

    def forward(
        self, inputs_embeds: Tensor, seqlens_k: Tensor, total_sequence_length: Tensor, num_logits: Tensor,
        *buffers: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        tokens = inputs_embeds.shape[1]
        positions = torch.arange(tokens) + (seqlens_k[0].long() + 1 - tokens)  # (T,)
        cache = _Buffers(list(buffers), positions, total_sequence_length.long())
        options: dict[str, Any] = {
            "cache_position": positions,
            "logits_to_keep": torch.arange(tokens)[-num_logits:],
            "use_cache": True,
        }
        states: list[Tensor] = []
        body = getattr(self.model, body_name(self.model))  # `output_hidden_states` gives None in a trace of some models
        hook = body.register_forward_hook(lambda *call: states.append(call[-1].last_hidden_state))
        output = self.model(
            inputs_embeds=inputs_embeds,
            attention_mask=self._masks(positions, total_sequence_length.long()),
            position_ids=positions[None],
            past_key_values=cache,
            **{name: value for name, value in options.items() if name in self.accepted},
        )
        hook.remove()
        return output.logits[:, -num_logits:], *cache.buffers, *states[: int(self.hidden)]

    def _masks(self, positions: Tensor, total: Any) -> Tensor | dict[str, Tensor]:
        """Additive masks (1, 1, T, total), by kind of layer where the model has more than one."""
        config = self.model.config
        window = getattr(config, "sliding_window", None)
        window = window if getattr(config, "use_sliding_window", True) else None
        keys = torch.arange(total)[None]
        causal = keys <= positions[:, None]
        near = causal & (keys > positions[:, None] - window) if window else causal
        kinds = getattr(config, "layer_types", None)
        if kinds and WINDOW in kinds:
            return {"full_attention": _additive(causal), WINDOW: _additive(near)}
        return _additive(causal if kinds else near)


def _additive(allowed: Tensor) -> Tensor:
    return torch.zeros(1).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]


def _trace_layers(model: PreTrainedModel, block: DecoderBlock) -> onnx.ModelProto:
    buffer = torch.zeros(1, block.kv_heads, TRACED_CAPACITY, block.head_dim)
    inputs = {
        "inputs_embeds": torch.zeros(1, TRACED_TOKENS, block.width),
        "seqlens_k": torch.tensor([TRACED_TOKENS + 1], dtype=torch.int32),
        "total_sequence_length": torch.tensor(TRACED_TOKENS + 2, dtype=torch.int32),
        "num_logits": torch.tensor(TRACED_TOKENS - 1),
    }
    pasts = [name % i for i in range(block.layers) for name in (block.past_key, block.past_value)]
    presents = [name % i for i in range(block.layers) for name in (block.present_key, block.present_value)]
    sizes = {"inputs_embeds": {0: "B", 1: "T"}, "seqlens_k": {0: "B"}, "logits": {0: "B", 1: "num_logits"}}
    sizes |= {name: {0: "B", 2: "S"} for name in (*pasts, *presents)}
    sizes |= {"hidden": {0: "B", 1: "T"}} if block.hidden else {}
    example = (*inputs.values(), *(buffer for _ in pasts))
    with _plain_attention(model):
        layers, outputs = _Layers(model, hidden=block.hidden).eval(), ["logits", *presents, *["hidden"] * block.hidden]
        return _trace(layers, example, [*inputs, *pasts], outputs, sizes, model)


def _trace_embedding(table: nn.Module, model: PreTrainedModel) -> onnx.ModelProto:
    ids = torch.zeros(1, TRACED_TOKENS, dtype=torch.long)
    sizes = {name: {0: "B", 1: "T"} for name in ("input_ids", "embeddings")}
    return _trace(table, (ids,), ["input_ids"], ["embeddings"], sizes, model)


def _trace(
    module: nn.Module, example: tuple[Tensor, ...], inputs: list[str], outputs: list[str],
    sizes: dict[str, dict[int, str]], model: PreTrainedModel,
) -> onnx.ModelProto:  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # of sizes that the trace fixes, which are meant
        path = Path(folder) / "traced.onnx"
        try:
            torch.onnx.export(
                module, example, path, input_names=inputs, output_names=outputs, dynamic_axes=sizes,
                opset_version=OPSET, dynamo=False,
            )  # fmt: skip
        except Exception as error:  # torch's exporter and the model's code raise anything
            raise UnsupportedError(f"{_kind(model)}: torch cannot export it ({first_line(error)})") from None
        return onnx.load(path)


def _check(model: PreTrainedModel, block: DecoderBlock, folder: Path) -> None:
    """Run the written graphs on sizes that were not traced; a trace can hold what was true of its example only."""
    ids = np.arange(CHECKED_TOKENS) % block.vocab_size
    try:
        decoder = Decoder(folder, block, threads=1)
        cache, embeds = decoder.new_cache(CHECKED_TOKENS), decoder.embed(ids)
        pieces = [decoder.forward(cache, piece, num_logits=len(piece)) for piece in np.split(embeds, [-2, -1])]
    except BundleError as error:
        raise UnsupportedError(f"{_kind(model)}: its trace holds for one size only ({first_line(error)})") from None
    with torch.inference_mode(), _plain_attention(model):
        wanted = model(torch.tensor(ids)[None]).logits[0].numpy()
    difference = float(np.abs(np.concatenate(pieces) - wanted).max() / np.abs(wanted).max())
    if block.precision == "fp32" and not difference <= MAX_ERROR:
        raise UnsupportedError(f"{_kind(model)}: its trace computes something else, logits differ by {difference:.1e}")


def _save(model: onnx.ModelProto, path: Path, data: DataFile) -> None:
    weights = [tensor(weight.name, numpy_helper.to_array(weight), data) for weight in model.graph.initializer]
    del model.graph.initializer[:]
    model.graph.initializer.extend(weights)
    path.write_bytes(model.SerializeToString(deterministic=True))


@contextmanager
def _plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """The attention that takes explicit masks and leaves nothing out, soft caps included."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _kind(model: PreTrainedModel) -> str:
    return f"language model of type {model.config.model_type!r}"
