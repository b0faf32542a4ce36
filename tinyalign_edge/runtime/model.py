"""An open bundle: what an app holds."""

from __future__ import annotations

import os
import threading
import time
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyalign_edge.bundle import Manifest, open_bundle
from tinyalign_edge.errors import DegradedWarning, InputError
from tinyalign_edge.files import file_sha256
from tinyalign_edge.image import ImageLike
from tinyalign_edge.memory import Entry
from tinyalign_edge.prompt import Prompt, Said, load_tokenizer
from tinyalign_edge.runtime.answer import Answer, AnswerStream, AsyncAnswerStream, Pieces
from tinyalign_edge.runtime.answering import Answering, Asked, answer_nll
from tinyalign_edge.runtime.conversation import Conversation
from tinyalign_edge.runtime.copying import Copying
from tinyalign_edge.runtime.decoder import Decoder
from tinyalign_edge.runtime.keys import KeyMaker
from tinyalign_edge.runtime.memory import Memory, open_bank
from tinyalign_edge.runtime.options import Generation, with_changes
from tinyalign_edge.runtime.packed import packed_graphs
from tinyalign_edge.runtime.recall import Recall
from tinyalign_edge.runtime.sessions import ThreadsLike
from tinyalign_edge.runtime.sight import EncodedImage, Sight
from tinyalign_edge.runtime.values import ValueMaker

Float = npt.NDArray[np.float32]

CACHE_MB = 64
PICTURES = 8  # one byte of the cache in so many is for visual tokens, the others for keys and values


def load(
    path: str | Path,
    *,
    threads: ThreadsLike = None,
    memory: bool = True,
    memory_dir: str | Path | None = None,
    expect_sha256: str | None = None,
    cache_mb: float = CACHE_MB,
    packed_dir: str | Path | None = None,
) -> Model:
    """Open a bundle for answering.

    Args:
        path: the bundle folder.
        threads: of one operator; None leaves the number to onnxruntime (one a physical core). "phone", "board" and
            "server" are settings that spare battery and heat or do not; `Threads` has all of them.
        memory: False leaves the bank closed; the model then answers from the picture alone.
        memory_dir: a writable folder for the memory, used in place of the bundle's own; a new one begins as its copy.
        expect_sha256: hex SHA-256 that `bundle.json` must have, obtained from where the bundle comes from.
        cache_mb: 10^6 bytes for what was read of the last pictures, so that the next question about one begins
            after it; 0: nothing is kept.
        packed_dir: a folder of this device that keeps the weights as its processor reads them, about twice their size.
            The first load makes them, which takes longer; later ones are faster, and processes that load the same
            bundle share its weights in memory. See `tinyalign_edge.runtime.packed`.

    Raises:
        InputError: `path` is not a bundle, or an option is out of bounds.
        BundleError: damaged, hostile, too new, or not the one expected.
        TinyAlignError: `packed_dir` cannot be written, or the disk is full.

    Warns:
        DegradedWarning: the bundle failed the exporter's comparison with torch.
    """
    manifest = open_bundle(path, expect_sha256=expect_sha256)
    if manifest.gate is not None and not manifest.gate.passed:
        failures = "; ".join(manifest.gate.failures).encode("unicode_escape").decode("ascii")[:400]  # from a file
        warnings.warn(f"{path}: degraded, it does not compute what torch computes: {failures}", DegradedWarning, 2)
    return Model(
        Path(path),
        manifest,
        threads=threads,
        memory=memory,
        memory_dir=memory_dir,
        cache_mb=cache_mb,
        packed_dir=packed_dir,
    )


