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

from tinyalign_edge.config import read_json, to_json, write_json
from tinyalign_edge.data import Row, read_rows
from tinyalign_edge.errors import InputError
from tinyalign_edge.memory import Bank, Neighbours, Record, write_bank
from tinyalign_edge.progress import progress
from tinyalign_edge.prompt import Prompt
from tinyalign_edge.train.batches import Collate, Example, Rows, Values
from tinyalign_edge.train.checkpoint import MEMORY, METRICS, SAMPLES, is_checkpoint, save_checkpoint
from tinyalign_edge.train.encode import Encode, Encoded, encode_rows
from tinyalign_edge.train.keys import examples_of, training_keys
from tinyalign_edge.train.loop import fit
from tinyalign_edge.train.model import AlignModel
from tinyalign_edge.train.neighbours import Retrieved, retrieve
from tinyalign_edge.train.paper import HEADS, LATENT_DIM, LATENTS
from tinyalign_edge.train.samples import write_samples
from tinyalign_edge.train.settings import (
    SCHEMA_VERSION,
    CheckpointConfig,
    ConnectorSettings,
    KeyKind,
    MemorySettings,
    TrainedMemory,
    TrainSettings,
)
from tinyalign_edge.train.towers import LanguageTower, VisionTower, image_settings, load_language, load_vision
from tinyalign_edge.train.values import encode_values, value_fingerprint

STATE = "state"
RUN = "run.json"
KEY = "key.safetensors"
MAX_HELD_OUT = 256
CALIBRATION = 64
DEFAULT_EPOCHS = 3


@dataclass(frozen=True)
class TrainOptions:
    """What a caller of `train` may choose; the rest follows from data and towers.

    Attributes:
        memory: what the entries carry; "paper": as TinyAlign's released code has it, key included.
        key: None: "fused" with the memory "paper", else "picture".
        key_dim: of a picture's key; None: 128. A fused key has the language model's width.
        value_tokens: the most token ids kept of an entry.
        latents, latent_dim: of an entry; None: 8 of 96 numbers, with the memory "paper" 32 of 96.
    """

    memory: TrainedMemory = "tokens"
    key: KeyKind | None = None
    key_dim: int | None = None
    value_tokens: int = 24
    latents: int | None = None
    latent_dim: int | None = None
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
    encode: Encode = encode_rows,
) -> CheckpointConfig:
    """Train connector, memory connector and value encoder; write a checkpoint to `out`.

    Args:
        data: LLaVA conversations, JSON or JSON lines.
        images: the folder that the rows' `image` is relative to.
        vision: folder or hub id of the vision encoder.
        lm: folder or hub id of the language model.
        out: the checkpoint folder; new, or an interrupted run's with `resume`.
        encode: makes the pictures' features; runs that share an encoder may share its work.

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
    run = _Run(out, options, training_rows, held_out_rows, eye, tongue, device, encode)
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
        encode: Encode,
    ) -> None:
        self.out, self.options, self.device, self.encode = out, options, device, encode
        self.rows, self.held_out_rows = rows, held_out_rows
        self.vision, self.language = vision, language
        self.prompt = Prompt(language.prompt, Tokenizer.from_str(language.tokenizer_json))

    def execute(self, settings: TrainSettings, *, resume: bool, label: str) -> CheckpointConfig:
        connector = self._connector_settings()
        memory = self._memory_settings(connector)
        model = AlignModel(self.language.model, connector, memory)
        seen = self.encode(
            self.vision.model,
            self.vision.image,
            model,
            [*self.rows, *self.held_out_rows],
            device=self.device,
            dtype=np.float16,  # half the memory; the connector's LayerNorm makes the rounding harmless
        )
        count = len(self.rows)
        self._fit_key(model, seen.regions[:count], resume)
        texts = [self.prompt.memory_ids(row.memory_turns, memory.value_tokens) for row in self.rows]
        keys = training_keys(model, self.prompt, seen, (self.rows, texts), self.held_out_rows)
        found = retrieve(self.rows, keys, memory)
        memory = replace(memory, floor=found.floor, fingerprint=_fingerprint(self.vision, self.language, model))
        values = None if memory.kind == "none" else Values(texts, seen.pooled[:count])
        if values is not None and memory.kind == "paper":
            values = replace(values, latents=encode_values(model, values))
        rows, held_out = self._examples(seen, found, memory, settings, connector)
        config = CheckpointConfig(
            SCHEMA_VERSION, self.vision.ref, self.language.ref, self.vision.image, self.prompt.config,
            connector, memory, settings,
        )  # fmt: skip
        self._begin(config, model, resume)
        collate = Collate(memory, values)
        fit(model, rows, collate, held_out, settings, state=self.out / STATE, metrics=self.out / METRICS,
            resume=resume, label=label)  # fmt: skip
        return self._finish(config, model, keys.entries, values)

    def _connector_settings(self) -> ConnectorSettings:
        height, width, channels = self.vision.grid
        tokens = min(self.options.visual_tokens, height * width)
        return ConnectorSettings(height, width, channels, tokens, self.language.model.config.hidden_size)

    def _memory_settings(self, connector: ConnectorSettings) -> MemorySettings:
        options, paper = self.options, self.options.memory == "paper"
        settings = MemorySettings(
            kind=options.memory,
            key=options.key or ("fused" if paper else "picture"),
            k=options.k,
            key_grid=options.key_grid,
            value_tokens=options.value_tokens,
        )
        if settings.key == "fused" and options.key_dim:
            raise InputError(
                f"--key-dim {options.key_dim}: a fused key has the width {connector.width}, as the LM; leave it out"
            )
        widest = connector.feature_dim * options.key_grid**2
        return replace(
            settings,
            key_dim=connector.width if settings.key == "fused" else min(options.key_dim or settings.key_dim, widest),
            latents=options.latents or (LATENTS if paper else settings.latents),
            latent_dim=options.latent_dim or (LATENT_DIM if paper else settings.latent_dim),
        )

    def _examples(
        self,
        seen: Encoded,
        found: Retrieved,
        memory: MemorySettings,
        settings: TrainSettings,
        connector: ConnectorSettings,
    ) -> tuple[Rows, list[Example]]:
        count = len(self.rows)
        left = self.prompt.config.max_context_tokens - connector.visual_tokens - memory.max_memory_tokens

        def build(rows: Sequence[Row], seen: Encoded, near: Neighbours, dropout: float) -> Rows:
            asked, of = examples_of(rows, memory.key)
            features = seen.pooled if len(of) == len(rows) else seen.pooled[of]
            return Rows(asked, self.prompt, features, near.rows, near.similarity, dropout=dropout,
                        seed=settings.seed, max_tokens=left)  # fmt: skip

        training = build(self.rows, seen[:count], found.training, memory.dropout)
        held_out = build(self.held_out_rows, seen[count:], found.held_out, 0.0)
        return training, [held_out[i] for i in range(len(held_out))]

    def _fit_key(self, model: AlignModel, regions: npt.NDArray[Any], resume: bool) -> None:
        """Take the key projection from the pictures, or from the interrupted run: another machine's or thread
        count's arithmetic differs in the last digits, and the keys must not."""
        kept = self.out / STATE / KEY
        state = load_file(kept) if resume and kept.is_file() else {}
        if {name: t.shape for name, t in state.items()} == {name: t.shape for name, t in model.key_state().items()}:
            model.load_own_state({**model.own_state(), **state})
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
        save_file(model.key_state(), self.out / STATE / KEY)
        write_json(run, config)

    def _finish(
        self, config: CheckpointConfig, model: AlignModel, keys: npt.NDArray[np.float32], values: Values | None
    ) -> CheckpointConfig:
        model.eval().cpu()
        fingerprint = value_fingerprint(config.memory.fingerprint, model)
        config = replace(config, memory=replace(config.memory, fingerprint=fingerprint))
        shutil.rmtree(self.out / MEMORY, ignore_errors=True)
        if values is not None:
            latents = encode_values(model, values) if config.memory.bank_kind == "latents" else None
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
        return config


