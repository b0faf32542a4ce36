"""What the study consists of: training runs, what is measured on each, and in which order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from tinyalign_edge.train.options import TrainOptions

Kind = Literal["scores", "emi", "copy", "full_bank", "bank_sizes", "teach", "int8"]

DATASETS = ("caltech", "easy_vqa", "scenes", "nlvr")
TAUGHT = "caltech"  # has classes that no training saw
MAIN = ("caltech", "easy_vqa")  # three seeds, shares, controls, ablations
SHARES = (10, 20, 40, 70, 100)  # per cent of the training pictures
SEEDS = (0, 1, 2)
TUNING_SEED = 1000
BANK_SHARES = (1, 10, 100)  # per cent of the entries, of a model that was trained with all
QUESTIONS_A_ROW = {"caltech": 3}  # of the training rows, which a key that tells what is asked takes apart


@dataclass(frozen=True)
class Arm:
    """How a training run differs from its data set's settings.

    Attributes:
        changes: of `TrainOptions`.
        text: what the entries of the bank keep: "answers" alone, or all "turns".
        steps: times the data set's.
    """

    title: str
    changes: dict[str, Any]
    text: Literal["answers", "turns"] = "answers"
    steps: float = 1.0

    def options(self, of: TrainOptions, *, dataset: str, share: int, seed: int) -> TrainOptions:
        """The run's options."""
        steps = round((of.steps or 0) * self.steps)
        options = replace(of, **{"fraction": share / 100, "seed": seed, "steps": steps, **self.changes})
        if options.memory == "none":
            options = replace(options, key=None)
        if options.key in ("question", "fused"):  # as many questions a step
            options = replace(options, batch_size=of.batch_size * QUESTIONS_A_ROW.get(dataset, 1))
        return options


TOKENS: dict[str, Any] = {"memory": "tokens"}
LATENTS: dict[str, Any] = {"memory": "latents"}
BASELINE: dict[str, Any] = {"memory": "none"}

ARMS = {
    "baseline": Arm("no memory", BASELINE),
    "memory": Arm("memory: token ids that can be copied, k = 4", TOKENS),
    "shuffled": Arm("memory of other pictures, in training and in evaluation", {**TOKENS, "shuffle_memory": True}),
    "half": Arm("memory, trained for half the steps", TOKENS, steps=0.5),
    "no-copy": Arm("token ids that cannot be copied", {**TOKENS, "copy_words": False, "episodes": 0.0}),
    "no-episodes": Arm("token ids that can be copied, no made-up names", {**TOKENS, "episodes": 0.0}),
    "from-start": Arm("token ids that are read from the first step", {**TOKENS, "memory_from": 0.0}),
    "after": Arm("token ids that stand after the picture", {**TOKENS, "memory_first": False}),
    "turns": Arm("token ids of questions with answers", TOKENS, text="turns"),
    "latents": Arm("8 latents of 96, trained value encoder", LATENTS),
    **{f"latents-{n}": Arm(f"{n} latents of 96", {**LATENTS, "latents": n}) for n in (2, 4, 16, 32)},
    **{f"k-{k}": Arm(f"token ids, k = {k}", {**TOKENS, "k": k}) for k in (1, 2, 8, 16)},
    "picture": Arm("token ids, key of the picture alone", {**TOKENS, "key": "picture"}),
    "question": Arm("token ids, key of picture and question", {**TOKENS, "key": "question"}),
    "random": Arm("32 random latents, key of the picture alone", {"memory": "paper", "key": "picture"}),
    "fused": Arm("token ids, fused key", {**TOKENS, "key": "fused"}),
    "paper": Arm("the paper's: fused key, 32 random latents", {"memory": "paper", "key": "fused"}),
}
RATES = (1e-3, 3e-3, 1e-2)
DECAYS = (0.01, 0.3)  # weight decays beside the data sets' own
DROPOUT_RATE = 1e-2  # learning rate of the trials of dropout
DROPOUT = 0.5  # of what the connector reads
FEW = 40  # per cent of the training pictures, with which dropout is tried as well
LATER = 0.5  # share of the steps before the memory is read
MADE_UP = (0.0, 0.25, 0.5)  # shares of rows with made-up names beside the default
ALONE = 0.25  # share of rows without memory
TRIALS = {
    **{f"{arm}-lr-{rate:g}": replace(ARMS[arm], title=f"{ARMS[arm].title}, learning rate {rate:g}",
                                     changes={**ARMS[arm].changes, "learning_rate": rate})
       for arm in ("baseline", "memory") for rate in RATES},
    **{f"{arm}-decay-{decay:g}": replace(ARMS[arm], title=f"{ARMS[arm].title}, weight decay {decay:g}",
                                         changes={**ARMS[arm].changes, "weight_decay": decay})
       for arm in ("baseline", "memory") for decay in DECAYS},
    **{f"{arm}-dropout": replace(ARMS[arm], title=f"{ARMS[arm].title}, {DROPOUT:.0%} dropout before the connector",
                                 changes={**ARMS[arm].changes, "dropout": DROPOUT, "learning_rate": DROPOUT_RATE})
       for arm in ("baseline", "memory")},
    **{f"{arm}-long": replace(ARMS[arm], title=f"{ARMS[arm].title}, twice the steps", steps=2.0)
       for arm in ("baseline", "memory")},
    **{f"memory-episodes-{share:g}": Arm(f"{share:.0%} of the rows with made-up names", {**TOKENS, "episodes": share})
       for share in MADE_UP},
    "memory-later": Arm(f"memory read after {LATER:.0%} of the steps", {**TOKENS, "memory_from": LATER}),
    "memory-alone": Arm(f"{ALONE:.0%} of the rows without memory", {**TOKENS, "memory_dropout": ALONE}),
}  # fmt: skip
ABLATIONS = (
    "no-copy", "no-episodes", "from-start", "picture", "question", "after", "turns", "latents", "k-1", "k-2", "k-8",
    "k-16", "latents-2", "latents-4", "latents-16", "latents-32", "random", "fused", "paper",
)  # fmt: skip
OWN_KEY = {"caltech": "picture", "easy_vqa": "question"}  # of the arm "memory", which is no ablation


