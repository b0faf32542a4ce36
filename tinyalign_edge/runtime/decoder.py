"""The language model on the device: embeddings in, logits out, keys and values kept in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from tinyalign_edge.bundle import CachePrecision, DecoderBlock
from tinyalign_edge.errors import BundleError, InputError
from tinyalign_edge.runtime.sessions import ThreadsLike, check_shapes, onnxruntime_errors, open_session

Floats = NDArray[np.float32]

CACHE_DTYPES: dict[CachePrecision, type[np.float32 | np.int8]] = {"fp32": np.float32, "int8": np.int8}
GRAPH_DTYPES: dict[CachePrecision, str] = {"fp32": "tensor(float)", "int8": "tensor(int8)"}
INT8_CACHE_SINCE = (1, 27)  # of onnxruntime: older ones compute GroupQueryAttention over float caches only


@dataclass(frozen=True)
class Saved:
    """What a `Cache` held of its first positions."""

    keys_values: NDArray[Any]
    hidden: Floats

    @property
    def nbytes(self) -> int:
        return self.keys_values.nbytes + self.hidden.nbytes


class Cache:
    """The keys and values of one sequence, and the buffers of a call, all bound once.

    Attributes:
        buffer: (L, 2, 1, kv_heads, capacity, head_dim) float32 or int8, keys then values; the first `length`
            positions are valid. The operating system gives its memory page by page as it is filled.
        hidden: (capacity, D) float32, the last hidden states of the positions; (capacity, 0) where the graph gives
            none.
        length: positions filled.
        capacity: positions there are.
    """

    def __init__(self, session: ort.InferenceSession, block: DecoderBlock, capacity: int) -> None:
        self.length = 0
        self.capacity = capacity
        self.buffer = np.zeros((block.layers, 2, 1, block.kv_heads, capacity, block.head_dim), CACHE_DTYPES[block.kv])
        self.hidden = np.zeros((capacity, block.width if block.hidden else 0), np.float32)
        self.binding = session.io_binding()
        self._last_key = np.zeros(1, np.int32)
        self._total = np.zeros((), np.int32)
        self._num_logits = np.zeros((), np.int64)
        self._embeddings = np.empty((1, 0, block.width), np.float32)
        self._hidden = np.empty((1, 0, self.hidden.shape[1]), np.float32)
        self._logits = np.empty((1, 0, block.vocab_size), np.float32)
        self._bind_input("seqlens_k", self._last_key)
        self._bind_input("total_sequence_length", self._total)
        self._bind_input("num_logits", self._num_logits)
        names = ((block.past_key, block.present_key), (block.past_value, block.present_value))
        for i in range(block.layers):
            for (past, present), array in zip(names, self.buffer[i], strict=True):
                self._bind_input(past % i, array)
                self._bind_output(present % i, array)

    def truncate(self, length: int) -> None:
        """Forget the positions from `length` on.

        Raises:
            InputError: `length` is negative or more than is there.
        """
        if not 0 <= length <= self.length:
            raise InputError(f"cannot truncate to {length} positions: the cache has {self.length}")
        self.length = length

    def saved(self) -> Saved:
        """A copy of the positions filled, for `restore`."""
        return Saved(self.buffer[..., : self.length, :].copy(), self.hidden[: self.length].copy())

    def restore(self, saved: Saved) -> None:
        """Hold what another cache of this model held when it was `saved`; there must be room for it."""
        self.length = len(saved.hidden)
        self.buffer[..., : self.length, :] = saved.keys_values
        self.hidden[: self.length] = saved.hidden

    def stage(self, embeddings: Floats, num_logits: int) -> Floats:
        """Make `binding` ready to append `embeddings` (T, D); returns where the logits will be, (num_logits, V)."""
        tokens = len(embeddings)
        if tokens != self._embeddings.shape[1]:
            self._embeddings = np.empty((1, tokens, self._embeddings.shape[2]), np.float32)
            self._bind_input("inputs_embeds", self._embeddings)
            self._hidden = np.empty((1, tokens, self.hidden.shape[1]), np.float32)
            if self._hidden.size:
                self._bind_output("hidden", self._hidden)
        if num_logits != self._logits.shape[1]:
            self._logits = np.empty((1, num_logits, self._logits.shape[2]), np.float32)
            self._bind_output("logits", self._logits)
            self._num_logits[...] = num_logits
        self._embeddings[0] = embeddings
        self._total[...] = self.length + tokens
        self._last_key[0] = self.length + tokens - 1
        return self._logits.squeeze(0)

    def appended(self) -> None:
        """Count what `binding` has appended."""
        last = slice(self.length, self.length + self._hidden.shape[1])
        self.hidden[last] = self._hidden[0]
        self.length = last.stop

    def _bind_input(self, name: str, array: NDArray[Any]) -> None:
        self.binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))

    def _bind_output(self, name: str, array: NDArray[Any]) -> None:
        self.binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))


class Decoder:
    """The two graphs of a `DecoderBlock`; keeps no state between calls, that is what a `Cache` is for.

    Raises:
        BundleError: onnxruntime does not take a file, or the graph is not the one that `block` describes.
    """

    def __init__(
        self, folder: Path, block: DecoderBlock, *, threads: ThreadsLike = None, packed: Path | None = None
    ) -> None:
        self.block = block
        self._path = folder / block.file
        if lacking := missing_for_cache(block.kv):
            raise BundleError(f"{self._path}: its {lacking}, or export it with --kv fp32")
        self._embed_path = folder / block.embed_file
        self._session = open_session(self._path, threads=threads, packed=packed)
        self._embed_session = open_session(self._embed_path, threads=1)
        self._check_graph()

    def embed(self, ids: Sequence[int] | NDArray[np.int64]) -> Floats:
        """Look up token ids (T,); returns (T, D) float32.

        Raises:
            InputError: an id is outside the vocabulary.
        """
        array = np.asarray(ids, np.int64)
        if array.size and not 0 <= array.min() <= array.max() < self.block.vocab_size:
            raise InputError(f"token ids {array.min()} to {array.max()}: the vocabulary has {self.block.vocab_size}")
        with onnxruntime_errors(self._embed_path):
            found: Floats = self._embed_session.run(None, {"input_ids": array[None]})[0]
        return found.squeeze(0)

    def new_cache(self, capacity: int) -> Cache:
        """An empty cache for at most `capacity` positions.

        Raises:
            InputError: `capacity` is not in 1..max_positions.
        """
        if not 0 < capacity <= self.block.max_positions:
            raise InputError(f"a cache of {capacity} positions: the model takes 1 to {self.block.max_positions}")
        return Cache(self._session, self.block, capacity)

    def forward(self, cache: Cache, embeddings: Floats, num_logits: int = 1) -> Floats:
        """Append T positions to `cache`.

        Args:
            cache: made by this decoder's `new_cache`; unchanged if anything is raised.
            embeddings: (T, D) float32, T >= 1.
            num_logits: 1..T.

        Returns:
            (num_logits, V) float32: what follows each of the last `num_logits` positions.

        Raises:
            InputError: the cache has no room for T more, or a shape is wrong.
        """
        if embeddings.ndim != 2 or embeddings.shape[1] != self.block.width:
            raise InputError(f"embeddings of shape {embeddings.shape}: expected (T, {self.block.width})")
        tokens = len(embeddings)
        if not 1 <= num_logits <= tokens:
            raise InputError(f"{num_logits} logits of {tokens} positions: expected 1 to {tokens}")
        if cache.length + tokens > cache.capacity:
            raise InputError(f"{cache.length} + {tokens} positions: the cache has room for {cache.capacity}")
        logits = cache.stage(embeddings, num_logits)
        with onnxruntime_errors(self._path):
            self._session.run_with_iobinding(cache.binding)
        cache.appended()
        return logits.copy()

    def _check_graph(self) -> None:
        """Every buffer that is bound must be one the graph has, of its shape."""
        block = self.block
        buffer = [block.kv_heads, block.head_dim]
        expected = {"logits": [block.vocab_size], "inputs_embeds": [block.width]}
        for template in (block.past_key, block.past_value, block.present_key, block.present_value):
            expected |= {template % i: buffer for i in range(block.layers)}
        expected |= {"seqlens_k": [], "total_sequence_length": [], "num_logits": []}
        expected |= {"hidden": [block.width]} if block.hidden else {}
        check_shapes(self._session, expected, self._path)
        for value in (*self._session.get_inputs(), *self._session.get_outputs()):
            if expected[value.name] is buffer and value.type != GRAPH_DTYPES[block.kv]:
                raise BundleError(f"{self._path}: {value.name!r} is {value.type}, the manifest says {block.kv}")


def missing_for_cache(kv: CachePrecision) -> str:
    """What this onnxruntime lacks for a cache of that precision, with the remedy; "" where it lacks nothing."""
    if kv == "fp32" or tuple(int(part) for part in ort.__version__.split(".")[:2]) >= INT8_CACHE_SINCE:
        return ""
    wanted = ".".join(map(str, INT8_CACHE_SINCE))
    return f"int8 cache needs onnxruntime {wanted} or newer, this is {ort.__version__}; upgrade onnxruntime"
