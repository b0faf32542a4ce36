"""From a prompt to an answer, whoever asks: a single question or a turn of a conversation."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyalign_edge.bundle import Manifest
from tinyalign_edge.errors import InputError
from tinyalign_edge.memory import Entry
from tinyalign_edge.prompt import Prompt, Said
from tinyalign_edge.runtime.answer import Answer, FinishReason, Pieces
from tinyalign_edge.runtime.constraint import Constraints
from tinyalign_edge.runtime.context import Context, Float, Prefix, Span, picture_span, text_span
from tinyalign_edge.runtime.copying import Copying
from tinyalign_edge.runtime.decode import Decoding
from tinyalign_edge.runtime.decoder import Decoder
from tinyalign_edge.runtime.drafts import Drafts, Pace
from tinyalign_edge.runtime.lru import Lru
from tinyalign_edge.runtime.options import Generation
from tinyalign_edge.runtime.picker import Picker
from tinyalign_edge.runtime.sight import EncodedImage
from tinyalign_edge.runtime.text import Text

STAGES = ("decode_image", "preprocess", "encode", "retrieve", "prefill")


@dataclass(frozen=True)
class Asked:
    """What is to be answered.

    Attributes:
        turns: the last one awaits its answer.
        images: of all turns, in order.
        started: `time.perf_counter()` at the call.
        timings_ms: of the stages before this one.
    """

    turns: Sequence[Said]
    images: Sequence[EncodedImage]
    started: float
    timings_ms: dict[str, float] = field(default_factory=dict)

    @property
    def memories(self) -> tuple[Entry, ...]:
        """What the memory said of the pictures."""
        return tuple(entry for image in self.images for entry in image.memories)


@dataclass(frozen=True)
class Patience:
    """What may end an answer before its own end: whoever asked, or the time (`time.perf_counter()`) it is due at."""

    cancelled: threading.Event
    due: float

    def over(self) -> FinishReason | None:
        """Why to end it now; None: go on."""
        return "cancelled" if self.cancelled.is_set() else "timeout" if time.perf_counter() > self.due else None


class Answering:
    """The language model of an open bundle with its prompt; keeps no state but the prefixes.

    Args:
        prompt: of the bundle.
        decoder: of the bundle.
        manifest: of the bundle.
        cache_bytes: for the keys and values of what stands before a question.
        copying: of the bundle, if it has a copy term.
    """

    def __init__(
        self, prompt: Prompt, decoder: Decoder, manifest: Manifest, *, cache_bytes: int, copying: Copying | None = None
    ) -> None:
        self._prompt, self._decoder, self._copying = prompt, decoder, copying
        self._ends = frozenset(manifest.prompt.eos_token_ids)
        self._default_limit = manifest.generation.max_new_tokens
        self._exact = manifest.decoder.precision != "int8"  # see `Decoding`
        self._constraints = Constraints(prompt.tokenizer, manifest.decoder.vocab_size, manifest.prompt.eos_token_ids)
        self.size = manifest.prompt.max_context_tokens
        self._pace = Pace()
        self.prefixes: Lru[Prefix] = Lru(cache_bytes)

    def context(self) -> Context:
        """Where a conversation is read; empty."""
        return Context(self._decoder, self.prefixes, self._copying)

    def spans(self, turns: Sequence[Said], images: Sequence[EncodedImage]) -> list[Span]:
        """What the language model reads of turns with the pictures that they count.

        Raises:
            InputError: a question is empty, or a picture was encoded by another model.
        """
        width = self._decoder.block.width
        for image in images:
            if image.tokens.shape[1:] != (width,):
                raise InputError(
                    f"image: encoded to tokens of width {image.tokens.shape[-1]}, this model reads {width}; encode it "
                    "with this model"
                )
        first, *rest = map(text_span, self._prompt.conversation(turns))
        pictures = map(picture_span, images)
        return [first, *(span for pair in zip(pictures, rest, strict=True) for span in pair)]

    def limit(self, spans: Sequence[Span], options: Generation) -> int:
        """How many tokens an answer may have.

        Raises:
            InputError: the prompt does not fit into the context.
        """
        room = self.size - sum(map(len, spans))
        if room < 1:
            raise InputError(
                f"picture, memories and question take {self.size - room} tokens, the context has {self.size}; ask less"
            )
        return min(room, self.wanted(options))

    def wanted(self, options: Generation) -> int:
        """How many tokens an answer would have at most, were there room."""
        return self._default_limit if options.max_new_tokens is None else options.max_new_tokens

    def pieces(self, asked: Asked, options: Generation, context: Context, cancelled: threading.Event) -> Pieces:
        """Read the prompt into `context` and answer it, piece by piece."""
        spans = self.spans(asked.turns, asked.images)
        limit, length = self.limit(spans, options), sum(map(len, spans))
        picker = Picker(options, (*options.processors, *self._constraints.of(options)))  # errors before the work
        patience = Patience(cancelled, np.inf if options.timeout_s is None else asked.started + options.timeout_s)
        timings = dict.fromkeys(STAGES, 0.0) | asked.timings_ms
        if reason := patience.over():
            spent = dict.fromkeys(("first_token", "total"), _ms(asked.started))
            timings |= {"per_token": 0.0} | spent
            return Answer("", 0, reason, asked.memories, timings, prompt_tokens=length)
        before = time.perf_counter()
        logits = context.read(spans, room=limit)
        kept = context.kept
        timings["prefill"] = _ms(before)
        if options.choices:
            answer = self._choose(asked, options.choices, logits, context, patience)
            timings |= {"first_token": _ms(asked.started), "per_token": 0.0}
            if answer.text:
                yield answer.text
            return replace(
                answer, timings_ms=timings | {"total": _ms(asked.started)}, prompt_tokens=length, cached_tokens=kept
            )
        decoding = Decoding(
            context,
            logits,
            picker,
            ends=self._ends,
            limit=limit,
            drafts=self._drafts(asked, spans[-1], options),
            exact=self._exact,
        )
        text = Text(self._prompt, options.stop)
        try:
            for token in decoding:
                timings.setdefault("first_token", _ms(asked.started))
                if piece := text.push(token):
                    yield piece
                if reason := "stop" if text.stopped else patience.over():
                    break
            if piece := text.end():
                yield piece
        finally:
            if not self._exact:
                context.truncate(length)  # the next turn reads the answer in one pass, however it was decoded
        timings.setdefault("first_token", _ms(asked.started))
        timings["per_token"] = decoding.decoding_ms / max(1, len(decoding.ids) - 1 + decoding.ended)
        timings["total"] = _ms(asked.started)
        reason = reason or ("stop" if decoding.ended else "length")
        return Answer(
            text.shown,
            len(decoding.ids),
            reason,
            asked.memories,
            timings,
            decoding.passes,
            prompt_tokens=length,
            cached_tokens=kept,
        )

    def _choose(
        self, asked: Asked, choices: Sequence[str], logits: Float, context: Context, patience: Patience
    ) -> Answer:
        """The likeliest of `choices`, each read after the prompt and forgotten again; none unless all were read."""
        length, question = len(context), asked.turns[-1].question
        found = list[tuple[float, int]]()
        for choice in choices:
            if reason := patience.over():
                return Answer("", 0, reason, asked.memories, passes=len(found))
            ids = self._prompt.answer(question, choice)
            rows = logits[None]
            if len(ids) > 1:
                if length + len(ids) > self.size:
                    raise InputError(f"choice {choice!r:.80}: {len(ids)} tokens do not fit into the context")
                rows = np.concatenate([rows, context.append(ids[:-1], len(ids) - 1)])
                context.truncate(length)
            found.append((float(-answer_nll(rows, ids).mean()), len(ids) - 1))
        likelihoods = tuple(likelihood for likelihood, _ in found)
        best = int(np.argmax(likelihoods))
        text, tokens = choices[best].strip(), found[best][1]
        return Answer(text, tokens, "stop", asked.memories, passes=len(choices), likelihoods=likelihoods)

    def _drafts(self, asked: Asked, question: Span, options: Generation) -> Drafts | None:
        repeatable = self._exact or options.temperature == 0 or options.seed is None
        if not (options.drafts and repeatable):
            return None
        texts = (text for entry in asked.memories for text in (entry.text, f" {entry.text}"))
        ids: Any = question.names
        return Drafts([self._prompt.closed(text) for text in texts], ids, self._pace)


def answer_nll(logits: Float, ids: Sequence[int] | npt.NDArray[np.int64]) -> Float:
    """Negative log-likelihood of each of `ids` (A,) under `logits` (A, V), in nats."""
    peak = logits.max(axis=1, keepdims=True)
    log_total = np.log(np.exp(logits - peak).sum(axis=1)) + peak[:, 0]
    return np.asarray(log_total - logits[np.arange(len(ids)), np.asarray(ids)], np.float32)


def _ms(started: float) -> float:
    return (time.perf_counter() - started) * 1000
