"""`train`: from conversation files, pictures and two towers to a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from tinyalign_edge.prompt import Prompt
from tinyalign_edge.train.batches import Collate
from tinyalign_edge.train.checkpoint import METRICS
from tinyalign_edge.train.corpus import Corpus, data_refs, open_corpus, parse_source, split
from tinyalign_edge.train.finish import write_checkpoint
from tinyalign_edge.train.loop import fit
from tinyalign_edge.train.model import AlignModel
from tinyalign_edge.train.options import TrainOptions, check_options, find_device, memory_settings, train_settings
from tinyalign_edge.train.prepare import examples, fingerprint, make_bank, region_sample, see, without_long
from tinyalign_edge.train.settings import SCHEMA_VERSION, CheckpointConfig, ConnectorSettings
from tinyalign_edge.train.state import RunState
from tinyalign_edge.train.towers import LanguageTower, VisionTower, image_settings, load_language, load_vision
from tinyalign_edge.train.values import encode_values

MAX_HELD_OUT = 256


def train(
    *,
    data: str | Path | Sequence[str | Path],
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
        data: LLaVA conversations, JSON or JSON lines, or hub data sets; `FILE:0.5` goes through half of it an epoch.
        images: the folder that the rows' `image` is relative to.
        vision: folder or hub id of the vision encoder.
        lm: folder or hub id of the language model.
        out: the checkpoint folder; new, or an interrupted run's with `resume`.

    Raises:
        InputError: wrong input; nothing was written.
        TinyAlignError: training failed; what was reached can be resumed.
    """
    options = options or TrainOptions()
    check_options(options)
    state = RunState(out, resume=resume)
    device = find_device(options.device)
    sources = [parse_source(str(item)) for item in ([data] if isinstance(data, str | Path) else data)]
    corpus = open_corpus(sources, images, skip_bad=options.skip_bad)
    training, held_out = split(corpus, held_out=MAX_HELD_OUT, fraction=options.fraction, seed=options.seed)
    torch.manual_seed(options.seed)
    eye = load_vision(vision, image=image_settings(vision, options.image_size))
    tongue = load_language(lm)
    return _Run(out, options, eye, tongue, device, state).execute(training, held_out, label=label)


class _Run:
    """The steps of one training run, each fed by the one before."""

    def __init__(
        self, out: Path, options: TrainOptions, vision: VisionTower, language: LanguageTower, device: str,
        state: RunState,
    ) -> None:  # fmt: skip
        self.out, self.options, self.device, self.state = out, options, device, state
        self.vision, self.language = vision, language
        self.prompt = Prompt(language.prompt, Tokenizer.from_str(language.tokenizer_json))

    def execute(self, training: Corpus, held_out: Corpus, *, label: str) -> CheckpointConfig:
        options, state = self.options, self.state
        connector = self._connector_settings()
        memory = memory_settings(options, connector)
        room = self.prompt.config.max_context_tokens - connector.visual_tokens - memory.max_memory_tokens
        training, held_out = (
            without_long(rows, self.prompt, room, skip_bad=options.skip_bad) for rows in (training, held_out)
        )
        model = AlignModel(self.language.model, connector, memory)
        seen = see(
            training, held_out, self.vision, model, connector, memory,
            device=self.device, cache=options.cache_features, skip_bad=options.skip_bad,
        )  # fmt: skip
        state.fit_key(model, lambda: region_sample(seen))
        bank = make_bank(seen, model, self.prompt)
        rows, held_out_examples, floor = examples(seen, bank, model, self.prompt, memory, options.seed)
        memory = replace(memory, floor=floor, fingerprint=fingerprint(self.vision, self.language, model))
        values = bank.values(seen, self.prompt, memory)
        if values is not None and memory.kind == "paper":
            values = replace(values, latents=encode_values(model, values))
        settings = train_settings(options, data_refs(training), training.images, len(rows), self.device)
        config = CheckpointConfig(
            SCHEMA_VERSION, self.vision.ref, self.language.ref, self.vision.image, self.prompt.config,
            connector, memory, settings,
        )  # fmt: skip
        state.begin(config, model)
        fit(model, rows, Collate(memory, values), held_out_examples, settings, state=state.folder,
            metrics=self.out / METRICS, resume=state.resume, label=label)  # fmt: skip
        config = write_checkpoint(self.out, config, model, self.language, rows=bank.rows, held_out=seen.held_out,
                                  keys=bank.keys, values=values)  # fmt: skip
        state.clear()
        return config

    def _connector_settings(self) -> ConnectorSettings:
        height, width, channels = self.vision.grid
        tokens = min(self.options.visual_tokens, height * width)
        return ConnectorSettings(height, width, channels, tokens, self.language.model.config.hidden_size)
