"""What the study consists of: training runs, what is measured on each, and in which order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from tinyalign_edge.train.options import TrainOptions

Kind = Literal["scores", "emi", "copy", "full_bank", "bank_sizes", "teach", "int8"]
Text = Literal["answers", "turns", "same", "apart"]

DATASETS = ("caltech", "easy_vqa", "scenes", "nlvr")
TAUGHT = "caltech"  # has classes that no training saw
MAIN = ("caltech", "easy_vqa")  # three seeds, shares, controls, ablations
SHARES = (10, 20, 40, 70, 100)  # per cent of the training pictures
SEEDS = (0, 1, 2)
TUNING_SEED = 1000
BANK_SHARES = (1, 10, 100)  # per cent of the entries, of a model that was trained with all
# What the trials, and all arms that are not `whole`, have instead of the data set's settings: fewer steps, and the key
# of the picture alone.
SHORT_SETTINGS: dict[str, dict[str, Any]] = {"caltech": {"steps": 800, "key": "picture"}}
TRIAL_SETTINGS = {**SHORT_SETTINGS, "scenes": {"steps": 600}}  # of scenes only the trials are not `whole`
QUESTIONS_A_ROW = {"caltech": 3}  # of the training rows, where a key that tells what is asked, or the arm, parts them


@dataclass(frozen=True)
class Arm:
    """How a training run differs from its data set's settings.

    Attributes:
        changes: of `TrainOptions`.
        text: what the entries of the bank keep: "answers" alone, all "turns", or all the "same" words; "apart": rows
            have one question each, and an entry its answer.
        steps: times those of the data set, or of its trials.
        whole: it has the data set's settings, also where `TRIAL_SETTINGS` has other ones.
    """

    title: str
    changes: dict[str, Any]
    text: Text = "answers"
    steps: float = 1.0
    whole: bool = False


TOKENS: dict[str, Any] = {"memory": "tokens"}
LATENTS: dict[str, Any] = {"memory": "latents"}
BASELINE: dict[str, Any] = {"memory": "none"}
COPYING: dict[str, Any] = {"copy_words": None, "episodes": None}  # as the trainer has it of itself
NO_COPYING: dict[str, Any] = {"copy_words": False, "episodes": 0.0}
OWN_LOSS = 0.5  # weight of the latents' own loss

MAIN_ARMS = {
    "baseline": Arm("no memory", BASELINE, whole=True),
    "memory": Arm("memory: token ids, k = 4", TOKENS, whole=True),
    "shuffled": Arm("memory of other pictures, in training and in evaluation", {**TOKENS, "shuffle_memory": True},
                    whole=True),
}  # fmt: skip
SHORT = "-short"  # ends the names of their runs with `SHORT_SETTINGS`, beside which the other arms are read
DROPOUT = 0.5  # of what the connector reads
DROPPED = "-dropout-whole"  # ends the names of the runs of both arms that have it beside all settings of the study
BY_PICTURE = "-picture"  # ends the names of the runs of memory and shuffled memory with the key of the picture alone
ARMS = {
    **MAIN_ARMS,
    **{f"{name}{SHORT}": replace(arm, whole=False) for name, arm in MAIN_ARMS.items()},
    **{
        f"{name}{BY_PICTURE}": replace(
            arm, title=f"{arm.title}, key of the picture alone", changes={**arm.changes, "key": "picture"}
        )
        for name, arm in MAIN_ARMS.items()
        if name != "baseline"
    },
    **{
        f"{name}{DROPPED}": replace(
            MAIN_ARMS[name],
            title=f"{MAIN_ARMS[name].title}, {DROPOUT:.0%} dropout before the connector, with the study's settings",
            changes={**MAIN_ARMS[name].changes, "dropout": DROPOUT},
        )
        for name in ("baseline", "memory")
    },
    "baseline-apart": Arm("no memory, a row for each question", BASELINE, text="apart", whole=True),
    "shuffled-no-copy": Arm(
        "memory of other pictures that cannot be copied", {**TOKENS, **NO_COPYING, "shuffle_memory": True}
    ),
    "same-text": Arm(
        "memory whose entries all say the same words, which cannot be copied", {**TOKENS, **NO_COPYING}, text="same"
    ),
    "same-shuffled": Arm(
        "memory of other pictures whose entries all say the same words: tells nothing, as a trained prompt",
        {**TOKENS, **NO_COPYING, "shuffle_memory": True},
        text="same",
    ),
    "copying": Arm("token ids that can be copied", {**TOKENS, **COPYING}),
    "no-copy": Arm("token ids that cannot be copied", {**TOKENS, **NO_COPYING}),
    "no-episodes": Arm("token ids that can be copied, no made-up names", {**TOKENS, **COPYING, "episodes": 0.0}),
    "from-start": Arm("token ids that are read from the first step", {**TOKENS, "memory_from": 0.0}),
    "after": Arm("token ids that stand after the picture", {**TOKENS, "memory_first": False}),
    "gate": Arm("token ids, with a gate", {**TOKENS, "gate": True}),
    "turns": Arm("token ids of questions with answers", TOKENS, text="turns"),
    "latents": Arm("8 latents of 96, trained value encoder", LATENTS),
    **{f"latents-{n}": Arm(f"{n} latents of 96", {**LATENTS, "latents": n}) for n in (2, 4, 16, 32)},
    "latents-random": Arm("8 latents of 96 that begin in random directions", {**LATENTS, "random_values": True}),
    "latents-untrained": Arm("8 latents of 96, value encoder as it begins", {**LATENTS, "freeze_values": True}),
    "latents-read": Arm("8 latents of 96, with an own loss: they say the text", {**LATENTS, "reconstruct": OWN_LOSS}),
    "latents-long": Arm("8 latents of 96, trained for twice the steps", LATENTS, steps=2.0),
    "latents-gate": Arm("8 latents of 96, with a gate", {**LATENTS, "gate": True}),
    **{f"latents-wide-{width}": Arm(f"8 latents of {width}", {**LATENTS, "latent_dim": width}) for width in (48, 192)},
    "hybrid": Arm("token ids, and 2 latents of the picture", {"memory": "hybrid"}),
    **{f"k-{k}": Arm(f"token ids, k = {k}", {**TOKENS, "k": k}) for k in (1, 2, 8, 16)},
    "picture": Arm("token ids, key of the picture alone", {**TOKENS, "key": "picture"}),
    "question": Arm("token ids, key of picture and question", {**TOKENS, "key": "question"}),
    "random": Arm("32 random latents, key of the picture alone", {"memory": "paper", "key": "picture"}),
    "fused": Arm("token ids, fused key", {**TOKENS, "key": "fused"}),
    "paper": Arm("the paper's: fused key, 32 random latents", {"memory": "paper", "key": "fused", "memory_from": 0.0}),
}
RATES = (1e-3, 3e-3, 1e-2)
JOINS = {"caltech": (0.0625, 0.125), "easy_vqa": (0.125, 0.375)}  # shares of the steps before memory is read
ALONE = 0.25  # share of the rows without memory
DECAY = 0.01  # of the weights: the trainer's own
EPISODES = 0.2  # share of the rows: twice the trainer's own
FEW = 40  # per cent of the training pictures, with which the memory is to reach the baseline's score with all
HIGHER = 3e-2  # than the rates among which one is chosen: the trial that tells whether their edge is the best
PLAIN: dict[str, Any] = {"learning_rate": RATES[-1], "dropout": 0.0, **COPYING}
TRIALS = {
    **{f"baseline-lr-{rate:g}": Arm(f"no memory, learning rate {rate:g}",
                                    {**BASELINE, **PLAIN, "learning_rate": rate})
       for rate in (*RATES, HIGHER)},
    **{f"memory-from-{share:g}": Arm(f"memory read after {100 * share:g} % of the steps",
                                     {**TOKENS, **PLAIN, "memory_from": share})
       for share in sorted({share for shares in JOINS.values() for share in shares})},
    **{f"{arm}-dropout": Arm(f"{ARMS[arm].title}, {DROPOUT:.0%} dropout before the connector",
                             {**ARMS[arm].changes, **PLAIN, "dropout": DROPOUT})
       for arm in ("baseline", "memory")},
    **{f"{arm}-decay-{DECAY:g}": Arm(f"{ARMS[arm].title}, weight decay {DECAY:g}",
                                     {**ARMS[arm].changes, **PLAIN, "weight_decay": DECAY})
       for arm in ("baseline", "memory")},
    f"memory-episodes-{EPISODES:g}": Arm(f"{EPISODES:.0%} of the rows with made-up names, in the copy term's own steps",
                                         {**TOKENS, **PLAIN, "episodes": EPISODES}),
    "memory-question": Arm("memory with a key of picture and question", {**TOKENS, **PLAIN, "key": "question"}),
    "memory-no-copy": Arm("memory whose words cannot be copied", {**TOKENS, **PLAIN, **NO_COPYING}),
    "memory-alone": Arm(f"{ALONE:.0%} of the rows without memory",
                        {**TOKENS, **PLAIN, "memory_dropout": ALONE}),
    **{f"{arm}-long": Arm(f"{ARMS[arm].title}, longer", ARMS[arm].changes, steps=2.0)
       for arm in ("baseline", "memory")},
    **{f"baseline-x{times:g}": Arm(f"{ARMS['baseline'].title}, longer", BASELINE, steps=times)
       for times in (1.5, 3)},
}  # fmt: skip
ABLATIONS = (
    "latents", "hybrid", "copying", "no-copy", "picture", "question", "fused", "random", "k-1", "k-2", "k-8", "k-16",
    "latents-2", "latents-4", "latents-16", "latents-32", "latents-untrained", "latents-read", "latents-random",
    "paper", "gate",
)  # fmt: skip
NOTHING_TOLD = ("shuffled-no-copy", "same-text", "same-shuffled")  # why a memory that tells nothing can lower the loss
TRIED_ONCE = (  # on the data set with classes that no training saw
    "latents-long", "latents-gate", "latents-wide-192", "latents-wide-48", "from-start", "no-episodes", "after",
    "turns",
)  # fmt: skip
OWN = {"caltech": ("picture", "copying"), "easy_vqa": ("question", "no-copy")}  # what `short(name, "memory")` is


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

    def options(self, of: TrainOptions) -> TrainOptions:
        """Its options, given those that its data set's arms share."""
        arm, whole = self.of(), of.steps or 0
        if not arm.whole:
            of = replace(of, **TRIAL_SETTINGS.get(self.dataset, {}))
        steps = min(of.steps or 0, whole)
        every = max(1, round(of.eval_every * steps / (whole or 1)))  # as often in a run, whatever its steps
        own: dict[str, Any] = {
            "fraction": self.share / 100,
            "seed": self.seed,
            "steps": round(steps * arm.steps),
            "eval_every": every,
        }
        options = replace(of, **own, **arm.changes)
        if options.memory == "none":
            options = replace(options, key=None, memory_from=None)
        if options.key in ("question", "fused") or arm.text == "apart":  # as many questions a step
            options = replace(options, batch_size=of.batch_size * QUESTIONS_A_ROW.get(self.dataset, 1))
        return options


