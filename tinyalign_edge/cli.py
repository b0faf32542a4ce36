"""The command line: parse, call one public function, print."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from tinyalign_edge import cli_bench, cli_chat, cli_memory
from tinyalign_edge.cli_memory import Json, MemoryDir
from tinyalign_edge.errors import DegradedWarning, InputError, MissingExtraError, TinyAlignError

app = typer.Typer(
    name="tinyalign-edge",
    help="Train, export to int8 ONNX and run small vision-language models with a compact memory, on CPU.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_memory.app, name="memory")
app.command("chat")(cli_chat.chat)
app.command("bench")(cli_bench.bench)

INTERRUPTED = 130
NOT_EXPORTED = "its memory is for comparison only and cannot be exported"

NoMemory = Annotated[bool, typer.Option("--no-memory", help="Answer from the picture alone.")]
DataFile = Annotated[Path, typer.Option(help="LLaVA conversations, .json or .jsonl.")]
ImagesFolder = Annotated[Path, typer.Option(help="The folder that the rows' image paths start from.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where bundle, data, report and pictures go.")] = Path("demo-out"),
    seed: Annotated[int, typer.Option(help="Of the world and of training.")] = 0,
) -> None:
    """Make a small model from nothing, export it to int8, ask it ten questions."""
    from tinyalign_edge.demo.run import run_demo

    run_demo(out, seed=seed)


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="The checkpoint folder to write.")],
    data: Annotated[
        list[str] | None,
        typer.Option(help="Conversations: FILE, or ORG/NAME[/CONFIG][@SPLIT] on the hub; repeatable; FILE:WEIGHT."),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="The folder that the rows' image paths start from.")] = None,
    vision: Annotated[str | None, typer.Option(help="Vision encoder: a folder, or a hub id.")] = None,
    lm: Annotated[str | None, typer.Option(help="Language model: a folder, or a hub id.")] = None,
    vlm: Annotated[Path | None, typer.Option(help="A whole vision-language model; only a memory is trained.")] = None,
    recipe: Annotated[str | None, typer.Option(help="A TOML file, or the name of one that ships.")] = None,
    stage: Annotated[str, typer.Option(help="align: towers frozen; instruct: the LM trains too.")] = "align",
    start: Annotated[Path | None, typer.Option("--from", help="The checkpoint that instruct goes on from.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="What the memory keeps: tokens (default), latents, hybrid (both), paper or none.")
    ] = None,
    fraction: Annotated[float | None, typer.Option(help="Share of the pictures to train on; the bank's too.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data (default 3).")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps, instead of epochs; learning to copy adds a quarter.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows a step, of all processes (default 32).")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Rows a process computes at once; less memory.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak; warmed up, then cosine (default 1e-3).")] = None,
    lm_learning_rate: Annotated[float | None, typer.Option(help="Of the LM in instruct (default 2e-5).")] = None,
    lora: Annotated[int | None, typer.Option(help="Rank of adapters in instruct; without: the whole LM.")] = None,
    dropout: Annotated[float | None, typer.Option(help="Of what the connector reads (default 0).")] = None,
    bf16: Annotated[bool | None, typer.Option("--bf16/--no-bf16", help="Compute in bfloat16.")] = None,
    connector: Annotated[str | None, typer.Option(help="pooled (default), pixel_shuffle or mlp.")] = None,
    visual_tokens: Annotated[int | None, typer.Option(help="Tokens a picture becomes (pooled: 16).")] = None,
    neighbours: Annotated[
        int | None, typer.Option("-k", "--neighbours", help="Memory entries read (default 4).")
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="Pixels a side, if not the encoder's own size.")] = None,
    key: Annotated[str | None, typer.Option(help="picture, question: of both, or fused (default with paper).")] = None,
    key_grid: Annotated[int | None, typer.Option(help="Keys see N x N regions of a picture (default 1).")] = None,
    key_dim: Annotated[int | None, typer.Option(help="Numbers (bytes) of a picture's key (default 128).")] = None,
    value_tokens: Annotated[int | None, typer.Option(help="Tokens kept of an entry (default 24).")] = None,
    gate: Annotated[
        bool | None, typer.Option("--gate/--no-gate", help="Let training close memory tokens (default with --vlm).")
    ] = None,
    latents: Annotated[int | None, typer.Option(help="Latents of an entry (default 8; hybrid: 2; paper: 32).")] = None,
    latent_dim: Annotated[int | None, typer.Option(help="Numbers of a latent (default 96).")] = None,
    chat_template: Annotated[Path | None, typer.Option(help="A Jinja file in place of the --vlm's own.")] = None,
    copy_words: Annotated[
        bool | None,
        typer.Option("--copy/--no-copy", help="Whether answers may copy the memory's words (default with token ids)."),
    ] = None,
    episodes: Annotated[
        float | None, typer.Option(help="Share of rows with made-up names, to learn to copy (default 0.1).")
    ] = None,
    memory_dropout: Annotated[
        float | None, typer.Option(help="Share of rows that see no neighbours, to learn to see alone.")
    ] = None,
    memory_from: Annotated[
        float | None,
        typer.Option(help="Share of the steps before the memory is read (new connectors: 0.25)."),
    ] = None,
    reconstruct: Annotated[
        float | None,
        typer.Option(metavar="WEIGHT", help="Of the own loss of latents: they say their text (default 0)."),
    ] = None,
    freeze_values: Annotated[
        bool | None,
        typer.Option("--freeze-values/--no-freeze-values", help="Whether the latents' encoder stays as it begins."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: Annotated[int | None, typer.Option(help="Of the split, the order and the weights (default 0).")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between evaluations (default 50).")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out bad rows, and say how many.")] = False,
    cache_features: Annotated[Path | None, typer.Option(help="Keep the encoder's features here between runs.")] = None,
    loaders: Annotated[
        int | None, typer.Option(help="Processes that make batches ready; for a GPU (default 0).")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in --out.")] = False,
) -> None:
    """Train connector and memory between a frozen vision encoder and a language model, frozen or not."""
    from tinyalign_edge.train.command import TrainCommand, run_command

    given = {
        "memory": memory and _one_of("--memory", memory, "tokens", "latents", "hybrid", "paper", "none"),
        "key": key and _one_of("--key", key, "picture", "question", "fused"),
        "key_dim": key_dim, "value_tokens": value_tokens, "gate": gate, "latents": latents, "latent_dim": latent_dim,
        "copy_words": copy_words, "episodes": episodes, "memory_dropout": memory_dropout,
        "memory_from": memory_from, "reconstruct": reconstruct, "freeze_values": freeze_values,
        "connector": connector and _one_of("--connector", connector, "pooled", "pixel_shuffle", "mlp"),
        "fraction": fraction, "epochs": epochs, "steps": steps, "batch_size": batch_size, "micro_batch": micro_batch,
        "learning_rate": learning_rate, "lm_learning_rate": lm_learning_rate, "lora_rank": lora, "dropout": dropout,
        "bf16": bf16,
        "visual_tokens": visual_tokens, "k": neighbours, "image_size": image_size, "key_grid": key_grid, "seed": seed,
        "eval_every": eval_every, "skip_bad": skip_bad, "cache_features": cache_features,
        "loaders": loaders,
        "device": _one_of("--device", device, "auto", "cpu", "cuda"),
    }  # fmt: skip
    wanted = TrainCommand(
        stage=_one_of("--stage", stage, "align", "instruct"),
        options={name: value for name, value in given.items() if value is not None},
        data=tuple(data or ()), images=images, vision=vision, lm=lm, vlm=vlm,
        chat_template=chat_template, start=start, out=out, resume=resume, recipe=recipe,
    )  # fmt: skip
    if config := run_command(wanted):
        export = f"next: tinyalign-edge export {out} --out BUNDLE"
        print(f"checkpoint: {out}\n{export if config.memory.exportable else NOT_EXPORTED}")


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="A folder that 'train' wrote, or a vision-language model's.")],
    out: Annotated[Path, typer.Option(help="The bundle folder to write; an old bundle there is replaced.")],
    precision: Annotated[str, typer.Option(help="int8 or fp32.")] = "int8",
    lm_bits: Annotated[str, typer.Option(help="Of the language model's weights in int8: 8 or 4.")] = "8",
    kv: Annotated[str, typer.Option(help="The cache of keys and values: fp32 or int8.")] = "fp32",
    target: Annotated[
        str, typer.Option(help="Processors: auto (like this one), vnni, arm64, avx2, portable.")
    ] = "auto",
    calibration: Annotated[Path | None, typer.Option(help="Rows to find the formats on (default: training's).")] = None,
    images: Annotated[Path | None, typer.Option(help="The folder that their image paths start from.")] = None,
    chat_template: Annotated[Path | None, typer.Option(help="A Jinja file in place of a whole model's own.")] = None,
    allow_degraded: Annotated[
        bool, typer.Option("--allow-degraded", help="Write it even if it is not proved.")
    ] = False,
) -> None:
    """Write a bundle, proved against torch on held-out samples."""
    from tinyalign_edge.export.processor import own_target
    from tinyalign_edge.export.run import ExportOptions
    from tinyalign_edge.export.run import export as run
    from tinyalign_edge.report import print_gate

    processors = _one_of("--target", target, "auto", "portable", "vnni", "avx2", "arm64")
    options = ExportOptions(
        precision=_one_of("--precision", precision, "int8", "fp32"),
        lm_bits=4 if _one_of("--lm-bits", lm_bits, "8", "4") == "4" else 8,
        kv=_one_of("--kv", kv, "fp32", "int8"),
        target=own_target() if processors == "auto" else processors,
        calibration=calibration,
        images=images,
        chat_template=chat_template,
        allow_degraded=allow_degraded,
    )
    manifest = run(folder, out, options)
    print_gate(manifest)
    print(f"bundle: {out}\nnext: tinyalign-edge ask {out} IMAGE QUESTION")


@app.command()
def ask(
    bundle: Annotated[Path, typer.Argument(help="A folder that 'export' wrote.")],
    image: Annotated[Path, typer.Argument(help="A picture.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    no_memory: NoMemory = False,
    memory_dir: MemoryDir = None,
    as_json: Json = False,
) -> None:
    """Answer a question about a picture, as it is generated."""
    from tinyalign_edge.report import answer_json
    from tinyalign_edge.runtime.model import load

    with load(bundle, memory=not no_memory, memory_dir=memory_dir) as model:
        stream = model.stream(image, question)
        for piece in stream:
            if not as_json:
                print(piece, end="", flush=True)
        print() if not as_json else print(json.dumps(answer_json(stream.result()), ensure_ascii=False))


@app.command("eval")
def evaluate(
    target: Annotated[Path, typer.Argument(help="A checkpoint or a bundle.")],
    data: DataFile,
    images: ImagesFolder,
    no_memory: NoMemory = False,
    shuffle_memory: Annotated[bool, typer.Option("--shuffle-memory", help="Another picture's memories.")] = False,
    emi: Annotated[bool, typer.Option("--emi", help="What picture and memory tell, in nats; no answers.")] = False,
    limit: Annotated[int | None, typer.Option(help="Ask only the first questions.")] = None,
    as_json: Json = False,
) -> None:
    """Ask every question of a file, each alone, and score the answers."""
    from dataclasses import asdict

    from tinyalign_edge.emi import emi as measure
    from tinyalign_edge.evaluate import evaluate as run
    from tinyalign_edge.report import print_emi, print_scores

    if emi and (no_memory or shuffle_memory):
        raise InputError("--emi compares with and without memory itself; leave --no-memory and --shuffle-memory out")
    if emi:
        found = measure(target, data=data, images=images, limit=limit)
        print(json.dumps(asdict(found))) if as_json else print_emi(found)
        return
    if no_memory and shuffle_memory:
        raise InputError("--no-memory and --shuffle-memory: give one of them")
    mode = "none" if no_memory else "shuffled" if shuffle_memory else "own"
    scores = run(target, data=data, images=images, memory=mode, limit=limit)  # type: ignore[arg-type]
    if as_json:
        print(json.dumps(asdict(scores)))
    else:
        print_scores(scores)


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="A folder that 'export' wrote.")],
    expect_sha256: Annotated[str | None, typer.Option(help="SHA-256 that bundle.json must have.")] = None,
    as_json: Json = False,
) -> None:
    """Check a bundle's hashes and shapes, and that this machine computes what the exporter saw."""
    from dataclasses import asdict

    from tinyalign_edge.report import print_verified
    from tinyalign_edge.runtime.verify import verify as run

    verified = run(bundle, expect_sha256=expect_sha256)
    if as_json:
        print(json.dumps(asdict(verified)))
    else:
        print_verified(verified)


