"""`train`: from conversation file, pictures and two towers to a checkpoint."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from tinyalign_edge.config import MemoryKind, read_json, to_json, write_json
from tinyalign_edge.data import Row, read_rows
from tinyalign_edge.errors import InputError
from tinyalign_edge.memory import Bank, Neighbours, Record, write_bank
from tinyalign_edge.progress import progress
from tinyalign_edge.prompt import Prompt
from tinyalign_edge.train.batches import Collate, Example, Rows, Values
from tinyalign_edge.train.checkpoint import MEMORY, METRICS, SAMPLES, is_checkpoint, save_checkpoint
from tinyalign_edge.train.encode import Encoded, encode_rows
from tinyalign_edge.train.loop import fit
from tinyalign_edge.train.model import AlignModel
from tinyalign_edge.train.neighbours import Retrieved, retrieve
from tinyalign_edge.train.samples import write_samples
from tinyalign_edge.train.settings import (
    SCHEMA_VERSION,
    CheckpointConfig,
    ConnectorSettings,
    MemorySettings,
    TrainSettings,
)
from tinyalign_edge.train.towers import LanguageTower, VisionTower, image_settings, load_language, load_vision

STATE = "state"
RUN = "run.json"
KEY = "key.safetensors"
MAX_HELD_OUT = 256
CALIBRATION = 64
DEFAULT_EPOCHS = 3


@dataclass(frozen=True)
class TrainOptions:
    """What a caller of `train` may choose; the rest follows from data and towers."""

    memory: MemoryKind = "tokens"
    fraction: float = 1.0
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 32
    learning_rate: float = 1e-3
    visual_tokens: int = 16
    k: int = 4
    key_grid: int = 1
    image_size: int | None = None  # pixels a side; None: what the encoder's image processor says
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    eval_every: int = 50


def train(
    *,
    data: Path,
    images: Path,
    vision: str,
    lm: str,
    out: Path,
    options: TrainOptions | None = None,
    resume: bool = False,
    label: str = "Training",
) -> CheckpointConfig:
    """Train connector, memory connector and value encoder; write a checkpoint to `out`.

    Args:
        data: LLaVA conversations, JSON or JSON lines.
        images: the folder that the rows' `image` is relative to.
        vision: folder or hub id of the vision encoder.
        lm: folder or hub id of the language model.
        out: the checkpoint folder; new, or an interrupted run's with `resume`.

    Raises:
        InputError: wrong input; nothing was written.
        TinyAlignError: training failed; what was reached can be resumed.
    """
    options = options or TrainOptions()
    _check(options)
    _check_out(out, resume)
    device = _device(options.device)
    rows = read_rows(data, images)
    training_rows, held_out_rows = _split(rows, options)
    torch.manual_seed(options.seed)
    eye = load_vision(vision, image=image_settings(vision, options.image_size))
    tongue = load_language(lm)
    run = _Run(out, options, training_rows, held_out_rows, eye, tongue, device)
    settings = _train_settings(options, data, images, len(training_rows), device)
    return run.execute(settings, resume=resume, label=label)


class _Run:
    """The steps of one training run, each fed by the one before."""

    def __init__(
        self,
        out: Path,
        options: TrainOptions,
        rows: Sequence[Row],
        held_out_rows: Sequence[Row],
        vision: VisionTower,
        language: LanguageTower,
        device: str,
    ) -> None:
        self.out, self.options, self.device = out, options, device
        self.rows, self.held_out_rows = rows, held_out_rows
        self.vision, self.language = vision, language
        self.prompt = Prompt(language.prompt, Tokenizer.from_str(language.tokenizer_json))

    def execute(self, settings: TrainSettings, *, resume: bool, label: str) -> CheckpointConfig:
        connector = self._connector_settings()
        memory = self._memory_settings(connector)
        model = AlignModel(self.language.model, connector, memory)
        seen = encode_rows(
            self.vision.model,
            self.vision.image,
            model,
            [*self.rows, *self.held_out_rows],
            device=self.device,
            dtype=np.float16,  # half the memory; the connector's LayerNorm makes the rounding harmless
        )
        count = len(self.rows)
        self._fit_key(model, seen.regions[:count], resume)
        with torch.inference_mode():
            keys = model.key(torch.from_numpy(seen.regions)).numpy()
        found = retrieve(self.rows, keys[:count], keys[count:], memory)
        memory = replace(memory, floor=found.floor, fingerprint=_fingerprint(self.vision, model))
        values = self._values(seen, memory)
        rows, held_out = self._examples(seen, found, memory, settings, connector)
        config = CheckpointConfig(
            SCHEMA_VERSION, self.vision.ref, self.language.ref, self.vision.image, self.prompt.config,
            connector, memory, settings,
        )  # fmt: skip
        self._begin(config, model, resume)
        collate = Collate(memory, values)
        fit(model, rows, collate, held_out, settings, state=self.out / STATE, metrics=self.out / METRICS,
            resume=resume, label=label)  # fmt: skip
        self._finish(config, model, keys[:count], values)
        return config

    def _connector_settings(self) -> ConnectorSettings:
        height, width, channels = self.vision.grid
        tokens = min(self.options.visual_tokens, height * width)
        return ConnectorSettings(height, width, channels, tokens, self.language.model.config.hidden_size)

    def _memory_settings(self, connector: ConnectorSettings) -> MemorySettings:
        options = self.options
        settings = MemorySettings(kind=options.memory, k=options.k, key_grid=options.key_grid)
        return replace(settings, key_dim=min(settings.key_dim, connector.feature_dim * options.key_grid**2))

    def _values(self, seen: Encoded, memory: MemorySettings) -> Values | None:
        if memory.kind == "none":
            return None
        limit = memory.value_tokens
        ids = [self.prompt.memory_ids(row.memory_turns, limit) for row in self.rows]
        return Values(ids, seen.pooled[: len(self.rows)])

    def _examples(
        self,
        seen: Encoded,
        found: Retrieved,
        memory: MemorySettings,
        settings: TrainSettings,
        connector: ConnectorSettings,
    ) -> tuple[Rows, list[Example]]:
        count = len(self.rows)
        per_entry = memory.latents if memory.kind == "latents" else memory.value_tokens
        reserved = connector.visual_tokens + (0 if memory.kind == "none" else memory.k * per_entry)
        left = self.prompt.config.max_context_tokens - reserved

        def build(rows: Sequence[Row], features: npt.NDArray[Any], near: Neighbours, dropout: float) -> Rows:
            return Rows(rows, self.prompt, features, near.rows, near.similarity, dropout=dropout,
                        seed=settings.seed, max_tokens=left)  # fmt: skip

        training = build(self.rows, seen.pooled[:count], found.training, memory.dropout)
        held_out = build(self.held_out_rows, seen.pooled[count:], found.held_out, 0.0)
        return training, [held_out[i] for i in range(len(held_out))]

    def _fit_key(self, model: AlignModel, regions: npt.NDArray[Any], resume: bool) -> None:
        """Take the key projection from the pictures, or from the interrupted run: another machine's or thread
        count's arithmetic differs in the last digits, and the keys must not."""
        kept = self.out / STATE / KEY
        state = load_file(kept) if resume and kept.is_file() else {}
        if {name: t.shape for name, t in state.items()} == {
            name: t.shape for name, t in model.key.state_dict().items()
        }:
            model.key.load_state_dict(state)
        else:  # a new run, or one with other settings, which `_begin` refuses
            model.key.fit(torch.from_numpy(regions))

    def _begin(self, config: CheckpointConfig, model: AlignModel, resume: bool) -> None:
        """Record the settings and keys of the run, or compare the settings with the interrupted run's."""
        run = self.out / STATE / RUN
        if resume and run.is_file():
            before, now = read_json(run), to_json(config)
            changed = sorted(
                f"{part}.{key}"
                for part in now
                for key in (now[part] if isinstance(now[part], dict) else {})
                if before.get(part, {}).get(key) != json.loads(json.dumps(now[part][key]))
            )
            if changed:
                raise InputError(
                    f"{self.out}: the interrupted run had other settings ({', '.join(changed)}); use the same"
                )
            return
        run.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.key.state_dict(), self.out / STATE / KEY)
        write_json(run, config)

    def _finish(
        self, config: CheckpointConfig, model: AlignModel, keys: npt.NDArray[np.float32], values: Values | None
    ) -> None:
        model.eval().cpu()
        shutil.rmtree(self.out / MEMORY, ignore_errors=True)
        if values is not None:
            latents = encode_values(model, values) if config.memory.kind == "latents" else None
            write_bank(
                self.out / MEMORY,
                keys,
                [Record(first.answer, first.question, row.id) for row in self.rows for first in row.memory_turns[:1]],
                fingerprint=config.memory.fingerprint,
                vocab_size=self.language.model.config.vocab_size,
                token_ids=None if latents is not None else values.token_ids,
                latents=latents,
            )
            bank = Bank(self.out / MEMORY)
            if bank.graph_due:
                with progress("Building the graph", len(bank)) as advance:
                    bank.rebuild(advance)
        write_samples(self.out / SAMPLES, self.held_out_rows, self.rows[:CALIBRATION])
        save_checkpoint(self.out, config, model, self.language.tokenizer_json)
        shutil.rmtree(self.out / STATE, ignore_errors=True)