@dataclass(frozen=True)
class Run:
    """One training run."""

    dataset: str
    arm: str
    share: int = 100
    seed: int = 0

    @property
    def name(self) -> str:
        """Its folder's name."""
        return f"{self.dataset}.{self.arm}.{self.share}.{self.seed}"

    def of(self) -> Arm:
        """Its arm."""
        return {**ARMS, **TRIALS}[self.arm]


@dataclass(frozen=True)
class Part:
    """A measurement on a run's checkpoint; "scores" is the one that trains it."""

    run: Run
    kind: Kind

    @property
    def name(self) -> str:
        """Its file's name, without suffix."""
        return f"{self.run.name}.{self.kind}"


def plan() -> list[Part]:
    """All parts, the most telling ones first, each once."""
    return list(dict.fromkeys(_ordered()))


def rate_trials(name: str) -> dict[float, Part]:
    """The trials by which the learning rate of both arms is chosen: the baseline's lowest held-out loss at the end."""
    return {rate: Part(Run(name, f"baseline-lr-{rate:g}", seed=TUNING_SEED), "scores") for rate in RATES}


def trial_runs(name: str) -> list[Run]:
    """The trials of a data set: all of them where the design was chosen, elsewhere those of rate and steps."""
    if name != TAUGHT:
        return [Run(name, arm, seed=TUNING_SEED) for arm in TRIALS if "-lr-" in arm or arm.endswith("-long")]
    few = [f"{arm}-{kind}" for arm in ("baseline", "memory") for kind in (f"lr-{DROPOUT_RATE:g}", "dropout")]
    return [Run(name, arm, share, TUNING_SEED) for share, arms in ((100, TRIALS), (FEW, few)) for arm in arms]


def _ordered() -> Iterator[Part]:
    for name in MAIN:
        yield from rate_trials(name).values()
        for arm in ("baseline", "memory"):
            yield Part(Run(name, arm), "scores")
    for name in MAIN:
        yield Part(Run(name, "memory"), "copy")
        yield Part(Run(name, "memory"), "emi")
        yield Part(Run(name, "baseline-long", seed=TUNING_SEED), "scores")
    yield Part(Run(TAUGHT, "memory"), "teach")
    yield from _shares(0)
    yield from _controls(0)
    for seed in SEEDS[1:]:
        for name in MAIN:
            for arm in ("baseline", "memory"):
                yield Part(Run(name, arm, seed=seed), "scores")
    for seed in SEEDS[1:]:
        yield from _shares(seed)
        yield from _controls(seed)
    for name in DATASETS:
        yield from rate_trials(name).values()
        for arm in ("baseline", "memory"):
            yield Part(Run(name, arm), "scores")
    for name in DATASETS:
        yield from _measures(name, 0)
        for share in SHARES:
            yield from _share(name, share, 0)
    for name in MAIN:
        yield from (Part(run, "scores") for run in trial_runs(name))
    for arm in ABLATIONS:
        yield from (Part(Run(name, arm), "scores") for name in MAIN if arm != OWN_KEY[name])
    yield from (Part(Run(TAUGHT, arm), "teach") for arm in ("no-copy", "no-episodes"))


def _shares(seed: int) -> Iterator[Part]:
    for share in SHARES:
        for name in MAIN:
            yield from _share(name, share, seed)


def _share(name: str, share: int, seed: int) -> Iterator[Part]:
    for arm in ("baseline", "memory"):
        yield Part(Run(name, arm, share, seed), "scores")
    if share < 100:
        yield Part(Run(name, "memory", share, seed), "full_bank")


def _controls(seed: int) -> Iterator[Part]:
    for name in MAIN:
        yield from _measures(name, seed)
        yield Part(Run(name, "half", seed=seed), "scores")


def _measures(name: str, seed: int) -> Iterator[Part]:
    yield Part(Run(name, "shuffled", seed=seed), "scores")
    yield Part(Run(name, "memory", seed=seed), "copy")
    if name == TAUGHT:
        yield Part(Run(name, "memory", seed=seed), "teach")
    for arm in ("memory", "baseline", "shuffled"):
        yield Part(Run(name, arm, seed=seed), "emi")
    yield Part(Run(name, "memory", seed=seed), "int8")
    yield Part(Run(name, "baseline", seed=seed), "int8")
    if seed == 0:
        yield Part(Run(name, "memory", seed=seed), "bank_sizes")
