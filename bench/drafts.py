"""What drafts from the memory save: tokens a pass, time a token, and whether answers stay the same.

    python -m tinyalign_edge.bench.drafts BUNDLE --data rows.json --images DIR [--question TEXT] [--teach]
        [--limit 100] [--new-tokens 32] [--rounds 5] [--threads 2] [--name drafts]

The first question of every row (or `--question`) is answered with drafts and without, in turn, in three arms: with the
picture's own memories, with another picture's, and with none. `--teach` first adds every picture with its caption (or
its reference answer) to a copy of the memory, so that the own memory holds what may be said. Answers are compared
in every round; those of the first are not timed. Needs an idle machine; writes `bench/results/NAME.json`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import tinyalign_edge as ta
from tinyalign_edge.bench.record import record
from tinyalign_edge.data import Row, read_rows
from tinyalign_edge.evaluate import partners
from tinyalign_edge.progress import progress

COMMAND = "python -m tinyalign_edge.bench.drafts"
LONG = 8  # tokens of an answer from which the goal of twice the speed counts

Asked = tuple[ta.EncodedImage, str]


def main() -> None:
    """Measure every arm and print a table."""
    given = _arguments()
    rows = list({row.image: row for row in read_rows(given.data, given.images)}.values())[: given.limit]
    with tempfile.TemporaryDirectory() as scratch:
        own = Path(scratch) / "memory" if given.teach else None
        with ta.load(given.bundle, threads=given.threads, memory_dir=own) as model:
            if given.teach:
                teach(model, rows)
            arms = {name: asked(model, rows, name, given.question) for name in ("own", "another's", "none")}
            found = {name: measure(model, pairs, given.new_tokens, given.rounds) for name, pairs in arms.items()}
            result = {"bundle": model.manifest.name, "threads": given.threads, "taught": given.teach, "arms": found}
    print_table(found)
    question = f" --question '{given.question}'" if given.question else ""
    options = f"--limit {given.limit} --new-tokens {given.new_tokens} --rounds {given.rounds} --threads {given.threads}"
    command = f"{COMMAND} {given.bundle.name} --data {given.data.name}{question}{' --teach' * given.teach} {options}"
    print(record(given.name, command, result))


def print_table(arms: Mapping[str, Mapping[str, Any]]) -> None:
    """The figures that `measure` gave for each arm."""
    print(f"{'memory':<12}{'answers':>9}{'differ':>8}{'tokens a pass':>15}{'speed-up':>10}{f'from {LONG} tokens':>16}")
    for name, arm in arms.items():
        long = "" if arm["speed_up_long"] is None else f"{arm['speed_up_long']:.2f}"
        figures = f"{arm['tokens_a_pass']:>15.2f}{arm['speed_up']:>10.2f}{long:>16}"
        print(f"{name:<12}{arm['answers']:>9}{arm['differ']:>8}{figures}")


def teach(model: ta.Model, rows: Sequence[Row]) -> None:
    """Add what is said of every picture to the memory."""
    if model.memory is None:
        raise ta.InputError("--teach: this bundle has no memory")
    with progress("Teaching", len(rows)) as advance:
        for row in rows:
            model.memory.add(row.path, row.memory_turns[0].answer, source=row.id)
            advance()


def asked(model: ta.Model, rows: Sequence[Row], arm: str, question: str | None) -> list[Asked]:
    """Pictures with the memories of an arm, and what is asked about them."""
    others = partners([row.image for row in rows])
    pairs = []
    for row, other in zip(rows, others, strict=True):
        memories = {"own": None, "none": ()}.get(arm, model.encode(rows[other].path).memories)
        pairs.append((model.encode(row.path, memories=memories), question or row.turns[0].question))
    return pairs


def measure(model: ta.Model, pairs: Sequence[Asked], new_tokens: int, rounds: int) -> dict[str, Any]:
    """The figures of one arm; speed-ups are ratios of the decoding times of all answers, median of the rounds."""
    times: dict[bool, list[list[float]]] = {True: [], False: []}
    answers: dict[bool, list[ta.Answer]] = {}
    differ: set[int] = set()
    with progress("Asking", 2 * (rounds + 1) * len(pairs)) as advance:
        for repetition in range(rounds + 1):  # the first one fills the cache of prefixes
            for drafts in (False, True):
                answers[drafts] = []
                for image, question in pairs:
                    answers[drafts].append(model.ask(image, question, max_new_tokens=new_tokens, drafts=drafts))
                    advance()
                if repetition:
                    times[drafts].append([_decoding_ms(answer) for answer in answers[drafts]])
            both = zip(answers[True], answers[False], strict=True)
            differ |= {number for number, (a, b) in enumerate(both) if a.text != b.text}
    long = np.array([answer.tokens >= LONG for answer in answers[False]])
    plain, drafted = np.array(times[False]), np.array(times[True])  # (rounds, answers) ms
    ratios = plain.sum(axis=1) / drafted.sum(axis=1)
    long_ratios = plain[:, long].sum(axis=1) / drafted[:, long].sum(axis=1) if long.any() else None
    produced = sum(decoded_tokens(answer) for answer in answers[True])
    return {
        "answers": len(pairs),
        "differ": len(differ),
        "long_answers": int(long.sum()),
        "mean_tokens": float(np.mean([answer.tokens for answer in answers[False]])),
        "tokens_a_pass": produced / max(1, sum(answer.passes for answer in answers[True])),
        "speed_up": float(np.median(ratios)),
        "speed_up_long": None if long_ratios is None else float(np.median(long_ratios)),
        "speed_up_samples": ratios.tolist(),
        "speed_up_long_samples": None if long_ratios is None else long_ratios.tolist(),
    }


def decoded_tokens(answer: ta.Answer) -> int:
    """Tokens that passes after the prompt gave, the one that ends the answer included."""
    return answer.tokens - 1 + (answer.finish_reason == "stop") if answer.tokens else 0


def _decoding_ms(answer: ta.Answer) -> float:
    return answer.timings_ms["per_token"] * max(1, decoded_tokens(answer))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--question")
    parser.add_argument("--teach", action="store_true")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="drafts")
    return parser.parse_args()


if __name__ == "__main__":
    main()