def encode_values(model: AlignModel, values: Values, batch: int = 64) -> npt.NDArray[np.float32]:
    """Latents (E, L, latent_dim) of every entry."""
    collate = Collate(model.memory_settings, values)
    out = []
    with torch.inference_mode():
        for start in range(0, len(values.token_ids), batch):
            rows = tuple(range(start, min(start + batch, len(values.token_ids))))
            example = Example((), (), np.zeros((0, 0)), rows, (1.0,) * len(rows))
            memory = collate.memory_inputs([example])
            assert memory is not None
            out.append(model.values(memory).unflatten(0, (len(rows), -1)).numpy())
    return np.concatenate(out)


def _check(options: TrainOptions) -> None:
    if not 0 < options.fraction <= 1:
        raise InputError(f"--fraction {options.fraction}: must be above 0 and at most 1")
    for name in ("epochs", "steps", "batch_size", "visual_tokens", "k", "key_grid", "image_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            option = "neighbours" if name == "k" else name.replace("_", "-")
            raise InputError(f"--{option} {value}: must be at least 1")
    if not 0 < options.learning_rate < 10:
        raise InputError(f"--learning-rate {options.learning_rate}: must be above 0 and below 10")
    if not 0 <= options.seed < 1 << 32:
        raise InputError(f"--seed {options.seed}: must be from 0 to {(1 << 32) - 1}")
    if options.epochs and options.steps:
        raise InputError("--epochs and --steps: give one of them")


def _check_out(out: Path, resume: bool) -> None:
    if is_checkpoint(out):
        raise InputError(f"{out}: holds a finished checkpoint; choose another --out")
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / STATE / RUN).is_file())):
        raise InputError(f"{out}: exists and is not an interrupted run; choose another --out")
    if (out / STATE / RUN).is_file() and not resume:
        raise InputError(f"{out}: holds an interrupted run; continue it with --resume or choose another --out")