@dataclass(frozen=True)
class Part:
    """A measurement on a run's checkpoint; "scores" is the one that trains it."""

    run: Run
    kind: Kind

    @property
    def name(self) -> str:
        """Its file's name, without suffix."""
        return f"{self.run.name}.{self.kind}"


def short(name: str, arm: str) -> str:
    """The arm of `MAIN_ARMS` beside which the others of a data set are read: with the settings that they have."""
    return f"{arm}{SHORT}" if name in SHORT_SETTINGS else arm


def short_settings(name: str) -> str:
    """In words, what the arms beside `short(name, arm)` have."""
    return "key of the {key} alone, {steps} steps".format(**SHORT_SETTINGS[name])


def plan() -> list[Part]:
    """All parts, the most telling ones first, each once."""
    return list(dict.fromkeys(_ordered()))


def rate_trials(name: str) -> dict[float, Part]:
    """The trials by which the learning rate of both arms is chosen: the baseline's lowest held-out loss at the end."""
    return {rate: Part(Run(name, f"baseline-lr-{rate:g}", seed=TUNING_SEED), "scores") for rate in RATES}


def trial_runs(name: str) -> list[Run]:
    """The trials of a data set: of the learning rate and the steps, and where its memory was chosen, of that."""
    whole = [*(f"baseline-lr-{rate:g}" for rate in RATES), "baseline-long"]
    few = []
    if name in JOINS:
        whole += [f"baseline-lr-{HIGHER:g}", *(f"memory-from-{share:g}" for share in JOINS[name])]
        whole += ["memory-no-copy", "memory-alone", "memory-dropout"]
    if name == TAUGHT:
        whole += ["memory-question", "baseline-dropout", "baseline-x1.5", "baseline-x3", "memory-long"]
        whole += [f"baseline-decay-{DECAY:g}", f"memory-decay-{DECAY:g}", f"memory-episodes-{EPISODES:g}"]
        whole += [f"baseline{DROPPED}"]
        few = [f"memory-from-{JOINS[name][-1]:g}", "memory-dropout", f"memory{DROPPED}"]
    return [Run(name, arm, share, TUNING_SEED) for share, arms in ((100, whole), (FEW, few)) for arm in arms]


