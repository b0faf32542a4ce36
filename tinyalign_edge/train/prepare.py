"""Before training: what the encoder sees, the keys, who is a neighbour of whom, and the rows as the loop reads them."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tinyalign_edge.config import WITH_LATENTS, WITH_TOKENS, to_json
from tinyalign_edge.data import Row
from tinyalign_edge.errors import InputError
from tinyalign_edge.memory import Neighbours
from tinyalign_edge.memory.side_by_side import joined
from tinyalign_edge.progress import progress
from tinyalign_edge.prompt import Prompt
from tinyalign_edge.train.batches import Example, Rows, Values, longest_tokens
from tinyalign_edge.train.corpus import Corpus, drop_bad
from tinyalign_edge.train.encode import PictureEncoder
from tinyalign_edge.train.feature_cache import FeatureCache
from tinyalign_edge.train.features import Features, features_in_cache, features_in_memory, record_type
from tinyalign_edge.train.keys import Float, Keys, entry_text, fused_keys, query_text, question_keys, question_words
from tinyalign_edge.train.keys import picture_keys as keys_of_regions
from tinyalign_edge.train.model import AlignModel
from tinyalign_edge.train.neighbours import of_others, retrieve
from tinyalign_edge.train.out_of_memory import out_of_memory
from tinyalign_edge.train.processes import Processes, is_first
from tinyalign_edge.train.settings import MemorySettings
from tinyalign_edge.train.start import Start
from tinyalign_edge.train.towers import LanguageTower, VisionTower

FITTED = 2**16  # pictures that the key's projection is taken from, where there are more
KEYS_AT_ONCE = 2**12
FUSED_AT_ONCE = 2**8  # of pooled features, which are larger than those of regions
HELD_OUT_ASKED = 2**10  # held-out examples that are evaluated at most: rows, or questions where each is a row


@dataclass(frozen=True)
class Seen:
    """The rows whose pictures could be read, and the features of these."""

    training: Corpus
    held_out: Corpus
    features: Features


def see(
    training: Corpus,
    held_out: Corpus,
    start: Start,
    *,
    device: str,
    cache: Path | None,
    skip_bad: bool,
    processes: Processes,
    loaders: int = 0,
) -> Seen:
    """Encode every picture once, or find its features in the cache. Where there is no room for what the connector
    reads, each step encodes its pictures anew.

    Raises:
        InputError: a picture cannot be read (unless bad rows may be skipped), or features do not fit.
    """
    vision, connector, memory = start.vision, start.connector, start.memory
    paths = [training.path(i) for i in range(len(training.names))]
    wanted = list(dict.fromkeys([*training.used(), *held_out.used()]))
    channels = connector.feature_dim * memory.key_grid**2
    places = {path: i for i, path in enumerate(paths)}

    def where(path: Path) -> str:
        corpus = training if places[path] in set(training.used()) else held_out
        return corpus.where(places[path])

    careful = partial(out_of_memory, "while pictures are encoded", _smaller_pictures(start, device))
    with careful():
        encoder = PictureEncoder(vision.model, vision.image, start.model, device=device, where=where)

    def encode(pictures: Sequence[int]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        return encoder([paths[i] for i in pictures])

    def carefully(pictures: Sequence[int]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        with careful():
            return encode(pictures)

    def in_a_step(pictures: Sequence[int]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        try:
            return encode(pictures)  # out of memory, the step's own advice helps
        except InputError as error:
            raise InputError(f"{error}; it was there before: put it back and start again, with --resume") from error

    def no_room(needed: int, room: float) -> None:
        if loaders:
            raise InputError(
                f"--loaders {loaders}: there is no room for the pictures' features, and loaders cannot make them anew; "
                "leave it out, or give --cache-features DIR on a larger disk"
            )
        if processes.first:
            there = "of memory" if cache is None else "more on the disk"
            print(
                f"note: the features of {len(wanted)} pictures take {needed / 1e9:.1f} GB {there}, there is room for "
                f"{room / 1e9:.1f}: each step encodes its pictures anew, which takes longer; --cache-features "
                "DIR keeps them where there is room",
                file=sys.stderr,
            )

    record = record_type((connector.visual_tokens, connector.input_dim), channels)
    fewer = "train on fewer rows (--fraction)"
    if cache is None:
        less = f"give --cache-features DIR or {fewer}"
        features = features_in_memory(
            len(paths), wanted, record, carefully, less=less, no_room=no_room, skip_bad=skip_bad
        )
    else:
        about = {
            "encoder": vision.ref.sha256, "image": vision.image, "connector": replace(connector, width=0),
            "key_grid": memory.key_grid,
        }  # fmt: skip
        caches = partial(_cache_of, cache, about)
        less = f"choose another folder (--cache-features DIR) or {fewer}"
        features = features_in_cache(
            paths, wanted, record, carefully, caches, processes, less=less, no_room=no_room, skip_bad=skip_bad
        )
    features = replace(features, anew=features.anew and in_a_step)
    parts = [_without_lost(corpus, features) for corpus in (training, held_out)]
    return Seen(parts[0], parts[1], features)


def _cache_of(folder: Path, about: dict[str, Any], record: np.dtype[np.void]) -> FeatureCache:
    return FeatureCache(folder, {**about, "record": str(record)})


def _smaller_pictures(start: Start, device: str) -> str:
    """What takes less memory of the encoder; a whole model and a checkpoint have their size of pictures."""
    ways = [
        *("fewer pixels (--image-size)",) * (not start.whole and not start.fitted),
        *("--device cpu",) * (device != "cpu"),
    ]
    return f"use {' or '.join(ways) or 'a machine with more memory'}"


def without_long(corpus: Corpus, start: Start, *, skip_bad: bool) -> Corpus:
    """The rows that fit into the context with their pictures and memories.

    Raises:
        InputError: one does not, and bad rows may not be skipped; or none can, whatever it says.
    """
    if start.room(1) < start.prompt.least_tokens:
        fewer = f"{words}, or " if (words := fewer_tokens(start)) else ""
        raise InputError(
            f"no row fits into the context of {start.prompt.config.max_context_tokens} tokens: a picture takes "
            f"{start.connector.visual_tokens}, the memory {start.memory.max_memory_tokens}, the chat template "
            f"{start.prompt.least_tokens}; use {fewer}a shorter chat template"
        )
    long = {}
    for i, row in enumerate(corpus):
        left = start.room(len(row.pictures))
        if (tokens := longest_tokens(row, start.prompt, left)) > left:
            pictures = f" beside {len(row.pictures)} pictures" if len(row.pictures) > 1 else ""
            long[i] = f"{row.where}: {tokens} text tokens, the context leaves {left}{pictures}; shorten the row"
    return drop_bad(corpus, long, skip_bad=skip_bad)


def fewer_tokens(start: Start) -> str:
    """The options with which picture and memory take fewer tokens; "" where there are none, as of a checkpoint, which
    has its own of both."""
    kind = start.memory.kind
    ways = [
        *("--neighbours",) * (kind not in ("none", "paper")),
        *("--value-tokens",) * (kind in WITH_TOKENS),
        *("--latents",) * (kind in (*WITH_LATENTS, "paper")),
        *("--visual-tokens",) * (not start.whole and start.connector.kind != "mlp"),
    ]
    smaller = "a smaller --image-size" if not start.whole and start.connector.kind == "mlp" else ""
    fewer = f"fewer {', '.join(ways)}" if ways else ""
    return "" if start.fitted else " or ".join(filter(None, [fewer, smaller]))


def fits_context(row: Row, start: Start) -> bool:
    """Whether the context has room for the row's longest turn with all that stands before it."""
    left = start.room(len(row.pictures))
    return longest_tokens(row, start.prompt, left) <= left