@app.command()
def inspect(
    bundle: Annotated[Path, typer.Argument(help="A folder that 'export' wrote.")],
    as_json: Json = False,
    prompt: Annotated[bool, typer.Option("--prompt", help="Print as JSON what stands around a question.")] = False,
) -> None:
    """Show what is inside a bundle."""
    from tinyalign_edge.bundle import open_bundle
    from tinyalign_edge.config import to_json
    from tinyalign_edge.prompt import Prompt, load_tokenizer
    from tinyalign_edge.report import print_bundle

    manifest = open_bundle(bundle)
    if prompt:
        layout = Prompt(manifest.prompt, load_tokenizer(bundle / manifest.tokenizer_file)).layout()
        print(json.dumps(to_json(layout), ensure_ascii=False))
    elif as_json:
        print(json.dumps(to_json(manifest), ensure_ascii=False))
    else:
        print_bundle(bundle, manifest)


def _one_of(option: str, value: str, *known: str) -> Any:
    if value not in known:
        raise InputError(f"{option} {value}: not one of {', '.join(known)}")
    return value


def main() -> None:
    """Run the command line; every error is one line on standard error."""
    try:
        sys.exit(_run())
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _run() -> int:
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    warnings.showwarning = _show_warning
    try:
        code = int(app(standalone_mode=False) or 0)
    except TinyAlignError as error:
        return _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except ModuleNotFoundError as error:
        return _fail(str(_missing_extra(error)), MissingExtraError.exit_code)
    except BrokenPipeError:
        raise
    except Exception as error:
        if os.environ.get("TINYALIGN_DEBUG"):
            raise
        if wrong_usage := getattr(error, "format_message", None):  # click's, whichever package typer brings it in
            return _fail(f"{wrong_usage()} (see --help)", 2)
        first = (str(error).strip().splitlines() or [""])[0]
        return _fail(f"{type(error).__name__}: {first} (set TINYALIGN_DEBUG=1 for the traceback)", 1)
    return _fail("interrupted", code) if code == INTERRUPTED else code  # typer may give the code and no message


_show_others = warnings.showwarning


def _show_warning(message: Warning | str, category: type[Warning], *rest: Any, **options: Any) -> None:
    """Ours is one line on standard error, as errors are; those of others stay as they are."""
    if issubclass(category, DegradedWarning):
        print(f"warning: {message}", file=sys.stderr)
    else:
        _show_others(message, category, *rest, **options)


def _missing_extra(error: ModuleNotFoundError) -> MissingExtraError:
    extra = "train" if "train" in sys.argv[1:2] else "export"
    return MissingExtraError(f"this command needs {error.name}: pip install 'tinyalign-edge[{extra}]'")


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
