"""The latency benchmark on this machine, for the bundles that the README speaks of.

    python -m tinyalign_edge.bench.latency [--only demo caltech siglip-b-smollm2-135m] [--threads 1 2]
        [--repetitions 30]

`demo` and `caltech` are the bundles of `bench/demo.py` and `bench/caltech.py`, which must be there. The last one has
random weights in the full shapes of SigLIP-B/16-224 and SmolLM2-135M, 196 visual tokens, and a memory of synthetic
entries; it is made where it is missing. Needs an idle machine; writes `bench/results/latency-NAME.json` and the tables
between the marks in `README.md`.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinyalign_edge.bench.random_bundle import random_bundle, synthetic_bank
from tinyalign_edge.bench.record import RESULTS
from tinyalign_edge.bundle import MANIFEST, MEMORY_DIR
from tinyalign_edge.config import read_json, write_json
from tinyalign_edge.errors import InputError
from tinyalign_edge.folders import whole_folder
from tinyalign_edge.latency.output import markdown, result_head, result_sheets
from tinyalign_edge.latency.rows import Result, read_result
from tinyalign_edge.latency.run import bench
from tinyalign_edge.latency.work import Work

COMMAND = "python -m tinyalign_edge.bench.latency"
FULL = "siglip-b-smollm2-135m"
PROMPT_TOKENS, VISUAL_TOKENS = 24, 196  # of the full shapes
ENTRIES, ENTRY_TOKENS = 10_000, 12
CONTEXTS = (256, 1024, 4096)
MADE_BY = {"demo": "python -m tinyalign_edge.bench.demo", "caltech": "python -m tinyalign_edge.bench.caltech"}
BEGIN, END = "<!-- latency: made by `just latency` -->", "<!-- end of latency -->"
GOAL_FILE = "first-token.json"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, store, and show the last one in the README."""
    given = _arguments(argv)
    folders = {
        "demo": given.runs / "demo" / "bundle",
        "caltech": given.runs / "caltech" / "tokens-bundle",
        FULL: full_bundle(given.runs) if FULL in given.only else Path(),
    }
    for name in given.only:
        if not (folders[name] / MANIFEST).is_file():
            raise InputError(f"{folders[name]}: no bundle; make it with '{MADE_BY[name]}'")
    for name in given.only:
        print(name, flush=True)
        work = full_work(given.repetitions) if name == FULL else Work(repetitions=given.repetitions)
        result = bench([folders[name]], threads=given.threads, work=work, profile=True)
        threads = " ".join(map(str, given.threads))
        command = f"{COMMAND} --only {name} --threads {threads} --repetitions {given.repetitions}"
        path = RESULTS / f"latency-{name}.json"
        write_json(path, {"command": command, **result.to_json()})
        print(markdown(result_head(result), result_sheets(result)))
        print(path)
    if FULL in given.only:
        update_readme(RESULTS.parents[1] / "README.md")


def full_work(repetitions: int) -> Work:
    """What is asked of the bundle in full shapes."""
    return Work(prompt_tokens=PROMPT_TOKENS, contexts=CONTEXTS, repetitions=repetitions)


def full_bundle(runs: Path) -> Path:
    """The bundle in full shapes below `runs`; made where it is missing."""
    return shaped_bundle(runs / "latency" / FULL, "siglip-b16-224", "smollm2-135m", VISUAL_TOKENS, ENTRIES)


def shaped_bundle(folder: Path, encoder: str, language: str, visual_tokens: int, entries: int) -> Path:
    """The bundle `folder` with random weights in these shapes and a synthetic memory; one that is there stays."""
    if (folder / MANIFEST).is_file():
        return folder
    work = folder.with_name(f"{folder.name}-work")
    shutil.rmtree(work, ignore_errors=True)
    made = random_bundle(encoder, language, work, visual_tokens=visual_tokens)
    shutil.rmtree(made.folder / MEMORY_DIR)
    synthetic_bank(made.folder / MEMORY_DIR, made.manifest, entries, ENTRY_TOKENS)
    with whole_folder(folder, marker=MANIFEST) as target:
        shutil.copytree(made.folder, target, dirs_exist_ok=True)
    shutil.rmtree(work)
    return folder


def update_readme(readme: Path) -> None:
    """Write what is stored of the full shapes between the marks."""
    text = readme.read_text("utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError(f"{readme}: the marks {BEGIN} and {END} are missing; put them where the tables belong")
    result = read_result(RESULTS / f"latency-{FULL}.json")
    goal = RESULTS / GOAL_FILE
    lines = [*_sentences(result), *([_goal_sentence(read_json(goal))] if goal.exists() else []), ""]
    sheets = [sheet for sheet in result_sheets(result) if "most expensive" not in sheet.title]
    lines += [markdown(result_head(result), sheets)]
    readme.write_text("\n".join([before + begin, *lines, end + after]), "utf-8")


def _sentences(result: Result) -> list[str]:
    """The second question beside the first, with as many threads as were measured."""
    threads = max(row.threads for row in result.rows if row.threads)
    ms = {row.stage: row.median for row in result.rows if (row.memory, row.threads) == (True, threads)}
    share = ms["second_question_first_token"] / ms["first_token"]
    first = f"the first token comes {ms['first_token']:.0f} ms after the picture's bytes"
    return [f"With {threads} threads and memory {first}, that of a second question about it after {share:.0%} of that."]


def _goal_sentence(found: dict[str, Any]) -> str:
    median = found["median_ms"]
    return (
        f"Measured beside: llama.cpp Q8_0 reads the same {found['tokens']} tokens in {median['llama.cpp']:.0f} ms and "
        f"onnxruntime runs the encoder in float32 in {median['encoder']:.0f} ms; our first token takes "
        f"{found['share']:.1%} of their sum (goal: {found['goal']:.0%}; `python -m tinyalign_edge.bench.first_token`)."
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    names = [*MADE_BY, FULL]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=names, choices=names)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--runs", type=Path, default=RESULTS.parents[1] / "runs")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