def _check(options: TrainOptions) -> None:
    if not 0 < options.fraction <= 1:
        raise InputError(f"--fraction {options.fraction}: must be above 0 and at most 1")
    sizes = ("epochs", "steps", "batch_size", "visual_tokens", "k", "key_grid", "key_dim", "value_tokens", "latents",
             "latent_dim", "image_size")  # fmt: skip
    for name in sizes:
        value = getattr(options, name)
        if value is not None and value < 1:
            option = "neighbours" if name == "k" else name.replace("_", "-")
            raise InputError(f"--{option} {value}: must be at least 1")
    if options.latent_dim and options.latent_dim % HEADS:
        raise InputError(f"--latent-dim {options.latent_dim}: must be a multiple of {HEADS}")
    if options.key == "fused" and options.memory == "none":
        raise InputError("--key fused: there is no key with --memory none; leave it out")
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


def _fingerprint(vision: VisionTower, language: LanguageTower, model: AlignModel) -> str:
    """What the keys depend on: the encoder's weights, the preprocessing, the projection; of fused ones the texts'
    embeddings, too."""
    digest = hashlib.sha256(bytes.fromhex(vision.ref.sha256))
    digest.update(json.dumps(to_json(vision.image), sort_keys=True).encode())
    digest.update(model.key.mean.numpy().tobytes() + model.key.axes.numpy().tobytes())
    if model.fused_key is not None:
        digest.update(bytes.fromhex(language.ref.sha256))
        digest.update(b"".join(weight.numpy().tobytes() for weight in model.fused_key.state_dict().values()))
    return digest.hexdigest()