class Model:
    """An open bundle. Use `load`; a context manager, safe to use from several threads.

    A process that was forked off cannot use it: onnxruntime's threads stay behind.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        threads: ThreadsLike = None,
        memory: bool = True,
        memory_dir: str | Path | None = None,
        cache_mb: float = CACHE_MB,
        packed_dir: str | Path | None = None,
    ) -> None:
        if not 0 <= cache_mb <= 1e6:
            raise InputError(f"cache_mb {cache_mb}: must be 0 to 1000000")
        self.folder, self.manifest = folder, manifest
        self.prompt = Prompt(manifest.prompt, load_tokenizer(folder / manifest.tokenizer_file))
        cache_bytes = int(cache_mb * 1e6)
        vision, decoder = packed_graphs(folder, manifest, Path(packed_dir)) if packed_dir is not None else (None, None)
        seen_bytes = cache_bytes // PICTURES
        self._sight: Any = Sight(folder, manifest, threads=threads, cache_bytes=seen_bytes, packed=vision)
        self._decoder: Any = Decoder(folder, manifest.decoder, threads=threads, packed=decoder)
        self.values: Any = ValueMaker(folder, manifest, self.prompt, self._decoder.embed)
        self.keys: Any = KeyMaker(folder, manifest, self.prompt, self._decoder.embed)
        kept = cache_bytes - seen_bytes
        self._copying: Any = Copying(folder, manifest) if manifest.memory.copy_file else None
        self._answering: Any = Answering(self.prompt, self._decoder, manifest, cache_bytes=kept, copying=self._copying)
        self._recall: Any = None
        self._listing = threading.Lock()
        self._conversations: weakref.WeakSet[Conversation] = weakref.WeakSet()
        self._process, self.closed = os.getpid(), False
        vision_file = manifest.vision.file
        listed = manifest.files.get(vision_file)  # not yet, while the exporter makes it
        self._encoder = listed.sha256 if listed else file_sha256(folder / vision_file)
        self.memory: Memory | None = None
        if memory and (manifest.memory.kind != "none" or memory_dir is not None):
            bank = open_bank(folder, manifest, memory_dir)
            self.memory = Memory(bank, manifest.memory, self.values, self.keys, self._encoded)
            bank.on_loss = self._forget_read
            self._recall = Recall(folder, manifest, self._decoder)

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Free weights and maps; using the model afterwards is an InputError."""
        self.closed = True
        self._sight = self._decoder = self._answering = self.values = self._recall = self.memory = None
        self._copying = self.keys = None
        self._forget_read()

    def clear_cache(self) -> None:
        """Let go of the pictures and prefixes that were kept for later questions, as when the system is short of
        memory; conversations keep what they have read.

        Raises:
            InputError: the model was closed.
        """
        self._check_open()
        self._sight.clear_cache()
        self._answering.prefixes.drop(lambda _: True)

    @property
    def decoder(self) -> Decoder:
        """The language model by itself."""
        decoder: Decoder = self._decoder
        return decoder

    def encode(self, image: ImageLike, *, memories: Sequence[Entry] | None = None, question: str = "") -> EncodedImage:
        """Encode a picture and retrieve its memories. A picture seen lately, by its content, is not encoded again.

        Where memories are found by what is asked, too, they are retrieved as soon as a question is known.

        Args:
            image: a path, bytes of an image file, a PIL picture, or an array (height, width, 3) uint8.
            memories: entries to read instead of searching the bank; `()` for none.
            question: what will be asked, if it is known.

        Raises:
            InputError: not a picture, damaged or too large.
        """
        self._check_open()
        memory = self.memory  # another thread may close the model meanwhile
        timings: dict[str, float] = {}
        seen = self._sight.see(image, timings)
        started = time.perf_counter()
        searched, found = None, tuple(memories or ())
        if memories is None and seen.key is not None and memory is not None:
            searched, found = memory.searched(question), memory.recall(seen.key, question)
        if len(found) > self.manifest.memory.k:
            raise InputError(f"{len(found)} memories: the model reads at most {self.manifest.memory.k}")
        tokens = self.memory_tokens(found)
        timings["retrieve"] = (time.perf_counter() - started) * 1000
        self._check_open()
        made = seen.visual_tokens, seen.key, found, tokens, timings, searched, seen.features
        return EncodedImage(*made, memory_first=self.manifest.memory.first, encoder=self._encoder)

    def ask(
        self, image: ImageLike | EncodedImage, question: str, options: Generation | None = None, **changes: Any
    ) -> Answer:
        """Answer a question about a picture.

        Args:
            image: as `encode` takes it, or encoded.
            question: what to ask.
            options: how to answer; None: greedily, as `Generation` says.
            changes: fields of `Generation` that differ from `options`.

        Raises:
            InputError: the picture cannot be read, the question is empty or does not fit the context, or an option is
                unknown or out of bounds.
            MissingExtraError: the option needs an extra that is not installed.
        """
        return self.stream(image, question, options, **changes).result()

    def stream(
        self, image: ImageLike | EncodedImage, question: str, options: Generation | None = None, **changes: Any
    ) -> AnswerStream:
        """Like `ask`, piece by piece: iterate over the text, then read `.answer`."""
        given = with_changes(options, changes)
        return AnswerStream(lambda cancelled: self._pieces(image, question, given, cancelled))

    async def aask(
        self, image: ImageLike | EncodedImage, question: str, options: Generation | None = None, **changes: Any
    ) -> Answer:
        """`ask` for asyncio: the loop goes on meanwhile; cancelling the task ends the answer."""
        return await self.astream(image, question, options, **changes).result()

    def astream(
        self, image: ImageLike | EncodedImage, question: str, options: Generation | None = None, **changes: Any
    ) -> AsyncAnswerStream:
        """`stream` for asyncio: iterate with `async for`."""
        return AsyncAnswerStream(self.stream(image, question, options, **changes))

    def chat(self) -> Conversation:
        """A new conversation."""
        self._check_open()
        conversation = Conversation(self)
        with self._listing:
            self._conversations.add(conversation)
        return conversation

    def answer_logits(self, image: EncodedImage, question: str, answer: str) -> tuple[Float, npt.NDArray[np.int64]]:
        """What the model expects in place of each token of a given answer, all read in one pass.

        Returns:
            logits (A, V) float32 and the answer's token ids (A,), the end-of-answer token included.
        """
        image = self.renewed(image, question)
        embeddings, ids = self.answer_embeddings(image, question, answer)
        cache = self._decoder.new_cache(len(embeddings))
        logits = self._decoder.forward(cache, embeddings, num_logits=len(ids))
        if self._copying is not None:
            asked = self.prompt.question(question)
            texts = self._copying.texts([(len(asked.before), image)])
            logits = self._copying.mix(logits, cache.hidden, [asked.after[-1], *ids[:-1]], texts)
        return logits, ids

    def answer_embeddings(self, image: EncodedImage, question: str, answer: str) -> tuple[Float, npt.NDArray[np.int64]]:
        """What `answer_logits` gives to the language model, (T, D) float32, and the answer's token ids (A,)."""
        self._check_open()
        ids = np.array(self.prompt.answer(question, answer), np.int64)
        asked = self.prompt.question(question)
        before, after = np.split(self._decoder.embed([*asked.before, *asked.after, *ids[:-1]]), [len(asked.before)])
        embeddings = np.concatenate([before, self.renewed(image, question).tokens, after])
        if len(embeddings) > self.manifest.prompt.max_context_tokens:
            raise InputError(
                f"picture, memories, question and answer take {len(embeddings)} tokens, the context has "
                f"{self.manifest.prompt.max_context_tokens}; ask less"
            )
        return embeddings, ids

    def answer_nll(self, image: EncodedImage, question: str, answer: str) -> Float:
        """Negative log-likelihood of each token of a given answer (A,), in nats."""
        return answer_nll(*self.answer_logits(image, question, answer))

    def memory_tokens(self, entries: Sequence[Entry]) -> Float:
        """Memory tokens (M, D) of retrieved entries."""
        if not sum(len(entry.value) for entry in entries) or self._recall is None:
            return np.zeros((0, self.manifest.decoder.width), np.float32)
        return self.connect(self.memory_inputs(entries))

    def connect(self, inputs: Mapping[str, npt.NDArray[Any]]) -> Float:
        """Memory tokens (M, D) of the inputs that `memory_inputs` gives."""
        tokens: Float = self._recall.tokens(inputs)
        return tokens

    def memory_inputs(self, entries: Sequence[Entry]) -> dict[str, npt.NDArray[Any]]:
        """What the memory's graph reads of retrieved entries, as `MemoryBlock` says."""
        inputs: dict[str, npt.NDArray[Any]] = self._recall.inputs(entries)
        return inputs

    def renewed(self, image: EncodedImage, question: str) -> EncodedImage:
        """`image` with its memories retrieved again, if the memory has changed since, or is another one, or if they are
        found by the question, and that is another one.

        Raises:
            InputError: another model has encoded it.
        """
        self._check_encoder(image)
        memory = self.memory
        if memory is None or image.key is None or image.searched in (None, memory.searched(question)):
            return image
        started = time.perf_counter()
        searched, found = memory.searched(question), memory.recall(image.key, question)
        tokens = self.memory_tokens(found)
        timings = {**image.timings_ms, "retrieve": (time.perf_counter() - started) * 1000}
        return replace(image, memories=found, memory_tokens=tokens, searched=searched, timings_ms=timings)

    @contextmanager
    def reading(self) -> Iterator[Answering]:
        """The language model with its prompt; what it reads is let go of if the memory changes meanwhile.

        Raises:
            InputError: the model was closed, or loaded by the process that forked this one off.
        """
        self._check_open()
        memory, answering = self.memory, self._answering
        before = memory.generation if memory else None
        try:
            yield answering
        finally:
            if self.closed or (memory and memory.generation != before):
                self._forget_read()

    def _pieces(
        self,
        image: ImageLike | EncodedImage,
        question: str,
        options: Generation,
        cancelled: threading.Event,
    ) -> Pieces:
        started = time.perf_counter()
        self.prompt.question(question)  # refuse an empty question before the work on the picture
        with self.reading() as answering:
            encoded = image if isinstance(image, EncodedImage) else self.encode(image, question=question)
            encoded = self.renewed(encoded, question)
            asked = Asked([Said(question)], [encoded], started, encoded.timings_ms)
            return (yield from answering.pieces(asked, options, answering.context(), cancelled))

    def _check_open(self) -> None:
        if self.closed:
            raise InputError(f"{self.folder}: the model was closed; load it again")
        if os.getpid() != self._process:
            raise InputError(f"{self.folder}: the model was loaded before this process was forked; load it in here")

    def _encoded(self, image: ImageLike | EncodedImage) -> EncodedImage:
        self._check_open()
        if isinstance(image, EncodedImage):
            self._check_encoder(image)
            return image
        return self.encode(image, memories=())

    def _check_encoder(self, image: EncodedImage) -> None:
        if image.encoder not in ("", self._encoder):
            raise InputError("image: it was encoded by another model; encode it with this one")

    def _forget_read(self) -> None:
        """Let go of what was read: the memories in it may be forgotten now, or the model is closed."""
        if self._answering is not None:
            self._answering.prefixes.drop(lambda prefix: prefix.remembered)
        with self._listing:
            conversations = list(self._conversations)
        for conversation in conversations:
            conversation.forget_read()