def region_sample(seen: Seen) -> npt.NDArray[np.float32]:
    """Region features that the key's projection is taken from."""
    pictures = [pictures[0] for pictures in seen.training.pictures if pictures]
    if len(pictures) > FITTED:
        drawn = np.random.default_rng(0).permutation(len(pictures))[:FITTED]
        pictures = [pictures[i] for i in sorted(drawn)]
    return seen.features.regions(pictures)


def fit_keys(seen: Seen, model: AlignModel, prompt: Prompt) -> None:
    """Take the projections that keys are made with from the training rows."""
    model.key.fit(torch.from_numpy(region_sample(seen)))
    if model.question_key is not None:
        asked = [prompt.asked_ids(turn.question) for row in seen.training for turn in row.turns]
        model.question_key.fit(question_words(model, asked))


@dataclass(frozen=True)
class Bank:
    """The entries of the bank to be: rows with a picture, their numbers among the training rows, and their keys.

    With a "question" key, every question counts as a row of its own.
    """

    rows: Corpus
    numbers: npt.NDArray[np.int64]  # (E,)
    keys: npt.NDArray[np.float32]  # (E, key_dim)

    def values(self, seen: Seen, prompt: Prompt, memory: MemorySettings) -> Values | None:
        """What the entries carry."""
        if memory.kind == "none":
            return None
        ids = []
        with progress("Reading texts", len(self.rows), shown=is_first()) as advance:
            for row in self.rows:
                ids.append(prompt.memory_ids(row.memory_turns, memory.value_tokens))
                advance()
        first = [pictures[0] for pictures in self.rows.pictures]
        return Values(ids, lambda entries: seen.features.pooled([first[i] for i in entries]))


