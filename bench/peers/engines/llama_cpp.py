"""llama.cpp through llama-cpp-python's plain bindings; files written with `gguf` and quantised by llama.cpp itself."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from tinyalign_edge.bench.peers.check import Floats, folder_bytes
from tinyalign_edge.bench.peers.worker import CAPACITY, Language

PACKAGES = ("llama-cpp-python", "gguf")
FILE = "model.gguf"
KINDS = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}
LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def prepare(source: Path, folder: Path, precision: str) -> None:
    """Write the checkpoint `source` as GGUF in float32, then quantise that file."""
    full = folder / "fp32.gguf"
    _write_gguf(source, full)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = KINDS[precision], 1
    code = llama_cpp.llama_model_quantize(str(full).encode(), str(folder / FILE).encode(), ctypes.byref(options))
    full.unlink()
    if code:
        raise RuntimeError(f"llama_model_quantize returned {code}")


def load(source: Path, folder: Path, precision: str, threads: int) -> Language:
    """Open what `prepare` wrote."""
    return _LlamaCpp(folder, threads)


def build() -> str:
    """The instruction sets that the library was compiled for."""
    text = llama_cpp.llama_print_system_info().decode()
    return " ".join(part.split("=")[0].strip() for part in text.split("|") if part.strip().endswith("= 1"))


class _LlamaCpp(Language):
    def __init__(self, folder: Path, threads: int) -> None:
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            str(folder / FILE).encode(), llama_cpp.llama_model_default_params()
        )
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = CAPACITY
        options.n_threads = options.n_threads_batch = threads
        self._context: Any = llama_cpp.llama_init_from_model(self._model, options)
        if not self._context:
            raise RuntimeError("llama_init_from_model failed")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self.weight_bytes = folder_bytes(folder, FILE)
        self.length = 0

    def append(self, ids: NDArray[np.int64], *, num_logits: int = 1) -> Floats:
        tokens = (llama_cpp.llama_token * len(ids))(*ids.tolist())
        code = llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(tokens, len(ids)))
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        self.length += len(ids)
        return self._logits()

    def step(self) -> None:
        self.append(self._logits()[-1:].argmax(-1))

    def truncate(self, length: int) -> None:
        llama_cpp.llama_memory_seq_rm(self._memory, 0, length, -1)
        self.length = length

    def _logits(self) -> Floats:
        """Of the last position, (1, V): a view of the library's buffer."""
        row = llama_cpp.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(row, shape=(self.vocab_size,))[None]


def _write_gguf(source: Path, path: Path) -> None:
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((source / "config.json").read_text())
    kind = config["model_type"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, kind)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for name, array in load_file(source / "model.safetensors").items():
        if kind == "llama" and ".q_proj." in name:
            array = _interleave(array, heads)
        elif kind == "llama" and ".k_proj." in name:
            array = _interleave(array, kv_heads)
        writer.add_tensor(_gguf_name(name), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleave(rows: Floats, heads: int) -> Floats:
    """llama.cpp turns neighbouring rows of a Llama head together, Hugging Face rows half a head apart."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def _gguf_name(name: str) -> str:
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in whole:
        return whole[name]
    _, _, layer, part = name.split(".", 3)
    found = next(key for key in LAYER_NAMES if part.startswith(key))
    return f"blk.{layer}.{part.replace(found, LAYER_NAMES[found])}"
