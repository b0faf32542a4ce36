"""One bundle with one number of threads, in a process of its own: checked, then timed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tinyalign_edge.bundle import open_bundle
from tinyalign_edge.errors import GateError, InputError
from tinyalign_edge.latency.energy import find_meter
from tinyalign_edge.latency.process import peak_bytes, resident_bytes
from tinyalign_edge.latency.rows import ENERGY, Row, Unit
from tinyalign_edge.latency.work import Float, Work, never_ending, picture, prompt_length, question_of, reshaped
from tinyalign_edge.runtime.answer import Answer
from tinyalign_edge.runtime.decode import Decoding
from tinyalign_edge.runtime.memory import Memory, open_bank
from tinyalign_edge.runtime.model import Model
from tinyalign_edge.runtime.options import Generation
from tinyalign_edge.runtime.picker import Picker
from tinyalign_edge.runtime.probe import MIN_COSINE, run_probe
from tinyalign_edge.runtime.sight import EncodedImage

CHUNK = 256  # tokens of a pass that fills a context
Samples = dict[str, list[float]]


@dataclass(frozen=True)
class Setting:
    """What one process measures."""

    folder: str
    label: str
    memory: bool
    threads: int

    def row(self, stage: str, unit: Unit, samples: Sequence[float], context: int | None = None) -> Row:
        """A row about this setting."""
        return Row(self.label, self.memory, self.threads, stage, unit, tuple(samples), context)


@dataclass(frozen=True)
class Facts:
    """What the work became in a bundle: tokens that the language model reads, and the ids that it answers."""

    visual_tokens: int
    memory_tokens: int
    prompt_tokens: int
    answer: tuple[int, ...]  # as `_Asking.ids`


def check(setting: Setting, work: Work) -> Facts:
    """Open the bundle, compare what it computes with what it has on record, and see that the work fits.

    Raises:
        InputError: not a bundle, or the work does not fit into its context.
        BundleError: damaged.
        GateError: this machine computes something else, or an answer changes with what was kept.
    """
    with _opened(setting) as (model, _):
        if model.memory is not None:
            model.memory.bank.verify()
        probe = run_probe(model)
        if not probe.passed:
            raise GateError(
                f"{setting.folder}: with {setting.threads} threads this machine does not compute what the exporter "
                f"saw ({probe}, must be {MIN_COSINE}); nothing was timed: see 'tinyalign-edge verify'"
            )
        asking = _Asking(model, work)
        image = reshaped(model.encode(asking.data, question=asking.question), work.visual_tokens)
        tokens = len(image.tokens) + asking.prompt_tokens
        room = model.manifest.prompt.max_context_tokens
        if tokens + work.new_tokens > room:
            raise InputError(
                f"{setting.folder}: picture, memories and question take {tokens} tokens and the answer "
                f"{work.new_tokens}, the context has {room}; ask for fewer --new-tokens, --prompt-tokens or "
                "--visual-tokens"
            )
        if work.contexts and max(work.contexts) + work.new_tokens > room:
            raise InputError(
                f"{setting.folder}: --context {max(work.contexts)} and {work.new_tokens} new tokens, the context has "
                f"{room}; ask for a shorter one"
            )
        if not np.all(np.isfinite(image.tokens)):
            raise GateError(
                f"{setting.folder}: picture or memories become numbers that are not finite; nothing was timed"
            )
        asking.ask(image, work.new_tokens)
        first = asking.ids
        asking.ask(image, work.new_tokens)
        if first != asking.ids:
            raise GateError(f"{setting.folder}: another answer comes when the same is asked again; nothing was timed")
        return Facts(len(image.visual_tokens), len(image.memory_tokens), asking.prompt_tokens, first)


def measure(
    setting: Setting,
    work: Work,
    *,
    expected: Sequence[int],
    repetitions: int,
    scratch: Path,
    advance: Callable[[], None],
) -> list[Row]:
    """Load the bundle and time every stage.

    Args:
        setting: what is opened.
        work: that was checked.
        expected: the answer that was found then.
        repetitions: that count, of this process.
        scratch: an empty folder, where a copy of the memory is added to.
        advance: called after loading and after each repetition of a part.

    Raises:
        GateError: an answer is not the expected one.
    """
    at_import = resident_bytes()
    with _opened(setting) as (model, loading):
        at_load = resident_bytes()
        advance()
        asking, meter = _Asking(model, work), find_meter()
        ms: Samples = {}
        energy: list[float] = []
        for number in range(-work.warmup, repetitions):
            if meter:
                meter.start()
            image, found = asking.first()
            spent = meter.stop() if meter else 0.0
            if asking.ids != tuple(expected):
                raise GateError(f"{setting.folder}: another answer comes than when it was checked; try again")
            found["second_question_first_token"] = asking.ask(image, 1).timings_ms["first_token"]
            if number >= 0:
                for stage, value in found.items():
                    ms.setdefault(stage, []).append(value)
                energy += [spent] if meter else []
                advance()
        occupied = {"process_at_import": at_import, "process_at_load": at_load, "process_peak": peak_bytes()}
        per_token = {asking.prompt_tokens + len(image.tokens): ms.pop("per_token")}
        if work.contexts:
            per_token = _decode(model, work, repetitions, advance)
        if model.memory is None:
            ms.pop("retrieve")
        else:
            ms["memory_add"] = _add(model, image, work.warmup + repetitions, scratch)[work.warmup :]
    rows = [setting.row(stage, "ms", samples) for stage, samples in (loading | ms).items()]
    rows += [setting.row("per_token", "ms", samples, context) for context, samples in per_token.items()]
    rows += [setting.row(moment, "bytes", [count]) for moment, count in occupied.items()]
    return rows + ([setting.row(ENERGY, "mj", energy)] if energy else [])


@contextmanager
def _opened(setting: Setting) -> Iterator[tuple[Model, Samples]]:
    """The model, and how long "load" and its part "verify" took. The memory speaks of any picture: were there a least
    similarity, what is read would depend on the picture."""
    folder = Path(setting.folder)
    started = time.perf_counter()
    manifest = open_bundle(folder)
    verified = time.perf_counter()
    manifest = replace(manifest, memory=replace(manifest.memory, floor=-1.0))
    with Model(folder, manifest, threads=setting.threads, memory=setting.memory) as model:
        loaded = time.perf_counter()
        yield model, {"load": [(loaded - started) * 1000], "verify": [(verified - started) * 1000]}


class _Asking:
    """Asks an open model, as an app does, what the work says.

    Attributes:
        ids: of the last answer, but for its last token. They are compared and not the text, which is empty where a
            model of random weights gives ids that its tokenizer does not know.
    """

    def __init__(self, model: Model, work: Work) -> None:
        self._model, self._work = model, work
        self.data = picture()
        self.question = question_of(model.prompt, work.prompt_tokens)
        self.prompt_tokens = prompt_length(model.prompt, self.question)
        self._endless = never_ending(model.manifest.prompt.eos_token_ids)
        self.ids: tuple[int, ...] = ()

    def first(self) -> tuple[EncodedImage, dict[str, float]]:
        """Milliseconds of every stage of a question about a picture of which nothing is kept.

        Raises:
            GateError: something was.
        """
        self._model.clear_cache()
        started = time.perf_counter()
        image = self._model.encode(self.data, question=self.question)
        encoded = (time.perf_counter() - started) * 1000
        image = reshaped(image, self._work.visual_tokens)
        answer = self.ask(image, self._work.new_tokens)
        if answer.cached_tokens:
            raise GateError(f"{answer.cached_tokens} tokens of a new picture were kept from before; nothing was timed")
        found = image.timings_ms | answer.timings_ms
        return image, found | {stage: found[stage] + encoded for stage in ("first_token", "total")}

    def ask(self, image: EncodedImage, new_tokens: int) -> Answer:
        """An answer of exactly so many tokens, one a pass."""
        return self._model.ask(
            image, self.question, max_new_tokens=new_tokens, drafts=False, processors=[self._watched]
        )

    def _watched(self, ids: Sequence[int], logits: Float) -> Float:
        self.ids = tuple(ids)
        return self._endless(ids, logits)


def _decode(model: Model, work: Work, repetitions: int, advance: Callable[[], None]) -> dict[int, list[float]]:
    """Milliseconds a token after each context of random token ids, with the runtime's own loop."""
    options, new = Generation(drafts=False), work.new_tokens
    contexts = sorted(work.contexts, reverse=True)  # each is what is left of the one before
    ids = np.random.default_rng(0).integers(0, model.manifest.decoder.vocab_size, contexts[0] + new).tolist()
    samples: dict[int, list[float]] = {context: [] for context in contexts}
    with model.reading() as answering:
        read = answering.context()
        for start in range(0, len(ids), CHUNK):  # beyond the context, so that its buffers have room afterwards
            read.append(ids[start : start + CHUNK])
        for context, found in samples.items():
            for number in range(-work.warmup, repetitions):
                read.truncate(context - 1)
                logits = read.append(ids[context - 1 : context])[0]
                decoding = Decoding(read, logits, Picker(options), ends=(), limit=new)
                passes = sum(1 for _ in decoding) - 1
                if number >= 0:
                    found.append(decoding.decoding_ms / passes)
                    advance()
    return dict(sorted(samples.items()))


def _add(model: Model, image: EncodedImage, count: int, scratch: Path) -> list[float]:
    """Milliseconds of adding a text about an encoded picture, so many times, to a copy of the memory."""
    os.environ["TINYALIGN_CACHE"] = str(scratch)  # this process's alone: the user's keeps no record of the copy
    bank = open_bank(model.folder, model.manifest, scratch / "memory")
    memory = Memory(bank, model.manifest.memory, model.values, model.keys, lambda _: image)
    samples = []
    for number in range(count):
        started = time.perf_counter()
        memory.add(image, f"what picture {number} shows", question="What is it?", source="bench")
        samples.append((time.perf_counter() - started) * 1000)
    return samples
