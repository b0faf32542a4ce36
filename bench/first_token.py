"""The first token in full shapes beside llama.cpp's prefill and the encoder in float32, the two parts of it elsewhere.

    python -m tinyalign_edge.bench.first_token [--threads 2] [--rounds 6] [--repetitions 5]

Ours: from the picture's bytes to the first token, with 196 visual tokens, the memory's, and 24 of text, in the bundle
of `bench/latency.py`. Beside it: llama.cpp (Q8_0) reads as many tokens, and onnxruntime runs optimum's float32 export
of the encoder. The three take turns, each checked first; the goal is a quarter of the others' sum. Needs an idle
machine and `just peers-setup`; writes `bench/results/first-token.json`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tinyalign_edge.bench.latency import GOAL_FILE, full_bundle, full_work
from tinyalign_edge.bench.peers.client import Worker
from tinyalign_edge.bench.peers.measure import Folders, Result, loaded, prepare
from tinyalign_edge.bench.peers.plan import ENCODER_ENGINES, LANGUAGE_ENGINES, Engine, Part, Phase
from tinyalign_edge.bench.record import RESULTS, record
from tinyalign_edge.config import from_json
from tinyalign_edge.errors import InputError, TinyAlignError
from tinyalign_edge.latency.measure import Facts, Setting
from tinyalign_edge.latency.run import Checked, ask_child, time_once
from tinyalign_edge.latency.work import Work
from tinyalign_edge.progress import progress

COMMAND = "python -m tinyalign_edge.bench.first_token"
GOAL = 0.25
LANGUAGE, ENCODER = "smollm2-135m", "siglip-b16-224"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure in turns and record."""
    given = _arguments(argv)
    setting = Setting(str(full_bundle(given.runs)), "ours", True, given.threads)
    work = Work(prompt_tokens=full_work(1).prompt_tokens, new_tokens=2, repetitions=given.repetitions)
    checked = Checked(setting, from_json(Facts, ask_child("check", setting, work), "facts"))
    with ExitStack() as stack:
        folders = Folders((given.runs / "peers").resolve())
        llama, encoder = (
            _opened(stack, Part(model, given.threads), _engine(engines, name), folders)
            for model, engines, name in (
                (LANGUAGE, LANGUAGE_ENGINES, "llama.cpp q8_0"),
                (ENCODER, ENCODER_ENGINES, "optimum fp32"),
            )
        )
        result = measure(checked, work, llama, encoder, given.rounds)
    median = result["median_ms"]
    print(
        " ".join(f"{name} {ms:.1f} ms" for name, ms in median.items()), f"share {result['share']:.1%}, goal {GOAL:.0%}"
    )
    command = f"{COMMAND} --threads {given.threads} --rounds {given.rounds} --repetitions {given.repetitions}"
    print(record(Path(GOAL_FILE).stem, command, result))


def measure(checked: Checked, work: Work, llama: Worker, encoder: Worker, rounds: int) -> dict[str, Any]:
    """Samples of the three, in turns."""
    facts = checked.facts
    tokens = facts.visual_tokens + facts.memory_tokens + facts.prompt_tokens
    ms: dict[str, list[float]] = {"ours": [], "llama.cpp": [], "encoder": []}
    with progress("Timing", 3 * rounds) as advance:
        for _ in range(rounds):
            rows = time_once(checked, work, work.repetitions, lambda: None)
            ms["ours"] += next(row.samples for row in rows if row.stage == "first_token")
            advance()
            for name, worker, phase in (
                ("llama.cpp", llama, Phase("prefill", tokens)),
                ("encoder", encoder, Phase("encode")),
            ):
                worker.ask(**phase.request())  # after a pause the first one is slower
                ms[name] += [1e3 * worker.ask(**phase.request())["seconds"] for _ in range(work.repetitions)]
                advance()
    median = {name: statistics.median(samples) for name, samples in ms.items()}
    share = median["ours"] / (median["llama.cpp"] + median["encoder"])
    sizes = {"visual_tokens": facts.visual_tokens, "memory_tokens": facts.memory_tokens, "tokens": tokens}
    about = {"threads": checked.setting.threads, **sizes}
    return {**about, "goal": GOAL, "share": share, "median_ms": median, "samples_ms": ms}


def _opened(stack: ExitStack, part: Part, engine: Engine, folders: Folders) -> Worker:
    """The engine in a process with its model loaded and checked."""
    if not engine.python(folders.root).exists():
        raise InputError(f"{engine.label}: its environment is missing; make it with 'just peers-setup'")
    result = Result(failed=prepare(part, [engine], folders, print))
    workers = stack.enter_context(loaded(part, [engine], folders, result, print))
    if engine not in workers:
        raise TinyAlignError(f"{engine.label}: {result.failed[engine.label]}")
    return workers[engine]


def _engine(engines: Sequence[Engine], label: str) -> Engine:
    return next(engine for engine in engines if engine.label == label)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=RESULTS.parents[1] / "runs")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