def _device(wanted: str) -> Literal["cpu", "cuda"]:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device; use --device cpu")
    return "cuda" if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()) else "cpu"


def _split(rows: list[Row], options: TrainOptions) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows without a picture in common; the held-out ones do not depend on the fraction."""
    pictures = sorted({row.image for row in rows})
    order = np.random.default_rng(options.seed).permutation(len(pictures))
    held_out_count = min(MAX_HELD_OUT, len(pictures) // 10)
    held = {pictures[i] for i in order[:held_out_count]}
    keep_count = max(1, round((len(pictures) - held_out_count) * options.fraction))
    kept = {pictures[i] for i in order[held_out_count : held_out_count + keep_count]}
    return [row for row in rows if row.image in kept], [row for row in rows if row.image in held]


def _train_settings(
    options: TrainOptions, data: Path, images: Path, rows: int, device: Literal["cpu", "cuda"]
) -> TrainSettings:
    an_epoch = -(-rows // options.batch_size)
    return TrainSettings(
        data=str(data),
        images=str(images),
        steps=options.steps or an_epoch * (options.epochs or DEFAULT_EPOCHS),
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        fraction=options.fraction,
        seed=options.seed,
        device=device,
        eval_every=options.eval_every,
    )


def _fingerprint(vision: VisionTower, model: AlignModel) -> str:
    """What the keys depend on: the encoder's weights, the preprocessing, the projection."""
    digest = hashlib.sha256(bytes.fromhex(vision.ref.sha256))
    digest.update(json.dumps(to_json(vision.image), sort_keys=True).encode())
    digest.update(model.key.mean.numpy().tobytes() + model.key.axes.numpy().tobytes())
    return digest.hexdigest()