def _ordered() -> Iterator[Part]:
    """What is measured of a run follows its training: where checkpoints are lost, few have to be trained again."""
    for name in MAIN:
        yield from rate_trials(name).values()
    for seed in SEEDS:
        for name in MAIN:
            yield from _share(name, 100, seed)
            yield from _measures(name, seed)
            yield from _share(name, 40, seed)
    for name in DATASETS:
        yield from rate_trials(name).values()
        yield from _share(name, 100, 0)
        yield from _measures(name, 0)
        for share in SHARES:
            yield from _share(name, share, 0)
    for share in SHARES:
        for seed in SEEDS:
            for name in MAIN:
                yield from _share(name, share, seed)
    for name in SHORT_SETTINGS:
        yield Part(Run(name, "baseline-apart"), "scores")
        yield from _by_picture(name)
        for seed in SEEDS:
            yield from (Part(Run(name, short(name, arm), seed=seed), "scores") for arm in MAIN_ARMS)
            yield from (Part(Run(name, short(name, arm), FEW, seed), "scores") for arm in ("baseline", "memory"))
        for seed in SEEDS:
            yield from (Part(Run(name, f"{arm}{DROPPED}", seed=seed), "scores") for arm in ("baseline", "memory"))
    yield from (Part(Run(TAUGHT, short(TAUGHT, "memory"), seed=seed), "teach") for seed in SEEDS)
    yield from (Part(Run("easy_vqa", "copying", share, seed), "scores") for share in (100, FEW) for seed in SEEDS)
    yield from (Part(Run(TAUGHT, arm, seed=seed), "scores") for arm in NOTHING_TOLD for seed in SEEDS)
    for arm in (*ABLATIONS, *TRIED_ONCE):
        names = MAIN if arm in ABLATIONS else (TAUGHT,)
        yield from (Part(Run(name, arm), "scores") for name in names if arm not in OWN[name])
        if arm in ("no-copy", "no-episodes"):
            yield Part(Run(TAUGHT, arm), "teach")
    for name in DATASETS:
        yield from (Part(run, "scores") for run in trial_runs(name))


