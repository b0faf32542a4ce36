"""Answering from a bundle on the device."""

from __future__ import annotations

import time
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tinyalign_edge.bundle import Manifest, open_bundle
from tinyalign_edge.errors import DegradedWarning, InputError
from tinyalign_edge.image import ImageLike, open_image, preprocess
from tinyalign_edge.memory import Entry
from tinyalign_edge.prompt import Prompt, load_tokenizer
from tinyalign_edge.runtime.decoder import Cache, Decoder
from tinyalign_edge.runtime.memory import Memory, open_bank
from tinyalign_edge.runtime.sessions import check_shapes, onnxruntime_errors, open_session
from tinyalign_edge.runtime.values import ValueMaker

Float = npt.NDArray[np.float32]


@dataclass(frozen=True)
class EncodedImage:
    """A picture as the language model reads it, with the memories retrieved for it; ask it any number of questions."""

    visual_tokens: Float  # (N, D)
    key: Float | None  # (key_dim,), unit length; None where the bundle has no retrieval key
    memories: tuple[Entry, ...]
    memory_tokens: Float  # (M, D)
    timings_ms: dict[str, float]
    generation: int | None = None  # of the memory that was searched; None where it was not
    features: Float | None = None  # (N, C), which the memory's value encoder reads; None where there is none


@dataclass(frozen=True)
class Answer:
    """An answer. `tokens` counts generated tokens; `timings_ms` has `encode`, `retrieve`, `first_token`, `per_token`
    and `total`. `first_token` and `total` are counted from the call: from the image's bytes, unless it came encoded."""

    text: str
    tokens: int
    finish_reason: Literal["stop", "length"]
    memories: tuple[Entry, ...]
    timings_ms: dict[str, float] = field(default_factory=dict)


class AnswerStream:
    """Pieces of an answer's text as they come; `answer` holds the whole once they are used up. Iterate once."""

    def __init__(self, pieces: Generator[str, None, Answer]) -> None:
        self._pieces = pieces
        self.answer: Answer | None = None

    def __iter__(self) -> Iterator[str]:
        if self.answer is None:
            self.answer = yield from self._pieces

    def result(self) -> Answer:
        """The whole answer; takes what is left of the stream."""
        for _ in self:
            pass
        if self.answer is None:
            raise InputError("the stream was left before its end; ask again")
        return self.answer


def load(
    path: str | Path,
    *,
    threads: int | None = None,
    memory: bool = True,
    memory_dir: str | Path | None = None,
    expect_sha256: str | None = None,
) -> Model:
    """Open a bundle for answering.

    Args:
        path: the bundle folder.
        threads: of one operator; None leaves the number to onnxruntime (one a physical core).
        memory: False leaves the bank closed; the model then answers from the picture alone.
        memory_dir: a writable folder for the memory, used in place of the bundle's own; a new one begins as its copy.
        expect_sha256: hex SHA-256 that `bundle.json` must have, obtained from where the bundle comes from.

    Raises:
        InputError: `path` is not a bundle.
        BundleError: damaged, hostile, too new, or not the one expected.

    Warns:
        DegradedWarning: the bundle failed the exporter's comparison with torch.
    """
    manifest = open_bundle(path, expect_sha256=expect_sha256)
    if manifest.gate is not None and not manifest.gate.passed:
        failures = "; ".join(manifest.gate.failures).encode("unicode_escape").decode("ascii")[:400]  # from a file
        warnings.warn(f"{path}: degraded, it does not compute what torch computes: {failures}", DegradedWarning, 2)
    return Model(Path(path), manifest, threads=threads, memory=memory, memory_dir=memory_dir)


