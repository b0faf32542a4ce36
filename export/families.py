"""What a family of language models is: one entry each, read from a Hugging Face configuration.

An entry of `FAMILIES` says in what the family differs from Llama, after transformers' modelling code; all that a
checkpoint's configuration may change is read there too. `Architecture` is the result, and all that the graphs know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from tinyalign_edge.errors import UnsupportedError
from tinyalign_edge.export.rotary import Rotary, longest_position, read_rotary

if TYPE_CHECKING:
    from transformers import PretrainedConfig

T = TypeVar("T")
Config = Mapping[str, Any]
Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu"]

ROTARY_MULTIPLE = 8  # GroupQueryAttention takes rotary halves of multiples of 8,
HEAD_MULTIPLE = 16  # and with a rotary embedding no other head sizes than these
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}


@dataclass(frozen=True)
class Names:
    """Where a checkpoint keeps its weights; those below `layer` are relative to it, "" is a part that is not there.

    Matrices that one product computes are named together: `qkv` as queries, keys, values or as one that holds all
    three, `up` as gate and up, as one that holds both, or as up alone.
    """

    embedding: str = "model.embed_tokens"
    layer: str = "model.layers.%d"
    attention_norm: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    q_norm: str = ""
    k_norm: str = ""
    attention_out: str = "self_attn.o_proj"
    attention_out_norm: str = ""
    mlp_norm: str = "post_attention_layernorm"  # "": the MLP reads what attention reads
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    down_norm: str = ""
    final_norm: str = "model.norm"
    head: str = "lm_head"


@dataclass(frozen=True)
class Layer:
    """What may differ from layer to layer."""

    rotary: int | None = 0  # which of the architecture's rotary embeddings; None: positions are not encoded
    window: int = 0  # the keys that a query sees, its own included; 0: all before it


@dataclass(frozen=True)
class Architecture:
    """What the graphs need to know of a language model, whatever its family."""

    layers: tuple[Layer, ...]
    width: int
    mlp_width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    tied: bool  # lm_head is the embedding table
    rotary: tuple[Rotary, ...]  # all of one size
    attention_scale: float  # of the scores, before softmax
    norm_epsilon: float
    norm: Literal["rms", "mean and variance"] = "rms"
    norm_offset: float = 0.0  # added to the weights of all norms
    names: Names = Names()
    interleaved_qkv: bool = False  # rows of the one matrix are ordered by head first, then query, key, value
    parallel: bool = False  # the MLP reads the stream as it was before attention
    gated: bool = True
    activation: Activation = "silu"
    embedding_scale: float = 1.0  # part of the embedding: text is scaled, what else enters the model is not
    input_scale: float = 1.0  # everything that enters the model is scaled
    attention_cap: float = 0.0  # scores s become cap * tanh(s / cap); 0: they do not
    logits_cap: float = 0.0

    @property
    def rotary_half(self) -> int:
        """Half of the dimensions of a head that turn with the position."""
        return len(self.rotary[0].frequencies)

    @property
    def padded_rotary_half(self) -> int:
        return _round_up(self.rotary_half, ROTARY_MULTIPLE)

    @property
    def padded_head_dim(self) -> int:
        still = self.head_dim - 2 * self.rotary_half
        return 2 * self.padded_rotary_half + _round_up(still, HEAD_MULTIPLE)

    @property
    def layer_products(self) -> tuple[str, ...]:
        """The matrix products of a layer in the order of the graph."""
        return ("qkv_proj", "o_proj", "gate_up_proj" if self.gated else "up_proj", "down_proj")


def product_names(arch: Architecture) -> tuple[str, ...]:
    """The matrix products of the graph in order, `layers.0.qkv_proj` to `lm_head`; their nodes are called so."""
    return (*(f"layers.{i}.{name}" for i in range(len(arch.layers)) for name in arch.layer_products), "lm_head")


def read_architecture(config: PretrainedConfig | Config) -> Architecture:
    """Read a Hugging Face configuration.

    Raises:
        UnsupportedError: an unknown family, activation, rotary scaling or option; the message lists the known ones.
    """
    settings = config if isinstance(config, Mapping) else config.to_dict()
    return _choose(FAMILIES, settings.get("model_type"), "model_type")(settings)


def _llama(config: Config, **differences: Any) -> Architecture:
    """Llama's layers, but for the `differences`."""
    width, heads, layers = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
    head_dim = config.get("head_dim") or width // heads
    activation = config["hidden_activation"] if "hidden_activation" in config else config["hidden_act"]
    common: dict[str, Any] = {
        "layers": (Layer(),) * layers,
        "width": width,
        "mlp_width": config["intermediate_size"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "vocab_size": config["vocab_size"],
        "max_positions": longest_position(config),
        "tied": config["tie_word_embeddings"],
        "rotary": (read_rotary(config, head_dim),),
        "attention_scale": head_dim**-0.5,
        "norm_epsilon": config["rms_norm_eps"] if "rms_norm_eps" in config else config["layer_norm_eps"],
        "activation": _choose(ACTIVATIONS, activation, "hidden_act"),
    }
    return Architecture(**(common | differences))


def _mistral(config: Config, **differences: Any) -> Architecture:
    window = config.get("sliding_window") or 0
    return _llama(config, layers=(Layer(window=window),) * config["num_hidden_layers"], **differences)


def _qwen2(config: Config, **differences: Any) -> Architecture:
    return _llama(config, layers=tuple(Layer(window=window) for window in _windows(config)), **differences)


def _qwen3(config: Config) -> Architecture:
    return _qwen2(config, names=Names(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm"))


def _smollm3(config: Config) -> Architecture:
    turning = config["no_rope_layers"]  # 1 for the layers that do have positions
    pairs = zip(turning, _windows(config), strict=True)
    return _llama(config, layers=tuple(Layer(0 if turns else None, window) for turns, window in pairs))


def _phi(config: Config) -> Architecture:
    _refuse(config, "qk_layernorm")
    names = Names(
        attention_out="self_attn.dense",
        mlp_norm="",
        up=("mlp.fc1",),
        down="mlp.fc2",
        final_norm="model.final_layernorm",
    )
    return _llama(config, norm="mean and variance", names=names, parallel=True, gated=False)


def _phi3(config: Config) -> Architecture:
    return _mistral(config, names=Names(qkv=("self_attn.qkv_proj",), up=("mlp.gate_up_proj",)))


def _gemma2(config: Config, **differences: Any) -> Architecture:
    common: dict[str, Any] = {
        "layers": tuple(Layer(window=window) for window in _windows(config)),
        "attention_scale": config["query_pre_attn_scalar"] ** -0.5,
        "norm_offset": 1.0,
        "names": Names(**GEMMA_NORMS),
        "input_scale": config["hidden_size"] ** 0.5,
        "attention_cap": config["attn_logit_softcapping"] or 0.0,
        "logits_cap": config["final_logit_softcapping"] or 0.0,
    }
    return _llama(config, **(common | differences))


def _gemma3(config: Config) -> Architecture:
    _refuse(config, "use_bidirectional_attention")
    near = dict(config) | {"rope_theta": config["rope_local_base_freq"], "rope_scaling": None}
    rotary = tuple(read_rotary(settings, config["head_dim"]) for settings in (config, near))
    return _gemma2(
        config,
        layers=tuple(Layer(1 if window else 0, window) for window in _windows(config)),
        rotary=rotary,
        names=Names(**GEMMA_NORMS, q_norm="self_attn.q_norm", k_norm="self_attn.k_norm"),
        embedding_scale=config["hidden_size"] ** 0.5,
        input_scale=1.0,
        attention_cap=0.0,  # transformers reads attn_logit_softcapping and does not use it
    )


def _gpt_neox(config: Config) -> Architecture:
    names = Names(
        embedding="gpt_neox.embed_in",
        layer="gpt_neox.layers.%d",
        qkv=("attention.query_key_value",),
        attention_out="attention.dense",
        up=("mlp.dense_h_to_4h",),
        down="mlp.dense_4h_to_h",
        final_norm="gpt_neox.final_layer_norm",
        head="embed_out",
    )
    return _llama(
        config,
        kv_heads=config["num_attention_heads"],
        norm="mean and variance",
        names=names,
        interleaved_qkv=True,
        parallel=config["use_parallel_residual"],
        gated=False,
    )


GEMMA_NORMS: dict[str, Any] = {
    "attention_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "down_norm": "post_feedforward_layernorm",
}
FAMILIES: dict[str, Callable[[Config], Architecture]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "smollm3": _smollm3,
    "phi": _phi,
    "phi3": _phi3,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "gpt_neox": _gpt_neox,
}


def _windows(config: Config) -> list[int]:
    """The sliding window of each layer, 0 for none, from `layer_types`."""
    known = {"full_attention": 0, "sliding_attention": config["sliding_window"] or 0}
    return [_choose(known, kind, "layer type") for kind in config["layer_types"]]


def _refuse(config: Config, option: str) -> None:
    if config.get(option):
        raise UnsupportedError(f"{config['model_type']}: {option} = {config[option]} is not supported, only false")


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _choose(table: Mapping[str, T], key: object, what: str) -> T:
    if key not in table:
        raise UnsupportedError(f"{what} {key!r} is not supported; known: {', '.join(map(repr, table))}")
    return table[str(key)]
