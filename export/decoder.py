"""A causal language model as two ONNX graphs for the CPU, written from its Hugging Face weights.

The graphs are built node by node from the fused operators that are fast in onnxruntime; nothing is traced.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tinyalign_edge.bundle import DecoderBlock, Precision
from tinyalign_edge.errors import InputError, UnsupportedError
from tinyalign_edge.export.architecture import Architecture, product_names, read_architecture
from tinyalign_edge.export.graph import MICROSOFT, DataFile, Graph
from tinyalign_edge.export.plan import PRECISIONS, Plan
from tinyalign_edge.export.product import lookup, product

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Floats = NDArray[np.float32]

DECODER_FILE, EMBED_FILE, DATA_FILE = "decoder.onnx", "embed.onnx", "lm.data"
TABLE = "model.embed_tokens.weight"
IGNORED_WEIGHTS = ("rotary_emb.inv_freq",)  # a buffer that old checkpoints carry


def export_decoder(
    config: PretrainedConfig | Mapping[str, Any],
    weights: Mapping[str, NDArray[Any]],
    folder: Path,
    *,
    plan: Plan,
) -> DecoderBlock:
    """Write `decoder.onnx`, `embed.onnx` and their common `lm.data` into `folder`, as `DecoderBlock` says.

    Args:
        config: the model's Hugging Face configuration, or its `to_dict()`.
        weights: its state dict under Hugging Face names, any float dtype numpy knows.
        folder: exists; the three files are overwritten. Equal arguments give equal bytes.
        plan: the format of each of `product_names`. A tied embedding follows "lm_head"; another is int8, or float32
            where that is the plan's base.

    Raises:
        UnsupportedError: a family, activation, rotary scaling or weight that this exporter does not know.
        InputError: a weight is missing or has not the shape that `config` says, or `plan` names no product.
    """
    arch = read_architecture(config)
    if unknown := plan.given_back.keys() - set(product_names(arch)):
        raise InputError(f"no product {min(unknown)!r}; there are {', '.join(product_names(arch))}")
    source = _Weights(weights, tied=arch.tied)
    decoder = _DecoderWriter(arch, source, plan).write()
    embed = _embed_graph(arch, source, plan)
    source.refuse_unread()
    data = DataFile(folder / DATA_FILE)
    decoder.save(folder / DECODER_FILE, data=data)
    embed.save(folder / EMBED_FILE, data=data)
    return _block(arch, PRECISIONS[plan.base])


def _embed_graph(arch: Architecture, weights: _Weights, plan: Plan) -> Graph:
    graph = Graph("embed")
    ids = graph.input("input_ids", np.int64, ("B", "T"))
    table = weights.take(TABLE, arch.vocab_size, arch.width)
    kind = plan.format("lm_head") if arch.tied else "fp32" if plan.base == "fp32" else "int8"
    lookup(graph, ids, table, name="embed_tokens", plan=Plan(kind, max_level=plan.max_level), output="embeddings")
    graph.output("embeddings", np.float32, ("B", "T", arch.width))
    return graph


def _block(arch: Architecture, precision: Precision) -> DecoderBlock:
    return DecoderBlock(
        file=DECODER_FILE,
        embed_file=EMBED_FILE,
        data_files=(DATA_FILE,),
        precision=precision,
        layers=arch.layers,
        width=arch.width,
        kv_heads=arch.kv_heads,
        head_dim=arch.padded_head_dim,
        vocab_size=arch.vocab_size,
        max_positions=arch.max_positions,
    )


class _Weights:
    """A state dict that checks shapes and remembers what has been read of it."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]], *, tied: bool) -> None:
        self._arrays = arrays
        self._read = {"lm_head.weight"} if tied else set()  # a tied head is there twice, or once

    def take(self, name: str, *shape: int) -> Floats:
        """The tensor `name`, which must have `shape`, as float32."""
        if name not in self._arrays:
            raise InputError(f"weight {name!r} is missing")
        array = self._arrays[name]
        if array.shape != shape:
            raise InputError(f"weight {name!r} has shape {array.shape}, the configuration says {shape}")
        self._read.add(name)
        return np.asarray(array, np.float32)

    def linear(self, path: str, outputs: int, inputs: int) -> tuple[Floats, Floats]:
        """Rows (outputs, inputs) and bias (outputs,) of a linear layer; no bias reads as zeros."""
        bias = f"{path}.bias"
        zeros = np.zeros(outputs, np.float32)
        return self.take(f"{path}.weight", outputs, inputs), self.take(bias, outputs) if bias in self._arrays else zeros

    def refuse_unread(self) -> None:
        """A weight that no node uses means that the graph is not the model."""
        for name in self._arrays:
            if name not in self._read and not name.endswith(IGNORED_WEIGHTS):
                raise UnsupportedError(f"weight {name!r} is not part of the model that this exporter writes")


