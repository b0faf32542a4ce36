"""`train`: from conversation files, pictures and two towers, or a checkpoint, to a checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from tinyalign_edge.errors import InputError
from tinyalign_edge.train.batches import Collate
from tinyalign_edge.train.checkpoint import METRICS
from tinyalign_edge.train.corpus import (
    Source,
    check_weights,
    data_refs,
    of_one_picture,
    open_corpus,
    parse_source,
    split,
)
from tinyalign_edge.train.episodes import Episodes
from tinyalign_edge.train.finish import write_checkpoint
from tinyalign_edge.train.loop import fit
from tinyalign_edge.train.options import (
    Device,
    TrainOptions,
    check_options,
    check_values,
    copying_settings,
    copying_steps,
    episodes_share,
    find_device,
    rows_at_once,
    steps_of,
    train_settings,
)
from tinyalign_edge.train.out_of_memory import out_of_memory
from tinyalign_edge.train.picture_files import FOLDER
from tinyalign_edge.train.prepare import (
    examples,
    fewer_tokens,
    fingerprint,
    fit_keys,
    fits_context,
    make_bank,
    see,
    without_long,
)
from tinyalign_edge.train.processes import Processes
from tinyalign_edge.train.settings import SCHEMA_VERSION, CheckpointConfig
from tinyalign_edge.train.start import Start, start_align, start_instruct, start_whole
from tinyalign_edge.train.state import RunState
from tinyalign_edge.train.values import encode_values
from tinyalign_edge.train.verdict import note_rise, warn_of_harm
from tinyalign_edge.train.vlm_prompt import read_template

MAX_HELD_OUT = 256
LEAST_PICTURES = 2  # keys are what tells pictures apart
# once the pictures are seen
KNOWN_LATER = ("memory.floor", "memory.fingerprint", "training.steps", "training.copying_steps")
COPYING_STATE = "copying"  # below the run's state


def train(
    *,
    data: str | Path | Sequence[str | Path],
    images: Path | None = None,
    vision: str | None = None,
    lm: str | None = None,
    vlm: Path | None = None,
    chat_template: Path | None = None,
    start: Path | None = None,
    out: Path,
    options: TrainOptions | None = None,
    resume: bool = False,
    label: str = "Training",
) -> CheckpointConfig:
    """Train connector, memory connector and value encoder, in stage "instruct" the language model too.

    Under `accelerate launch` every process calls this; the first one writes.

    Args:
        data: LLaVA conversations, JSON or JSON lines, or hub data sets; `FILE:0.5` goes through half of it an epoch.
        images: the folder that the rows' `image` is relative to; None where hub data sets hold all pictures.
        vision: folder or hub id of the vision encoder, in stage "align".
        lm: folder or hub id of the language model, in stage "align".
        vlm: folder of a whole vision-language model that is given a memory, instead of `vision` and `lm`: nothing
            of the model itself is trained.
        chat_template: a Jinja file to use in place of that model's own.
        start: the aligned checkpoint that stage "instruct" goes on from.
        out: the checkpoint folder; new, or an interrupted run's with `resume`.

    Raises:
        InputError: wrong input; nothing was written, unless it is a picture that is gone when a step encodes it anew.
        TinyAlignError: training failed; what was reached can be resumed.
    """
    options = options or TrainOptions()
    check_options(options)
    device = find_device(options.device)
    processes = Processes(device)
    rows_at_once(options, processes.count)
    state = RunState(out, resume=resume)
    if resume and not state.resumed and processes.first:
        print(f"note: {out}: no interrupted run to go on with; a new one begins", file=sys.stderr)
    sources = [parse_source(str(item)) for item in ([data] if isinstance(data, str | Path) else data)]
    less = _less_before(options, state, processes)
    with processes.one_line(), state.nothing_left(), out_of_memory("before the steps", less):
        processes.wait()  # all have looked into the folder before the first one writes there
        with processes.together():
            if processes.first:
                state.try_to_write()
        return _train(
            sources, images, out, options, partial(_start, vision, lm, vlm, chat_template, start, options),
            started_from=start, resume=resume, label=label, device=device, processes=processes, state=state,
        )  # fmt: skip


def _train(
    sources: Sequence[Source],
    images: Path | None,
    out: Path,
    options: TrainOptions,
    start: Callable[[], Start],
    *,
    started_from: Path | None,
    resume: bool,
    label: str,
    device: Device,
    processes: Processes,
    state: RunState,
) -> CheckpointConfig:
    kept = options.cache_features / FOLDER if options.cache_features else state.pictures
    corpus = open_corpus(sources, images, kept, skip_bad=options.skip_bad)
    if not corpus.used():
        raise InputError(f"{sources[0].data}: no row has a picture; key 'image' must name some")
    training, held_out = split(corpus, held_out=MAX_HELD_OUT, fraction=options.fraction, seed=options.seed)
    check_weights(training)
    torch.manual_seed(options.seed)
    with out_of_memory("while the models are loaded", "use smaller ones or a machine with more memory"):
        begun = start()
    if begun.whole:
        training, held_out = (of_one_picture(rows, skip_bad=options.skip_bad) for rows in (training, held_out))
    training, held_out = (without_long(rows, begun, skip_bad=options.skip_bad) for rows in (training, held_out))
    connector, memory, model = begun.connector, begun.memory, begun.model
    check_values(options, memory.kind)
    model.reconstruct = options.reconstruct
    if options.random_values:
        model.turn_values()
    if options.freeze_values:
        model.freeze_values()
    if options.bf16 and device == "cpu":  # torch's fused attention is slow there, backwards above all
        begun.language.model.set_attn_implementation("eager")
    share = episodes_share(options, memory)
    cache = options.cache_features or (state.features if processes.count > 1 else None)
    settings = train_settings(
        options,
        data_refs(training),
        images,
        len(training),
        device,
        processes=processes.count,
        start=started_from,
        episodes=share,
        whole=begun.whole,
    )
    config = CheckpointConfig(
        SCHEMA_VERSION, begun.vision.ref, begun.language.ref, begun.vision.image, begun.prompt.config,
        connector, memory, settings, whole=begun.whole,
    )  # fmt: skip
    state.check(config, but=KNOWN_LATER)
    seen = see(training, held_out, begun, device=device, cache=cache, skip_bad=options.skip_bad, processes=processes,
               loaders=options.loaders)  # fmt: skip
    if (left := len(seen.training.used())) < LEAST_PICTURES:
        more = f"; raise --fraction {options.fraction:g}" if options.fraction < 1 else ""
        raise InputError(
            f"{sources[0].data}: {left} pictures to train on that can be read, {LEAST_PICTURES} are needed{more}"
        )
    check_weights(seen.training)  # pictures that cannot be read are lost from it
    if not begun.fitted:
        state.fit_keys(model, lambda: fit_keys(seen, model, begun.prompt))
        model.load_state_dict(processes.of_first(model.key_state()), strict=False)
    bank = make_bank(seen, model, begun.prompt)
    rows, held_out_examples, floor = examples(seen, bank, model, begun.prompt, memory, seed=options.seed)
    memory = replace(memory, floor=floor, fingerprint=fingerprint(begun.vision, begun.language, model))
    values = bank.values(seen, begun.prompt, memory)
    if values is not None and memory.kind == "paper":
        values = replace(values, latents=encode_values(model, values))
    episodes = None
    if share:
        answers = (turn.answer for row in rows.rows for turn in row.turns)
        episodes = Episodes(share, bank.rows, begun.prompt, answers, value_tokens=memory.value_tokens,
                            fits=lambda row: fits_context(row, begun))  # fmt: skip
        if not episodes.possible:
            episodes = None
            if processes.first:
                print("note: no answer is a name that could be copied; the copy term gets no steps of its own",
                      file=sys.stderr)  # fmt: skip
    steps = steps_of(options, len(rows))
    settings = replace(settings, steps=steps, copying_steps=copying_steps(steps) if episodes else 0)
    config = replace(config, memory=memory, training=settings)
    if processes.first:
        config = state.begin(config, model)
    processes.wait()
    fit_all = partial(fit, model, collate=Collate(memory, values), held_out=held_out_examples, metrics=out / METRICS,
                      resume=resume, processes=processes, less=_less_in_steps(begun, options),
                      loaders=options.loaders)  # fmt: skip
    fit_all(rows=rows, settings=settings, state=state.folder, label=label)
    if episodes is not None:
        model.freeze_all_but_copying()
        fit_all(rows=rows.playing(episodes), settings=copying_settings(settings), state=state.folder / COPYING_STATE,
                label="Training to copy", before=settings.steps)  # fmt: skip
    with out_of_memory("after the last step", "--resume alone makes the checkpoint, in less"):
        harm = False
        if begun.whole and options.stage == "align" and processes.first:
            harm = warn_of_harm(model, Collate(memory, values), held_out_examples, settings)
        begun.merge()
        if processes.first:
            if not harm:
                note_rise(out / METRICS, settings, whole=begun.whole)
            config = write_checkpoint(out, config, model, begun.language, rows=bank.rows, held_out=seen.held_out,
                                      keys=bank.keys, values=values)  # fmt: skip
            state.clear()
    processes.wait()
    return config


def _less_before(options: TrainOptions, state: RunState, processes: Processes) -> str:
    """What takes less memory before the steps; an interrupted run goes on with its share of the rows, and several
    processes have their features on disk."""
    ways = []
    if options.cache_features is None and processes.count == 1:
        ways.append("keep features on disk (--cache-features DIR)")
    if not state.resumed:
        ways.append("train on fewer rows (--fraction)")
    return " or ".join(ways) or "use a machine with more memory"


def _less_in_steps(start: Start, options: TrainOptions) -> str:
    """What takes less memory in the steps of a new run."""
    ways = [
        fewer_tokens(start),
        "--lora RANK" if options.stage == "instruct" and not options.lora_rank else "",
        "" if options.bf16 else "--bf16",
    ]
    return " or ".join(filter(None, ways)) or "a smaller language model"


def _start(
    vision: str | None,
    lm: str | None,
    vlm: Path | None,
    chat_template: Path | None,
    start: Path | None,
    options: TrainOptions,
) -> Start:
    if chat_template and not vlm:
        raise InputError(f"--chat-template {chat_template}: is for --vlm")
    if options.stage == "instruct":
        if start is None:
            raise InputError("--stage instruct: give the aligned checkpoint to go on from with --from")
        if vision or lm or vlm:
            raise InputError("--stage instruct: --vision, --lm and --vlm are those of --from; leave them out")
        return start_instruct(start, options)
    if start is not None:
        raise InputError(f"--from {start}: is for --stage instruct")
    if vlm is not None:
        if vision or lm:
            raise InputError("--vlm: --vision and --lm are the model's own; leave them out")
        return start_whole(vlm, options, template=read_template(chat_template) if chat_template else None)
    if not vision or not lm:
        raise InputError("--vision and --lm: give both, folders in Hugging Face format or hub ids; or --vlm")
    return start_align(vision, lm, options)