class Model:
    """An open bundle. Use `load`; a context manager, safe to use from several threads."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        threads: int | None = None,
        memory: bool = True,
        memory_dir: str | Path | None = None,
    ) -> None:
        self.folder, self.manifest = folder, manifest
        self.prompt = Prompt(manifest.prompt, load_tokenizer(folder / manifest.tokenizer_file))
        self._vision: Any = open_session(folder / manifest.vision.file, threads=threads)
        image, vision = manifest.image, manifest.vision
        shapes = {
            "pixel_values": [3, image.height, image.width],
            "visual_tokens": [vision.visual_tokens, manifest.decoder.width],
        }
        shapes |= {"key": [vision.key_dim]} if vision.key_dim else {}
        shapes |= {"features": [vision.visual_tokens, vision.feature_dim]} if vision.feature_dim else {}
        check_shapes(self._vision, shapes, folder / vision.file)
        self._decoder: Any = Decoder(folder, manifest.decoder, threads=threads)
        self._connector: Any = None
        self.values: Any = ValueMaker(folder, manifest, self.prompt, self._decoder.embed)
        self.closed = False
        self.memory: Memory | None = None
        if memory and (manifest.memory.kind != "none" or memory_dir is not None):
            bank = open_bank(folder, manifest, memory_dir)
            self.memory = Memory(bank, manifest.memory, self.values, self._encoded)
            self._open_connector()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Free weights and maps; using the model afterwards is an InputError."""
        self.closed = True
        self._vision = self._decoder = self._connector = self.values = self.memory = None

    @property
    def decoder(self) -> Decoder:
        """The language model by itself."""
        decoder: Decoder = self._decoder
        return decoder

    def encode(self, image: ImageLike, *, memories: Sequence[Entry] | None = None) -> EncodedImage:
        """Encode a picture and retrieve its memories.

        Args:
            image: a path, bytes of an image file, a PIL picture, or an array (height, width, 3) uint8.
            memories: entries to read instead of searching the bank; `()` for none.

        Raises:
            InputError: not a picture, damaged or too large.
        """
        self._check_open()
        started = time.perf_counter()
        pixels = preprocess(open_image(image), self.manifest.image)
        with onnxruntime_errors(self.folder / self.manifest.vision.file):
            outputs = self._vision.run(list(self.manifest.vision.outputs), {"pixel_values": pixels})
        encoded = time.perf_counter()
        seen = dict(zip(self.manifest.vision.outputs, (output[0] for output in outputs), strict=True))
        key = seen.get("key")
        generation, found = None, tuple(memories or ())
        if memories is None and key is not None and self.memory is not None:
            generation, found = self.memory.generation, self.memory.nearest(key)
        if len(found) > self.manifest.memory.k:
            raise InputError(f"{len(found)} memories: the model reads at most {self.manifest.memory.k}")
        tokens = self.memory_tokens(found)
        timings = {"encode": _ms(started, encoded), "retrieve": _ms(encoded, time.perf_counter())}
        return EncodedImage(seen["visual_tokens"], key, found, tokens, timings, generation, seen.get("features"))

    def ask(self, image: ImageLike | EncodedImage, question: str, *, max_new_tokens: int | None = None) -> Answer:
        """Answer a question about a picture, greedily.

        Raises:
            InputError: the picture cannot be read, the question is empty or does not fit the context.
        """
        return self.stream(image, question, max_new_tokens=max_new_tokens).result()

    def stream(
        self, image: ImageLike | EncodedImage, question: str, *, max_new_tokens: int | None = None
    ) -> AnswerStream:
        """Like `ask`, piece by piece: iterate over the text, then read `.answer`."""
        limit = self.manifest.generation.max_new_tokens if max_new_tokens is None else max_new_tokens
        if limit < 1:
            raise InputError(f"max_new_tokens {limit}: must be at least 1")
        return AnswerStream(self._pieces(image, question, limit))

    def answer_logits(self, image: EncodedImage, question: str, answer: str) -> tuple[Float, npt.NDArray[np.int64]]:
        """What the model expects in place of each token of a given answer.

        Returns:
            logits (A, V) float32 and the answer's token ids (A,), the end-of-answer token included.
        """
        embeddings, ids = self.answer_embeddings(image, question, answer)
        cache = self._decoder.new_cache(len(embeddings))
        return self._decoder.forward(cache, embeddings, num_logits=len(ids)), ids

    def answer_embeddings(self, image: EncodedImage, question: str, answer: str) -> tuple[Float, npt.NDArray[np.int64]]:
        """What `answer_logits` gives to the language model, (T, D) float32, and the answer's token ids (A,)."""
        ids = np.array(self.prompt.answer(question, answer), np.int64)
        embeddings = np.concatenate([self._prefix(self._renewed(image), question), self._decoder.embed(ids[:-1])])
        self._fit(len(embeddings))
        return embeddings, ids

    def answer_nll(self, image: EncodedImage, question: str, answer: str) -> Float:
        """Negative log-likelihood of each token of a given answer (A,), in nats."""
        logits, ids = self.answer_logits(image, question, answer)
        peak = logits.max(axis=1, keepdims=True)
        log_total = np.log(np.exp(logits - peak).sum(axis=1)) + peak[:, 0]
        return np.asarray(log_total - logits[np.arange(len(ids)), ids], np.float32)

    def _pieces(self, image: ImageLike | EncodedImage, question: str, limit: int) -> Generator[str, None, Answer]:
        started = time.perf_counter()
        self.prompt.question(question)  # refuse an empty question before the work on the picture
        encoded = self._renewed(image) if isinstance(image, EncodedImage) else self.encode(image)
        prefix = self._prefix(encoded, question)
        limit = min(limit, self._fit(len(prefix) + 1) - len(prefix))
        cache = self._decoder.new_cache(len(prefix) + limit)
        token = int(self._decoder.forward(cache, prefix).argmax())
        first = time.perf_counter()
        decode, ids, text, decoding_ms = self.prompt.stream(), list[int](), "", 0.0
        while token not in self.manifest.prompt.eos_token_ids:
            ids.append(token)
            piece = decode.step(self.prompt.tokenizer, token) or ""
            piece = piece if text else piece.lstrip()
            text += piece
            if piece:
                yield piece
            if len(ids) == limit:
                break
            before = time.perf_counter()
            token = self._next(cache, token)
            decoding_ms += _ms(before, time.perf_counter())
        stop = token in self.manifest.prompt.eos_token_ids
        timings = dict(encoded.timings_ms)
        timings["first_token"] = _ms(started, first)
        timings["per_token"] = decoding_ms / max(1, cache.length - len(prefix))
        timings["total"] = _ms(started, time.perf_counter())
        return Answer(text, len(ids), "stop" if stop else "length", encoded.memories, timings)

    def _check_open(self) -> None:
        if self.closed:
            raise InputError(f"{self.folder}: the model was closed; load it again")

    def _next(self, cache: Cache, token: int) -> int:
        return int(self._decoder.forward(cache, self._decoder.embed([token])).argmax())

    def _prefix(self, image: EncodedImage, question: str) -> Float:
        """Everything before the answer, as embeddings (T, D)."""
        self._check_open()
        ids = self.prompt.question(question)
        embedded = self._decoder.embed([*ids.before, *ids.after])
        before, after = np.split(embedded, [len(ids.before)])
        return np.concatenate([before, image.visual_tokens, image.memory_tokens, after])

    def _fit(self, positions: int) -> int:
        """The context's size, if `positions` fit into it."""
        size = self.manifest.prompt.max_context_tokens
        if positions > size:
            raise InputError(
                f"picture, memories and question take {positions} tokens, the context has {size}; ask less"
            )
        return size

    def _encoded(self, image: ImageLike | EncodedImage) -> EncodedImage:
        return image if isinstance(image, EncodedImage) else self.encode(image, memories=())

    def _renewed(self, image: EncodedImage) -> EncodedImage:
        """`image` with its memories retrieved again, if the memory has changed since."""
        memory = self.memory
        if memory is None or image.key is None or image.generation in (None, memory.generation):
            return image
        generation = memory.generation
        found = memory.nearest(image.key)
        return replace(image, memories=found, memory_tokens=self.memory_tokens(found), generation=generation)

    def memory_tokens(self, entries: Sequence[Entry]) -> Float:
        """Memory tokens (M, D) of retrieved entries."""
        if not sum(len(entry.value) for entry in entries) or self._connector is None:
            return np.zeros((0, self.manifest.decoder.width), np.float32)
        return self.connect(self.memory_inputs(entries))

    def connect(self, inputs: Mapping[str, npt.NDArray[Any]]) -> Float:
        """Memory tokens (M, D) of the inputs that `memory_inputs` gives."""
        with onnxruntime_errors(self.folder / str(self.manifest.memory.file)):
            out: Float = self._connector.run(["memory_tokens"], dict(inputs))[0]
        return out

    def memory_inputs(self, entries: Sequence[Entry]) -> dict[str, npt.NDArray[Any]]:
        """What the memory's graph reads of retrieved entries, as `MemoryBlock` says."""
        lengths = [len(entry.value) for entry in entries]
        values = np.concatenate([entry.value for entry in entries])
        if self.manifest.memory.kind == "tokens":
            values = self._decoder.embed(values)
        return {
            "values": values,
            "rank": np.repeat(np.arange(len(entries), dtype=np.int64), lengths),
            "similarity": np.repeat(np.array([e.similarity for e in entries], np.float32), lengths),
        }

    def _open_connector(self) -> None:
        settings = self.manifest.memory
        self._connector = open_session(self.folder / str(settings.file), threads=1)
        value_dim = settings.latent_dim if settings.kind == "latents" else self.manifest.decoder.width
        shapes = {"values": [value_dim], "rank": [], "similarity": [], "memory_tokens": [self.manifest.decoder.width]}
        check_shapes(self._connector, shapes, self.folder / str(settings.file))


def _ms(start: float, end: float) -> float:
    return (end - start) * 1000