class _DecoderWriter:
    """Writes the graph of the layers, once."""

    def __init__(self, arch: Architecture, weights: _Weights, plan: Plan) -> None:
        self._graph = Graph("decoder")
        self._arch = arch
        self._weights = weights
        self._plan = plan
        self._names = _block(arch, "int8")

    def write(self) -> Graph:
        arch, graph = self._arch, self._graph
        residual = graph.input("inputs_embeds", np.float32, ("B", "T", arch.width))
        graph.input("seqlens_k", np.int32, ("B",))
        graph.input("total_sequence_length", np.int32, ())
        graph.input("num_logits", np.int64, ())
        self._rotary_caches()
        update = ""
        for i in range(arch.layers):
            normed, residual = self._norm(f"layers.{i}.input_layernorm", residual, update)
            update = self._attention(i, normed)
            normed, residual = self._norm(f"layers.{i}.post_attention_layernorm", residual, update)
            update = self._mlp(i, normed)
        normed, _ = self._norm("norm", residual, update)
        self._logits(normed)
        return graph

    def _product(self, name: str, x: str, rows: Floats, bias: Floats, *, level: bool = False) -> str:
        return product(self._graph, x, rows, bias, name=name, plan=self._plan, level=level)

    def _rotary_caches(self) -> None:
        """Cosines and sines of every position, (max_positions, padded head_dim / 2); padding does not turn."""
        arch = self._arch
        padding = (arch.padded_head_dim - arch.head_dim) // 2
        frequencies = np.pad(arch.rotary_frequencies, (0, padding))
        angles = np.outer(np.arange(arch.max_positions, dtype=np.float32), frequencies)
        self._graph.constant("cos_cache", np.cos(angles))
        self._graph.constant("sin_cache", np.sin(angles))

    def _norm(self, name: str, residual: str, update: str) -> tuple[str, str]:
        """Add `update` ("" for nothing yet) to the residual stream; returns it normalised, and as it is."""
        weight = self._graph.constant(f"{name}.weight", self._weights.take(f"model.{name}.weight", self._arch.width))
        epsilon = self._arch.norm_epsilon
        if not update:
            kind = "SimplifiedLayerNormalization"
            return self._graph.op(kind, residual, weight, name=name, axis=-1, epsilon=epsilon), residual
        kind, total = "SkipSimplifiedLayerNormalization", f"{name}.residual"
        inputs, outputs = (residual, update, weight), (name, "", "", total)
        self._graph.node(kind, inputs, outputs, name=name, domain=MICROSOFT, epsilon=epsilon)
        return name, total

    def _attention(self, i: int, normed: str) -> str:
        arch, path = self._arch, f"model.layers.{i}.self_attn"
        parts = [
            self._weights.linear(f"{path}.{part}_proj", heads * arch.head_dim, arch.width)
            for part, heads in (("q", arch.heads), ("k", arch.kv_heads), ("v", arch.kv_heads))
        ]
        rows = np.concatenate([_pad_heads(arch, rows) for rows, _ in parts])
        bias = np.concatenate([_pad_heads(arch, bias) for _, bias in parts])
        qkv = self._product(f"layers.{i}.qkv_proj", normed, rows, bias)
        attended = self._group_query_attention(i, qkv)
        rows, bias = self._weights.linear(f"{path}.o_proj", arch.width, arch.heads * arch.head_dim)
        return self._product(f"layers.{i}.o_proj", attended, _pad_heads(arch, rows.T).T, bias)

    def _group_query_attention(self, i: int, qkv: str) -> str:
        arch, names, name = self._arch, self._names, f"layers.{i}.attention"
        shape = ("B", arch.kv_heads, "S", arch.padded_head_dim)
        past = [self._graph.input(template % i, np.float32, shape) for template in (names.past_key, names.past_value)]
        present = [template % i for template in (names.present_key, names.present_value)]
        for buffer in present:
            self._graph.output(buffer, np.float32, shape)
        self._graph.node(
            "GroupQueryAttention",
            (qkv, "", "", *past, "seqlens_k", "total_sequence_length", "cos_cache", "sin_cache"),
            (name, *present),
            name=name,
            domain=MICROSOFT,
            num_heads=arch.heads,
            kv_num_heads=arch.kv_heads,
            do_rotary=1,
            scale=arch.head_dim**-0.5,
        )
        return name

    def _mlp(self, i: int, normed: str) -> str:
        arch, graph, path = self._arch, self._graph, f"model.layers.{i}.mlp"
        gate, up = (self._weights.linear(f"{path}.{part}_proj", arch.mlp_width, arch.width) for part in ("gate", "up"))
        rows, bias = np.concatenate([gate[0], up[0]]), np.concatenate([gate[1], up[1]])
        both = self._product(f"layers.{i}.gate_up_proj", normed, rows, bias)
        halves = (f"layers.{i}.gate", f"layers.{i}.up")
        graph.node("Split", (both,), halves, axis=-1, num_outputs=2)
        silu = graph.op("QuickGelu", halves[0], domain=MICROSOFT, alpha=1.0)
        rows, bias = self._weights.linear(f"{path}.down_proj", arch.width, arch.mlp_width)
        gated = graph.op("Mul", silu, halves[1])  # (B, T, mlp_width); the first token's row can be far the largest
        return self._product(f"layers.{i}.down_proj", gated, rows, bias, level=True)

    def _logits(self, normed: str) -> None:
        arch, graph = self._arch, self._graph
        one = graph.constant("one", np.array([1]))
        end = graph.constant("end", np.array([np.iinfo(np.int64).max]))
        start = graph.op("Neg", graph.op("Reshape", "num_logits", one))
        last = graph.op("Slice", normed, start, end, one)  # (B, num_logits, D)
        head = self._weights.take(TABLE if arch.tied else "lm_head.weight", arch.vocab_size, arch.width)
        logits = product(graph, last, head, name="lm_head", plan=self._plan, as_table=arch.tied)
        graph.op("Identity", logits, output="logits")
        graph.output("logits", np.float32, ("B", "num_logits", arch.vocab_size))


def _pad_heads(arch: Architecture, rows: Floats) -> Floats:
    """Append zeros to both rotary halves of every head: (heads * head_dim, ...) to (heads * padded head_dim, ...)."""
    half, padded = arch.head_dim // 2, arch.padded_head_dim // 2
    halves = rows.reshape(-1, half, *rows.shape[1:])
    return np.pad(halves, [(0, 0), (0, padded - half), *[(0, 0)] * (rows.ndim - 1)]).reshape(-1, *rows.shape[1:])