def make_bank(seen: Seen, model: AlignModel, prompt: Prompt) -> Bank:
    """The training rows that have a picture; the first is what an entry is found by."""
    memory = model.memory_settings
    told = seen.training.questions()[0] if memory.key == "question" else seen.training
    numbers = np.array([i for i, pictures in enumerate(told.pictures) if pictures], np.int64)
    rows = told.select(numbers)
    return Bank(rows, numbers, make_keys(seen, model, rows, lambda row: entry_text(row, prompt, memory)))


def make_keys(seen: Seen, model: AlignModel, rows: Corpus, text: Callable[[Row], tuple[int, ...]]) -> Float:
    """Keys (R, key_dim) of the first pictures of rows that have one; unless the key is the picture's alone, of the text
    of each, too."""
    if model.memory_settings.key == "picture":
        return picture_keys(seen, model, rows)

    def keys(part: range, pictures: list[int]) -> Float:
        texts = [text(rows[i]) for i in part]
        if model.fused_key is not None:
            return fused_keys(model, seen.features.pooled(pictures), texts)
        seen_keys = keys_of_regions(model, seen.features.regions(pictures))
        return joined(seen_keys, question_keys(model, texts), model.memory_settings.question_weight)

    at_once = FUSED_AT_ONCE if model.fused_key is not None else KEYS_AT_ONCE
    return _in_parts(rows, model.memory_settings.key_dim, keys, at_once)


def picture_keys(seen: Seen, model: AlignModel, rows: Corpus) -> Float:
    """Keys (R, P) of the first pictures of rows that have one."""

    def keys(_: range, pictures: list[int]) -> Float:
        return keys_of_regions(model, seen.features.regions(pictures))

    return _in_parts(rows, model.key.axes.shape[0], keys)


