"""A causal language model as two ONNX graphs for the CPU, written from its Hugging Face weights.

The graphs are built node by node from the fused operators that are fast in onnxruntime; nothing is traced.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tinyalign_edge.bundle import DecoderBlock, Precision
from tinyalign_edge.errors import InputError
from tinyalign_edge.export.embedding import embed_graph, embedding_format
from tinyalign_edge.export.families import Architecture, product_names, read_architecture
from tinyalign_edge.export.graph import MICROSOFT, DataFile, Graph
from tinyalign_edge.export.heads import pad_head_norm, pad_heads
from tinyalign_edge.export.plan import PRECISIONS, Plan
from tinyalign_edge.export.product import product
from tinyalign_edge.export.weights import Weights
from tinyalign_edge.runtime.decoder import CACHE_DTYPES

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Floats = NDArray[np.float32]

DECODER_FILE, EMBED_FILE, DATA_FILE = "decoder.onnx", "embed.onnx", "lm.data"
ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {  # operator and attributes
    "silu": ("QuickGelu", {"domain": MICROSOFT, "alpha": 1.0}),
    "quick_gelu": ("QuickGelu", {"domain": MICROSOFT, "alpha": 1.702}),
    "gelu": ("Gelu", {"approximate": "none"}),
    "gelu_tanh": ("Gelu", {"approximate": "tanh"}),
    "relu": ("Relu", {}),
}
CACHE_IN_INT8 = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}


def export_decoder(
    config: PretrainedConfig | Mapping[str, Any] | Architecture,
    weights: Mapping[str, NDArray[Any]],
    folder: Path,
    *,
    plan: Plan,
    scales: Floats | None = None,
    hidden: bool = False,
) -> DecoderBlock:
    """Write `decoder.onnx`, `embed.onnx` and their common `lm.data` into `folder`, as `DecoderBlock` says.

    Args:
        config: the model's Hugging Face configuration, its `to_dict()`, or what `read_architecture` made of it.
        weights: its state dict under Hugging Face names, any float dtype numpy knows.
        folder: exists; the three files are overwritten. Equal arguments give equal bytes.
        plan: the format of each of `product_names`. A tied embedding follows "lm_head"; another is int8, or float32
            where that is the plan's base.
        scales: of an int8 cache, as `cache_scales` gives them; None for a float32 cache.
        hidden: the graph gives its last hidden states, too.

    Raises:
        UnsupportedError: a family, activation, rotary scaling or weight that this exporter does not know.
        InputError: a weight is missing or has not the shape that `config` says, or `plan` names no product.
    """
    arch = config if isinstance(config, Architecture) else read_architecture(config)
    if unknown := plan.given_back.keys() - set(product_names(arch)):
        raise InputError(f"no product {min(unknown)!r}; there are {', '.join(product_names(arch))}")
    unused = frozenset({f"{arch.names.head}.weight"}) if arch.tied else frozenset()  # there twice, or once
    source = Weights(weights, unused=unused)
    decoder = _DecoderWriter(arch, source, plan, scales, hidden=hidden).write()
    table = source.take(f"{arch.names.embedding}.weight", arch.vocab_size, arch.width)
    kind = plan.format("lm_head") if arch.tied else embedding_format(plan)
    embed = embed_graph(table, replace(plan, base=kind, given_back={}), scale=arch.embedding_scale)
    source.refuse_unread()
    data = DataFile(folder / DATA_FILE)
    decoder.save(folder / DECODER_FILE, data=data)
    embed.save(folder / EMBED_FILE, data=data)
    return replace(_block(arch, PRECISIONS[plan.base], scales), hidden=hidden)


def _block(arch: Architecture, precision: Precision, scales: Floats | None) -> DecoderBlock:
    return DecoderBlock(
        file=DECODER_FILE,
        embed_file=EMBED_FILE,
        data_files=(DATA_FILE,),
        precision=precision,
        layers=len(arch.layers),
        width=arch.width,
        kv_heads=arch.kv_heads,
        head_dim=arch.padded_head_dim,
        vocab_size=arch.vocab_size,
        max_positions=arch.max_positions,
        kv="fp32" if scales is None else "int8",
    )


class _DecoderWriter:
    """Writes the graph of the layers, once."""

    def __init__(
        self, arch: Architecture, weights: Weights, plan: Plan, scales: Floats | None, *, hidden: bool
    ) -> None:
        self._graph = Graph("decoder")
        self._arch = arch
        self._weights = weights
        self._plan = plan
        self._scales = scales
        self._hidden = hidden
        self._buffers = _block(arch, "int8", scales)

    def write(self) -> Graph:
        arch, graph, names = self._arch, self._graph, self._arch.names
        residual = graph.input("inputs_embeds", np.float32, ("B", "T", arch.width))
        graph.input("seqlens_k", np.int32, ("B",))
        graph.input("total_sequence_length", np.int32, ())
        graph.input("num_logits", np.int64, ())
        self._rotary_caches()
        if arch.input_scale != 1:
            residual = graph.op("Mul", residual, self._scalar("input_scale", arch.input_scale))
        update = ""
        for i in range(len(arch.layers)):
            normed, residual = self._norm(self._path(i, names.attention_norm), residual, update)
            attended = self._after(i, names.attention_out_norm, self._attention(i, normed))
            if not arch.parallel:
                normed, residual = self._norm(self._path(i, names.mlp_norm), residual, attended)
            elif names.mlp_norm:
                normed, _ = self._norm(self._path(i, names.mlp_norm), residual)
            update = self._after(i, names.down_norm, self._mlp(i, normed))
            if arch.parallel:
                update = graph.op("Add", attended, update)
        normed, _ = self._norm(names.final_norm, residual, update)
        self._logits(normed)
        if self._hidden:
            graph.op("Identity", normed, output="hidden")
            graph.output("hidden", np.float32, ("B", "T", arch.width))
        return graph

    def _product(self, name: str, x: str, rows: Floats, bias: Floats, *, level: bool = False) -> str:
        return product(self._graph, x, rows, bias, name=name, plan=self._plan, level=level)

    def _path(self, i: int, part: str) -> str:
        """The checkpoint's name of a part of layer `i`."""
        return f"{self._arch.names.layer % i}.{part}"

    def _scalar(self, name: str, value: float) -> str:
        return self._graph.constant(name, np.array(value, np.float32))

    def _rotary_caches(self) -> None:
        """Cosines and sines of every position, (max_positions, padded rotary half) each; padding does not turn.

        onnxruntime computes them once, when it loads the graph: they are not in the file.
        """
        arch, graph = self._arch, self._graph
        positions = graph.op(
            "Range", *(self._scalar(f"positions.{i}", value) for i, value in enumerate((0, arch.max_positions, 1)))
        )
        column = graph.op("Unsqueeze", positions, graph.constant("positions.axis", np.array([1])))
        for i, rotary in enumerate(arch.rotary):
            padded = np.pad(rotary.frequencies, (0, arch.padded_rotary_half - arch.rotary_half))
            angles = graph.op("Mul", column, graph.constant(f"rotary.{i}.frequencies", padded[None]))
            for kind in ("Cos", "Sin"):
                turned = graph.op(kind, angles)
                amplitude = self._scalar(f"rotary.{i}.{kind}.amplitude", rotary.amplitude)
                graph.op("Mul", turned, amplitude, name=f"rotary.{i}.{kind}")

    def _norm(self, path: str, residual: str, update: str = "") -> tuple[str, str]:
        """Add `update` ("" for nothing) to the residual stream; returns it normalised, and as it is."""
        arch, graph = self._arch, self._graph
        rms = arch.norm == "rms"
        scale = self._weights.take(f"{path}.weight", arch.width) + np.float32(arch.norm_offset)
        inputs = [graph.constant(f"{path}.weight", scale)]
        if not rms:
            inputs.append(graph.constant(f"{path}.bias", self._weights.bias(f"{path}.bias", arch.width)))
        if not update:
            kind = "SimplifiedLayerNormalization" if rms else "LayerNormalization"
            return graph.op(kind, residual, *inputs, name=path, axis=-1, epsilon=arch.norm_epsilon), residual
        kind, total = "SkipSimplifiedLayerNormalization" if rms else "SkipLayerNormalization", f"{path}.residual"
        outputs = (path, "", "", total)
        graph.node(kind, (residual, update, *inputs), outputs, name=path, domain=MICROSOFT, epsilon=arch.norm_epsilon)
        return path, total

    def _after(self, i: int, name: str, update: str) -> str:
        """What a sublayer adds, normalised where the family has a norm there."""
        return self._norm(self._path(i, name), update)[0] if name else update

    def _attention(self, i: int, normed: str) -> str:
        arch, names = self._arch, self._arch.names
        sizes = tuple(heads * arch.head_dim for heads in (arch.heads, arch.kv_heads, arch.kv_heads))
        paths = tuple(self._path(i, part) for part in names.qkv)
        parts: tuple[Floats, ...] = self._weights.linear(paths, sizes, arch.width)
        if arch.interleaved_qkv:
            parts = tuple(_by_kind(part, arch) for part in parts)
        rows, bias = (pad_heads(arch, part) for part in parts)
        qkv = self._product(f"layers.{i}.qkv_proj", normed, rows, bias)
        attended = self._group_query_attention(i, *(self._normed_heads(i, qkv) if names.q_norm else (qkv, "", "")))
        path = (self._path(i, names.attention_out),)
        rows, bias = self._weights.linear(path, (arch.width,), arch.heads * arch.head_dim)
        return self._product(f"layers.{i}.o_proj", attended, pad_heads(arch, rows.T).T, bias)

    def _normed_heads(self, i: int, qkv: str) -> tuple[str, str, str]:
        """Queries, keys and values apart, each head of the first two normalised."""
        arch, graph, name = self._arch, self._graph, f"layers.{i}.attention"
        parts = (f"{name}.q", f"{name}.k", f"{name}.v")
        sizes = np.array([arch.heads, arch.kv_heads, arch.kv_heads]) * arch.padded_head_dim
        graph.node("Split", (qkv, graph.constant(f"{name}.sizes", sizes)), parts, axis=-1)
        per_head = graph.constant(f"{name}.per_head", np.array([0, 0, -1, arch.padded_head_dim]))
        together = graph.constant(f"{name}.together", np.array([0, 0, -1]))
        normed = []
        for part, weight_name in zip(parts[:2], (arch.names.q_norm, arch.names.k_norm), strict=True):
            path = self._path(i, weight_name)
            weight = self._weights.take(f"{path}.weight", arch.head_dim) + np.float32(arch.norm_offset)
            weight, epsilon = pad_head_norm(arch, weight)
            scale = graph.constant(f"{path}.weight", weight)
            heads = graph.op("Reshape", part, per_head)
            heads = graph.op("SimplifiedLayerNormalization", heads, scale, name=path, axis=-1, epsilon=epsilon)
            normed.append(graph.op("Reshape", heads, together))
        return normed[0], normed[1], parts[2]

    def _group_query_attention(self, i: int, query: str, key: str, value: str) -> str:
        """Attention over the buffers, which it fills; `query` may hold keys and values too."""
        arch, names, layer, name = self._arch, self._buffers, self._arch.layers[i], f"layers.{i}.attention"
        shape, dtype = ("B", arch.kv_heads, "S", arch.padded_head_dim), CACHE_DTYPES[names.kv]
        past = [self._graph.input(template % i, dtype, shape) for template in (names.past_key, names.past_value)]
        present = [template % i for template in (names.present_key, names.present_value)]
        for buffer in present:
            self._graph.output(buffer, dtype, shape)
        turns = layer.rotary is not None
        caches = (f"rotary.{layer.rotary}.Cos", f"rotary.{layer.rotary}.Sin") if turns else ("", "")
        scales, quantised = self._cache_scales(i)
        self._graph.node(
            "GroupQueryAttention",
            (query, key, value, *past, "seqlens_k", "total_sequence_length", *caches, *scales),
            (name, *present),
            name=name,
            domain=MICROSOFT,
            num_heads=arch.heads,
            kv_num_heads=arch.kv_heads,
            do_rotary=int(turns),
            scale=arch.attention_scale,
            **({"local_window_size": layer.window} if layer.window else {}),
            **({"softcap": arch.attention_cap} if arch.attention_cap else {}),
            **quantised,
        )
        return name

    def _cache_scales(self, i: int) -> tuple[tuple[str, ...], dict[str, Any]]:
        """The operator's last inputs and its attributes for an int8 cache; nothing for a float32 one."""
        if self._scales is None:
            return (), {}
        kinds = zip(("k", "v"), self._scales[i], strict=True)  # (kv_heads, head_dim) each
        given = tuple(self._graph.constant(f"layers.{i}.{kind}_scale", s[None, :, None]) for kind, s in kinds)
        return ("", "", "", *given), CACHE_IN_INT8

    def _mlp(self, i: int, normed: str) -> str:
        arch, graph, names = self._arch, self._graph, self._arch.names
        paths = tuple(self._path(i, part) for part in names.up)
        sizes = (arch.mlp_width,) * (2 if arch.gated else 1)
        name = f"layers.{i}.{arch.layer_products[2]}"
        hidden = self._product(name, normed, *self._weights.linear(paths, sizes, arch.width))
        kind, attributes = ACTIVATIONS[arch.activation]
        if arch.gated:
            halves = (f"layers.{i}.gate", f"layers.{i}.up")
            graph.node("Split", (hidden,), halves, axis=-1, num_outputs=2)
            active = graph.op("Mul", graph.op(kind, halves[0], **attributes), halves[1])
        else:
            active = graph.op(kind, hidden, **attributes)  # (B, T, mlp_width)
        rows, bias = self._weights.linear((self._path(i, names.down),), (arch.width,), arch.mlp_width)
        # level: the first token's row can be far the largest
        return self._product(f"layers.{i}.down_proj", active, rows, bias, level=True)

    def _logits(self, normed: str) -> None:
        arch, graph = self._arch, self._graph
        one = graph.constant("one", np.array([1]))
        end = graph.constant("end", np.array([np.iinfo(np.int64).max]))
        start = graph.op("Neg", graph.op("Reshape", "num_logits", one))
        last = graph.op("Slice", normed, start, end, one)  # (B, num_logits, D)
        path = arch.names.embedding if arch.tied else arch.names.head
        head = self._weights.take(f"{path}.weight", arch.vocab_size, arch.width)
        bias = self._weights.bias(f"{arch.names.head}.bias", arch.vocab_size)
        logits = product(graph, last, head, bias, name="lm_head", plan=self._plan, as_table=arch.tied)
        if arch.logits_cap:
            cap = self._scalar("logits_cap", arch.logits_cap)
            logits = graph.op("Mul", graph.op("Tanh", graph.op("Div", logits, cap)), cap)
        graph.op("Identity", logits, output="logits")
        graph.output("logits", np.float32, ("B", "num_logits", arch.vocab_size))


def _by_kind(rows: Floats, arch: Architecture) -> Floats:
    """Rows ordered by head, then query, key, value, to queries of all heads, then keys, then values."""
    apart = rows.reshape(arch.heads, 3, arch.head_dim, *rows.shape[1:])
    return np.ascontiguousarray(apart.swapaxes(0, 1)).reshape(rows.shape)
