"""`tinyalign-edge bench`: the latency of bundles on this device, and two results side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tinyalign_edge.errors import InputError

COMPARE = Path("compare")


def bench(
    bundles: Annotated[
        list[Path], typer.Argument(help="Folders that 'export' wrote; or: compare A.json B.json", show_default=False)
    ],
    threads: Annotated[
        str | None, typer.Option(help="Numbers, such as 1,2,4 (default: these, up to the cores).")
    ] = None,
    visual_tokens: Annotated[
        int | None, typer.Option(help="The language model reads so many of a picture (default: the bundle's).")
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(help="Of chat template and question (default: an ordinary question's).")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Of an answer; none ends before.")] = 32,
    context: Annotated[
        str | None,
        typer.Option(help="Lengths at which per_token is measured, such as 256,1024 (default: the answer's)."),
    ] = None,
    repetitions: Annotated[int, typer.Option(help="That count, of each setting, in at most 5 processes.")] = 20,
    warmup: Annotated[int, typer.Option(help="Repetitions of each process that do not count.")] = 2,
    output: Annotated[str, typer.Option(help="table, md, csv, json or jsonl.")] = "table",
    plot: Annotated[Path | None, typer.Option(help="A PNG to write: stages, and time a token over context.")] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Show the ten most expensive graph nodes.")] = False,
) -> None:
    """Measure every stage of answering, with and without memory; or compare two stored results."""
    from tinyalign_edge.latency.output import FORMATS, comparison_text, result_text

    if output not in FORMATS:
        raise InputError(f"--output {output}: not one of {', '.join(FORMATS)}")
    form: Any = output
    if bundles[0] == COMPARE:
        print(comparison_text(_compare(bundles[1:]), form))
        return
    from tinyalign_edge.latency.plot import check_plot, draw
    from tinyalign_edge.latency.run import bench as run
    from tinyalign_edge.latency.work import Work

    if plot is not None:
        check_plot(plot)
    work = Work(visual_tokens, prompt_tokens, new_tokens, _numbers("--context", context), repetitions, warmup)
    result = run(bundles, threads=_numbers("--threads", threads), work=work, profile=profile)
    if plot is not None:
        draw(result, plot)
    print(result_text(result, form))


def _compare(files: list[Path]) -> Any:
    from tinyalign_edge.latency.compare import compare
    from tinyalign_edge.latency.rows import read_result

    if len(files) != 2:
        raise InputError(f"compare: takes two files that 'bench --output json' printed, not {len(files)}")
    return compare(*map(read_result, files))


def _numbers(option: str, given: str | None) -> tuple[int, ...]:
    """The numbers of a list with commas; none of None."""
    parts = given.split(",") if given is not None else []
    if not all(part.strip().isdecimal() for part in parts):
        raise InputError(f"{option} {given}: must be numbers with commas between them, such as 1,2,4")
    return tuple(int(part) for part in parts)