def examples(
    seen: Seen,
    bank: Bank,
    model: AlignModel,
    prompt: Prompt,
    memory: MemorySettings,
    *,
    seed: int,
) -> tuple[Rows, list[Example], float]:
    """Training rows, held-out examples and the similarity floor of the memory.

    Where a key tells what is asked, every question is an example of its own.
    """

    def query(row: Row) -> tuple[int, ...]:
        return query_text(row, prompt, memory)

    asked, held_out_asked, numbers = seen.training, seen.held_out, bank.numbers
    own = np.arange(len(bank.keys))
    queries, pictures = bank.keys, None
    if memory.key != "picture":
        held_out_asked, _ = seen.held_out.questions()
        asked, of = seen.training.questions()
        pictures = picture_keys(seen, model, bank.rows)
        if memory.key == "fused":  # an entry is found by all its questions
            numbers = np.flatnonzero(np.isin(of, bank.numbers))
            own = np.searchsorted(bank.numbers, of[numbers])
            queries = make_keys(seen, model, asked.select(numbers), query)
    held_out_keys = make_keys(seen, model, held_out_asked, query)
    found = retrieve(bank.rows.pictures, Keys(bank.keys, queries, own, held_out_keys, pictures), memory)
    if memory.shuffled:
        entries = bank.rows.pictures
        others = of_others(found.training, seed, [entries[i] for i in own], entries)
        found = replace(
            found, training=others, held_out=of_others(found.held_out, seed, held_out_asked.pictures, entries)
        )
    near = _spread(found.training, numbers, len(asked))
    training = Rows(
        asked, prompt, _features_of(seen, asked), near.rows, near.similarity,
        dropout=memory.dropout, memory_dropout=memory.memory_dropout, seed=seed,
        epochs=lambda number: asked.epoch(number, seed),
    )  # fmt: skip
    held_out = Rows(
        held_out_asked, prompt, _features_of(seen, held_out_asked), found.held_out.rows, found.held_out.similarity
    )
    evaluated = range(0, len(held_out), -(-len(held_out) // HELD_OUT_ASKED) or 1)
    return training, held_out.batch(evaluated), found.floor


def fingerprint(vision: VisionTower, language: LanguageTower, model: AlignModel) -> str:
    """What the keys depend on: the encoder's weights, the preprocessing, the projection; where they tell what is asked,
    the texts' embeddings, too."""
    digest = hashlib.sha256(bytes.fromhex(vision.ref.sha256))
    digest.update(json.dumps(to_json(vision.image), sort_keys=True).encode())
    digest.update(model.key.mean.numpy().tobytes() + model.key.axes.numpy().tobytes())
    for part in (model.question_key, model.fused_key):
        if part is not None:
            digest.update(bytes.fromhex(language.ref.sha256))
            digest.update(b"".join(weight.numpy().tobytes() for weight in part.state_dict().values()))
    return digest.hexdigest()


def _without_lost(corpus: Corpus, features: Features) -> Corpus:
    lost = {
        i: f"{corpus[i].where}: {features.lost[picture]}"
        for i, pictures in enumerate(corpus.pictures)
        for picture in pictures
        if picture not in features
    }
    return drop_bad(corpus, lost, skip_bad=True)


def _in_parts(
    rows: Corpus, width: int, keys: Callable[[range, list[int]], Float], at_once: int = KEYS_AT_ONCE
) -> Float:
    """Keys (R, width), made of a part of the rows and their first pictures at a time: features may not fit."""
    made = np.empty((len(rows), width), np.float32)
    with progress("Making keys", len(rows), brief=True, shown=is_first()) as advance:
        for start in range(0, len(rows), at_once):
            part = range(start, min(start + at_once, len(rows)))
            made[part.start : part.stop] = keys(part, [rows.pictures[i][0] for i in part])
            advance(len(part))
    return made


def _features_of(seen: Seen, corpus: Corpus) -> Callable[[Sequence[int]], list[npt.NDArray[np.floating]]]:
    def features(rows: Sequence[int]) -> list[npt.NDArray[np.floating]]:
        pictures = [corpus.pictures[row] for row in rows]
        pooled = seen.features.pooled([picture for each in pictures for picture in each])  # (pictures, N, C)
        ends = np.cumsum([0, *map(len, pictures)])
        return [pooled[start:end].reshape(-1, pooled.shape[-1]) for start, end in pairwise(ends)]

    return features


def _spread(near: Neighbours, numbers: Sequence[int] | npt.NDArray[np.int64], count: int) -> Neighbours:
    """Neighbours of the rows `numbers` among `count` rows; the others have none."""
    rows = np.full((count, near.rows.shape[1]), -1, np.int64)
    similarity = np.full(rows.shape, -1.0, np.float32)
    rows[numbers], similarity[numbers] = near.rows, near.similarity
    return Neighbours(rows, similarity)
