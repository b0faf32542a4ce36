"""The tables of `docs/study.md`, as Markdown, from whatever parts there are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from tinyalign_edge.bench.study.goals import Goal, goals
from tinyalign_edge.bench.study.plan import (
    ABLATIONS,
    ARMS,
    BANK_SHARES,
    BY_PICTURE,
    DATASETS,
    DROPOUT,
    FEW,
    MAIN,
    SEEDS,
    SHARES,
    SHORT_SETTINGS,
    TAUGHT,
    TRIED_ONCE,
    Kind,
    Run,
    plan,
    short,
    short_settings,
    trial_runs,
)
from tinyalign_edge.bench.study.seeds import Spread
from tinyalign_edge.bench.study.store import Results
from tinyalign_edge.bench.study.summary import (
    COMPARED,
    Summary,
    curve,
    find,
    last_loss,
    missing,
    over_seeds,
    steps_ratio,
)
from tinyalign_edge.bench.teach import SHOTS
from tinyalign_edge.export.card import markdown_table

NONE = "–"
NEXT = 4
TAUGHT_FIGURES = {"teach": "free", "teach_choices": "among choices", "teach_ceiling": "nearest entry's text"}
KINDS = (("open", "open", "score"), ("yes/no", "yes_no", "score_yes_no"))
INFORMATION = {
    "picture, model without memory": "image_of_baseline", "picture": "image", "memory, beyond the picture": "memory",
}  # fmt: skip
TITLES = {
    "baseline": "no memory", "baseline_apart": "no memory, a row for each question (seed 0)", "memory": "memory",
    "memory_by_picture": "memory, key of the picture alone", "shuffled_memory": "shuffled memory",
    "baseline_dropout": f"no memory, {DROPOUT:.0%} dropout before the connector",
    "memory_dropout": f"memory, {DROPOUT:.0%} dropout before the connector",
    "shuffled_by_picture": "shuffled memory, key of the picture alone",
    "shuffled_no_copy": "shuffled memory that cannot be copied",
    "same_text": "memory that always says the same words, not copied",
    "same_shuffled": "the same words, of other pictures, not copied: tells nothing",
}  # fmt: skip
SHORT_TITLES = {**TITLES, "memory": TITLES["memory_by_picture"], "shuffled_memory": TITLES["shuffled_by_picture"]}
OPTIONS = ("steps", "batch_size", "learning_rate", "warmup", "weight_decay", "bf16", "eval_every")


def state(done: Results, summary: Summary) -> str:
    """How much of the study there is."""
    parts = plan()
    lacking = missing(done, parts)
    if not lacking:
        return f"All {len(parts)} parts are done."
    left = ", ".join(f"{count} of {name}" for name, count in Counter(part.split(".")[0] for part in lacking).items())
    return (
        f"**Not finished**: {len(parts) - len(lacking)} of {len(parts)} parts are done. Missing: {left}, the next ones "
        f"{', '.join(f'`{name}`' for name in lacking[:NEXT])}; `missing_parts` of `summary.json` names them all. "
        f"A figure that needs them is shown as {NONE}."
    )


def goal_table(done: Results, summary: Summary) -> str:
    """The goals and whether they are met."""
    marks = {True: "yes", False: "**no**", None: "not known"}
    head = ("data", "mean over seeds", "measured", "seeds", "demanded", "met")
    rows = [
        (goal.dataset, goal.text, _measured(goal), f"{len(goal.figure.by_seed)} of {len(SEEDS)}",
         f"{'at most' if goal.below else 'at least'} {goal.bound:g}", marks[goal.met])
        for goal in goals(done)
    ]  # fmt: skip
    return markdown_table(head, rows)


def _measured(goal: Goal) -> str:
    if goal.figure.never:
        return _not_reached(goal.figure.spread)
    return NONE if goal.measured is None else f"{goal.measured:.4f}"


def settings(done: Results, summary: Summary) -> str:
    """What the two arms of a data set have."""
    rows = []
    for name in DATASETS:
        used = find(done, Run(name, "memory"), "scores", "settings")
        if used:
            training = [f"{option} {_used(done, name, option)}" for option in OPTIONS]
            memory = used["memory"]
            read = (
                f"k {memory['k']}, key of {memory['key']}: {memory['key_dim']} numbers, grid {memory['key_grid']}, "
                f"at most {memory['value_tokens']} token ids an entry, {'' if memory['copy_dim'] else 'not '}copied, "
                f"any number of them, or none, in {memory['dropout']:.0%} of the rows"
            )
            rows.append((name, ", ".join(training), f"{used['connector']['visual_tokens']}", read))
    return markdown_table(("data", "training", "visual tokens", "memory"), rows) if rows else "Nothing yet."


def _used(done: Results, name: str, option: str) -> str:
    """What both arms have of an option of the training, with every seed."""

    def of(arm: str) -> str:
        runs = (Run(name, arm, seed=seed) for seed in SEEDS)
        found = (find(done, run, "scores", "settings", "training", option) for run in runs)
        return " or ".join(sorted({str(value) for value in found if value is not None}))

    without, with_memory = map(of, COMPARED)
    return without if without == with_memory else f"{without} ({with_memory} with memory)"


def losses(done: Results, summary: Summary) -> str:
    """Held-out losses at the end of the training and where they are lowest; steps to the baseline's, and losses of the
    test questions."""
    held, asked = [], []
    for name in DATASETS:
        final, lowest, test = (summary[name][key] for key in ("final_loss", "lowest_loss", "test_loss"))
        held.append((
            name, *(_spread(final[arm], "{:.4f}") for arm in COMPARED),
            _change(final["memory"]["mean"], final["baseline"]["mean"]),
            *(_spread(final[key], "{:.4f}") for key in ("memory_before_copying", "shuffled_memory")),
            *(_spread(lowest[arm], "{:.4f}") for arm in COMPARED),
        ))  # fmt: skip
        asked.append((
            name, _spread(summary[name]["steps_to_baseline_loss_ratio"], "{:.2f}"),
            *(_spread(test[arm], "{:.4f}") for arm in (*COMPARED, "empty_bank")),
        ))  # fmt: skip
    head = ("data", "held-out loss: no memory", "memory", "change", "memory, before the copy term's own steps",
            "shuffled memory", "lowest on the way: no memory", "memory")  # fmt: skip
    then = ("data", "steps to the baseline's held-out loss / its steps", "test loss: no memory", "memory",
            "memory, empty bank")  # fmt: skip
    return f"{markdown_table(head, held)}\n\n{markdown_table(then, asked)}"


def beside(done: Results, summary: Summary) -> str:
    """What the key of the picture alone does, and rows of one question without memory."""
    return _arms(summary, "beside", TITLES)


def fewer_steps(done: Results, summary: Summary) -> str:
    """What the memory buys where the training is short."""
    return _arms(summary, "short", SHORT_TITLES)


def _arms(summary: Summary, group: str, titles: dict[str, str]) -> str:
    rows = []
    for name in SHORT_SETTINGS:
        part = summary[name][group]
        for arm in part["final_loss"]:
            scores = (part[key][str(share)][arm] for key in ("score", "score_yes_no") for share in (100, FEW))
            ratio = NONE if arm == "baseline" else _spread(part["steps_to_baseline_loss_ratio"][arm], "{:.2f}")
            losses = (_spread(part[key][arm], "{:.4f}") for key in ("final_loss", "test_loss"))
            others = (part[key][arm] for key in ("teach", "teach_ceiling"))
            empty = (part["empty_bank"][key][arm] for key in ("open", "yes_no"))
            rows.append((name, titles[arm], *losses, ratio, *map(_share, (*scores, *others, *empty))))
    head = ("data", "arm", "held-out loss", "test loss", "steps to the baseline's held-out loss / its steps",
            "open", f"open, {FEW} % of the data", "yes/no", f"yes/no, {FEW} % of the data",
            f"{SHOTS[-1]} taught examples a class", "its ceiling", "empty bank: open", "yes/no")  # fmt: skip
    return markdown_table(head, rows)


def shares(done: Results, summary: Summary) -> str:
    """Exact match against the share of the data."""
    rows = []
    for name in DATASETS:
        for questions, key in _kinds(done, name):
            for arm, title in (
                ("baseline", "no memory"),
                ("memory", "memory"),
                ("full_bank", "memory, bank of all data"),
                ("copy_neighbour_of_share", "copy the nearest answer"),
            ):
                found = summary[name][key].get(arm)
                if found and any(figures["seeds"] for figures in found.values()):
                    rows.append((name, questions, title, *(_share(found.get(str(share))) for share in SHARES)))
    return markdown_table(("data", "questions", "arm", *(f"{share} %" for share in SHARES)), rows)


def controls(done: Results, summary: Summary) -> str:
    """What an answer is worth without the model, and the model without its own memory."""
    arms = ("empty_bank", "shuffled_memory")
    rows = []
    for name in DATASETS:
        for questions, key in _kinds(done, name):
            part = summary[name][key]
            found = (part["baseline"]["100"], part["memory"]["100"], *(part[a] for a in (*arms, "copy_neighbour")))
            rows.append((name, questions, *map(_share, found)))
        loss = summary[name]["test_loss"]
        rows.append((name, "test loss", *(_spread(loss[a], "{:.4f}") for a in (*COMPARED, *arms)), NONE))
    head = ("data", "questions", "no memory", "memory", "memory, empty bank", "shuffled memory",
            "copy the nearest answer")  # fmt: skip
    return markdown_table(head, [row for row in rows if any(cell != NONE for cell in row[2:])])


def information(done: Results, summary: Summary) -> str:
    """EMI."""
    keys = (*INFORMATION.values(), "shuffled")
    rows = [(name, *(_spread(summary[name]["emi"][key], "{:+.4f}") for key in keys)) for name in DATASETS]
    return markdown_table(("data", *INFORMATION, "shuffled memory, of a model trained with it"), rows)


def ablations(done: Results, summary: Summary) -> str:
    """One line an arm, seed 0."""
    rows = []
    for name in MAIN:
        baseline, memory = (short(name, arm) for arm in COMPARED)
        for arm in (baseline, memory, *ABLATIONS, *TRIED_ONCE):
            run = Run(name, arm)
            loss, last = find(done, run, "scores", "loss"), last_loss(done, run)
            if loss is not None:
                size = find(done, run, "scores", "bank", "entry_bytes")
                scores = (find(done, run, "scores", group, "exact_match") for group in ("open", "yes_no"))
                rows.append((name, arm, ARMS[arm].title, NONE if size is None else f"{size:.0f}",
                             NONE if last is None else f"{last:.4f}", f"{loss:.4f}", *map(_percent, scores),
                             _reached(steps_ratio(done, name, 0, arm, baseline_arm=baseline))))  # fmt: skip
    head = ("data", "arm", "", "bytes an entry", "held-out loss", "test loss", "open", "yes/no",
            "steps to the baseline's held-out loss / its steps")  # fmt: skip
    return markdown_table(head, rows)


def _reached(ratio: float | None) -> str:
    if ratio is None:
        return NONE
    return "not reached" if math.isinf(ratio) else f"{ratio:.2f}"


def banks(done: Results, summary: Summary) -> str:
    """A smaller bank for the same model."""
    rows = []
    for name in DATASETS:
        for share in BANK_SHARES:
            found = find(done, Run(name, "memory"), "bank_sizes", str(share))
            if found:
                scores = (_percent(found.get(group, {}).get("exact_match")) for group in ("open", "yes_no"))
                rows.append((name, f"{share} %", f"{found['entries']}", f"{found['loss']:.4f}", *scores))
    return markdown_table(("data", "bank", "entries", "test loss", "open", "yes/no"), rows)


def taught(done: Results, summary: Summary) -> str:
    """Right answers about classes that no training saw, after so many examples of each, and about trained ones."""
    rows, by_picture = [], f"memory{BY_PICTURE}"
    measured: list[tuple[str, str, tuple[Kind, *tuple[str, ...]]]] = [
        ("memory", ARMS["memory"].title, ("teach",)),
        ("memory", "memory, int8 bundle", ("int8", "teach")),
        (by_picture, ARMS[by_picture].title, ("teach",)),
        (by_picture, "its int8 bundle", ("int8", "teach")),
        *(
            (
                arm,
                f"{ARMS[arm].title}, {short_settings(TAUGHT)}",
                ("teach",),
            )
            for arm in (short(TAUGHT, "memory"), "no-copy", "no-episodes")
        ),
    ]
    seen = []
    for arm, title, place in measured:
        of = partial(_taught, done, arm, place)
        for figure, how in TAUGHT_FIGURES.items():
            if of(figure, f"{SHOTS[-1]}")["seeds"]:
                rows.append((f"{title}: {how}", *(_share(of(figure, f"{shots}")) for shots in SHOTS)))
        if of("seen", "after")["seeds"]:
            seen.append((title, *(_share(of("seen", when)) for when in ("before", "after"))))
    head = ("arm", *(f"{shots} examples" for shots in SHOTS))
    return f"{markdown_table(head, rows)}\n\n{markdown_table(('arm', 'trained classes before', 'after'), seen)}"


def _taught(done: Results, arm: str, place: tuple[Kind, *tuple[str, ...]], figure: str, at: str) -> Spread:
    return over_seeds(lambda seed: find(done, Run(TAUGHT, arm, seed=seed), *place, figure, at))


def bundles(done: Results, summary: Summary) -> str:
    """Float32 in torch beside the int8 bundle."""
    rows, told = [], []
    for name in DATASETS:
        loss, emi = summary[name]["test_loss"], summary[name]["emi"]
        kinds = dict(_kinds(done, name))
        for arm in COMPARED:
            if loss["int8"][arm]["seeds"]:
                cells = [_spread(figures, "{:.4f}") for figures in (loss["int8_in_torch"][arm], loss["int8"][arm])]
                for title, _, key in KINDS:
                    part = summary[name][key] if title in kinds else None
                    cells += (
                        [NONE, NONE] if part is None else [_share(part[way][arm]) for way in ("int8_in_torch", "int8")]
                    )
                rows.append((name, arm, *cells, _refused(done, name, arm)))
        if emi["int8"]["image"]["seeds"]:
            for title, key in INFORMATION.items():
                told.append((name, title, *(_spread(emi[way][key], "{:+.4f}") for way in ("int8_in_torch", "int8"))))
    head = ("data", "arm", "test loss", "int8", "open, %", "int8", "yes/no, %", "int8", "refused by the gate")
    return (
        f"{markdown_table(head, rows)}\n\n{markdown_table(('data', 'nats an answer token', 'float32', 'int8'), told)}"
    )


def _refused(done: Results, name: str, arm: str) -> str:
    """How many of the exports failed the comparison with torch, and were written all the same to be measured."""
    found = [find(done, Run(name, arm, seed=seed), "int8", "refused") for seed in SEEDS]
    known = [failures for failures in found if failures is not None]
    return f"{sum(map(bool, known))} of {len(known)}"


def tuning(done: Results, summary: Summary) -> str:
    """The trials by which the settings were chosen, by the held-out loss of the training."""
    rows = []
    for name in DATASETS:
        for run in trial_runs(name):
            if points := curve(done, run):
                marks = dict(points)
                last = points[-1][0]
                shown = [marks.get(last * part // 4) for part in (1, 2, 3, 4)]
                losses = (NONE if loss is None else f"{loss:.4f}" for loss in shown)
                rows.append((name, run.of().title, f"{run.share}", f"{last}", *losses))
    head = ("data", "trial", "share, %", "steps", "held-out loss after a quarter", "half", "three quarters", "all")
    return markdown_table(head, rows)


def work(done: Results, summary: Summary) -> str:
    """The processor time of it all."""
    seconds = sum(float(result["cpu_seconds"]) for result in done.values())
    return f"{len(done)} parts, {seconds / 3600:.1f} hours of one core."


TABLES: dict[str, Callable[[Results, Summary], str]] = {
    "state": state,
    "goals": goal_table,
    "settings": settings,
    "losses": losses,
    "beside": beside,
    "fewer_steps": fewer_steps,
    "shares": shares,
    "controls": controls,
    "information": information,
    "ablations": ablations,
    "banks": banks,
    "taught": taught,
    "bundles": bundles,
    "tuning": tuning,
    "work": work,
}


def _spread(figures: dict[str, Any], style: str, scale: float = 1.0) -> str:
    """Mean, and deviation where there are several seeds."""
    if figures.get("never"):
        return _not_reached(figures)
    if figures["mean"] is None:
        return NONE
    shown = style.format(figures["mean"] * scale)
    if figures["std"] is None:
        return shown
    return f"{shown} ± {style.replace('+', '').format(figures['std'] * scale)}"


def _not_reached(figures: dict[str, Any]) -> str:
    return f"not reached ({figures['never']} of {figures['seeds']})"


def _share(figures: dict[str, Any] | None) -> str:
    return NONE if figures is None else _spread(figures, "{:.1f}", 100.0)


def _kinds(done: Results, name: str) -> list[tuple[str, str]]:
    """The kinds of questions that a data set has, and where `summary.json` has their scores: those of yes/no questions
    stand under "score" too where there are no others."""
    parts = [result for part, result in done.items() if part.startswith(f"{name}.")]
    return [(title, key) for title, group, key in KINDS if any(group in result for result in parts)]


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.1f}"


def _change(value: float | None, of: float | None) -> str:
    return NONE if value is None or of is None else f"{value / of - 1:+.1%}"