def _share(name: str, share: int, seed: int) -> Iterator[Part]:
    for arm in ("baseline", "memory"):
        yield Part(Run(name, arm, share, seed), "scores")
    if share < 100:
        yield Part(Run(name, "memory", share, seed), "copy")
    if _asks_full_bank(share, seed):
        yield Part(Run(name, "memory", share, seed), "full_bank")


def _asks_full_bank(share: int, seed: int) -> bool:
    """Whether a model that was trained on a share is asked with the bank of all pictures, too."""
    return share == FEW or (share < 100 and seed == SEEDS[0])


def _by_picture(name: str) -> Iterator[Part]:
    """What a memory with the key of the picture alone does, with all steps, unlike the ablation "picture"."""
    memory, shuffled = (f"{arm}{BY_PICTURE}" for arm in ("memory", "shuffled"))
    for seed in SEEDS:
        yield from (Part(Run(name, memory, seed=seed), kind) for kind in ("scores", *_kinds(name, seed)))
        for share in SHARES:
            if _asks_full_bank(share, seed):
                yield from (Part(Run(name, memory, share, seed), kind) for kind in ("scores", "copy", "full_bank"))
        yield from (Part(Run(name, shuffled, seed=seed), kind) for kind in ("scores", "emi"))


def _kinds(name: str, seed: int) -> list[Kind]:
    """What is measured of a memory that was trained with all data."""
    kinds: list[Kind] = ["copy", "emi", "int8"]
    kinds += ["teach"] if name == TAUGHT else []
    kinds += ["bank_sizes"] if seed == 0 else []
    return kinds


def _measures(name: str, seed: int) -> Iterator[Part]:
    memory, baseline, shuffled = (Run(name, arm, seed=seed) for arm in ("memory", "baseline", "shuffled"))
    yield from (Part(memory, kind) for kind in _kinds(name, seed))
    yield Part(shuffled, "scores")
    yield Part(shuffled, "emi")
    yield Part(baseline, "emi")
    yield Part(baseline, "int8")
