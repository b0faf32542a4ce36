"""The parts of the study: a run is trained where its checkpoint is missing, and measured."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyalign_edge.bench.study.datasets import SETTINGS, DataSet
from tinyalign_edge.bench.study.eye import Eye
from tinyalign_edge.bench.study.plan import BANK_SHARES, DATASETS, TAUGHT, Part, Run, rate_trials
from tinyalign_edge.bench.study.score import ask, summarise
from tinyalign_edge.bench.study.store import Results, is_done, keep, results
from tinyalign_edge.bench.teach import teach_accuracies
from tinyalign_edge.bench.trained import difference, loss_curve, trained
from tinyalign_edge.config import from_json, to_json
from tinyalign_edge.data import Row, read_rows
from tinyalign_edge.emi import measure
from tinyalign_edge.errors import BundleError, InputError
from tinyalign_edge.evaluate import Asked, MemoryMode, normalize
from tinyalign_edge.export.run import ExportOptions, export
from tinyalign_edge.memory import Bank
from tinyalign_edge.memory.search import Neighbours
from tinyalign_edge.runtime.answerer import BundleAnswerer
from tinyalign_edge.runtime.model import load
from tinyalign_edge.train.answer import TorchAnswerer
from tinyalign_edge.train.checkpoint import Checkpoint
from tinyalign_edge.train.options import TrainOptions
from tinyalign_edge.train.settings import ConnectorSettings, MemorySettings, TrainSettings

Result = dict[str, Any]

NEAR = 256  # entries among which one with the same question is looked for, before all of them are
WIDER = 4  # times as many entries are looked at
ONE_BY_ONE = 2400  # questions for a bundle


@dataclass
class Bench:
    """Where a study keeps its checkpoints, and what it has seen already.

    Attributes:
        out: `checkpoints/` and `features/` are made in it.
        dataset: finds a data set by its name.
        settings: of every arm of a data set, before what the arm changes.
    """

    out: Path
    dataset: Callable[[str], DataSet]
    settings: Mapping[str, TrainOptions] = field(default_factory=lambda: SETTINGS)
    eyes: dict[str, Eye] = field(default_factory=dict)

    def measure(self, part: Part) -> Result:
        """Train the part's run, unless its checkpoint is there, and measure it."""
        return KINDS[part.kind](self, part.run)

    def checkpoint(self, run: Run) -> Checkpoint:
        """The run's checkpoint, trained if it is not there; a training that was killed goes on.

        Raises:
            InputError: it was trained with other settings.
        """
        data, arm, folder = self.dataset(run.dataset), run.of(), self.out / "checkpoints" / run.name
        return trained(
            folder,
            data=data.training_file(arm.text),
            images=data.train_images,
            vision=data.vision,
            lm=data.lm,
            options=replace(self.options(run), cache_features=self.out / "features"),
            label=run.name,
        )

    def options(self, run: Run) -> TrainOptions:
        """The run's options; the learning rate is the one that the data set's trials chose.

        Raises:
            InputError: a trial has no result yet.
        """
        options = run.options(self.settings[run.dataset])
        if run.dataset not in DATASETS or "learning_rate" in run.of().changes:
            return options
        trials = rate_trials(run.dataset)
        done = results(self.out, trials.values())
        for trial in trials.values():
            if trial.name not in done:
                raise InputError(f"{run.name}: its learning rate comes from {trial.name}; measure that first")
        last = {rate: done[trial.name]["curve"][-1]["held_out_loss"] for rate, trial in trials.items()}
        return replace(options, learning_rate=min(last, key=last.__getitem__))

    def take_up(self, held: Results, parts: Sequence[Part]) -> None:
        """Count results as done that `out` lacks, of runs that were trained with the settings that they have here."""
        current: dict[Run, bool | None] = {}
        for part in parts:
            if part.name in held and not is_done(self.out, part):
                if part.run not in current:
                    current[part.run] = self._is_current(part.run, held)
                if current[part.run]:
                    keep(self.out, part, held[part.name])

    def check(self, parts: Iterable[Part]) -> None:
        """Compare the settings of the runs that have results in `out` with those that they have here.

        Raises:
            InputError: they differ.
        """
        for run in dict.fromkeys(part.run for part in parts):
            scores = Part(run, "scores")
            if is_done(self.out, scores) and self._is_current(run, results(self.out, [scores])) is False:
                raise InputError(
                    f"{self.out}: {run.name} was trained with other settings than the study has now; "
                    f"remove {self.out / 'checkpoints' / run.name} and {self.out / 'parts' / f'{run.name}.*'}"
                )

    def _is_current(self, run: Run, held: Results) -> bool | None:
        """Whether the run was trained with the settings that it has here; None where its learning rate is still to be
        chosen."""
        settings = held.get(Part(run, "scores").name, {}).get("settings")
        if settings is None:
            return False
        try:
            wanted = self.options(run)
        except InputError:
            return None
        try:
            training = from_json(TrainSettings, {**settings["training"], "data": [], "images": ""}, run.name)
            memory = from_json(MemorySettings, settings["memory"], run.name)
            connector = from_json(ConnectorSettings, settings["connector"], run.name)
        except BundleError:  # there are other settings now
            return False
        return difference(wanted, training, memory, connector) is None

    def answerer(self, run: Run, *, bank_of: Run | None = None) -> TorchAnswerer:
        """The run's checkpoint, ready to be asked; with another run's bank, its keys and its floor."""
        checkpoint = self.checkpoint(run)
        if bank_of is not None:
            other = self.checkpoint(bank_of)
            checkpoint.model.load_state_dict(other.model.key_state(), strict=False)
            memory = replace(checkpoint.config.memory, floor=other.config.memory.floor)
            checkpoint = replace(checkpoint, bank=other.bank, config=replace(checkpoint.config, memory=memory))
        return TorchAnswerer(checkpoint, encode=self.eyes.setdefault(run.dataset, Eye()))

    def rows(self, run: Run) -> list[Row]:
        """The questions of the run's data set."""
        return self.dataset(run.dataset).test_rows()


def scores(bench: Bench, run: Run) -> Result:
    """The curve of the training, loss and scores of all test questions; of a memory also with an empty bank."""
    answerer = bench.answerer(run)
    rows, config = bench.rows(run), answerer.checkpoint.config
    own: MemoryMode = "shuffled" if config.memory.shuffled else "own"
    result = summarise(ask(answerer, rows, memory=own))
    if answerer.has_memory and run.share == 100:
        result["empty_bank"] = summarise(ask(answerer, rows, memory="none"))
    training = to_json(config.training)
    for path in ("data", "images"):  # where they lie is a matter of the machine
        training.pop(path)
    settings = {"training": training, "memory": to_json(config.memory), "connector": to_json(config.connector)}
    bank = answerer.checkpoint.bank
    return {
        **result,
        "curve": loss_curve(answerer.checkpoint.folder),
        "settings": settings,
        "bank": None if bank is None else {"entries": len(bank), "entry_bytes": bank.stats().entry_bytes},
    }


def emi(bench: Bench, run: Run) -> Result:
    """What picture and memory tell, in nats per answer token."""
    return asdict(measure(bench.answerer(run), bench.rows(run)))


def full_bank(bench: Bench, run: Run) -> Result:
    """A model that was trained on a share, asked with the bank of all training pictures."""
    return summarise(ask(bench.answerer(run, bank_of=replace(run, share=100)), bench.rows(run)))


def bank_sizes(bench: Bench, run: Run) -> Result:
    """A model that was trained on all pictures, asked with a bank of some of its entries, drawn at random."""
    answerer, rows, result = bench.answerer(run), bench.rows(run), {}
    whole = answerer.checkpoint.bank
    assert whole is not None
    drawn = np.random.default_rng(run.seed).permutation(len(whole))
    for share in BANK_SHARES:
        kept = np.sort(drawn[: max(1, round(len(whole) * share / 100))])
        smaller = replace(answerer.checkpoint, bank=_Part(whole, kept))  # type: ignore[arg-type]
        answerer.checkpoint = smaller
        result[str(share)] = {"entries": len(kept), **summarise(ask(answerer, rows))}
    return result


class _Part:
    """Some entries of a bank, under their own numbers, as far as `TorchAnswerer` looks things up."""

    def __init__(self, whole: Bank, kept: npt.NDArray[np.int64]) -> None:
        self.whole, self.kept = whole, set(kept.tolist())

    def nearest(self, queries: npt.NDArray[np.float32], k: int, *, floor: float = -1.0) -> Neighbours:
        """The nearest of the entries that are kept."""
        width = WIDER * k * len(self.whole) // len(self.kept)
        while True:
            width = min(width, len(self.whole))
            found = self.whole.nearest(queries, width, floor=floor)
            near = self._nearest(found, k)
            if width == len(self.whole) or ((near.rows[:, -1] >= 0) | (found.rows[:, -1] < 0)).all():
                return near
            width *= WIDER

    def _nearest(self, found: Neighbours, k: int) -> Neighbours:
        keep = np.isin(found.rows, list(self.kept))
        order = np.argsort(~keep, axis=1, kind="stable")[:, :k]
        kept = np.take_along_axis(keep, order, axis=1)
        rows = np.where(kept, np.take_along_axis(found.rows, order, axis=1), -1)
        return Neighbours(rows, np.take_along_axis(found.similarity, order, axis=1))


def copy(bench: Bench, run: Run) -> Result:
    """No model: the answer of the nearest entry whose picture was asked the same question."""
    answerer, rows = bench.answerer(run), bench.rows(run)
    bank, data = answerer.checkpoint.bank, bench.dataset(run.dataset)
    assert bank is not None
    known = {
        row.id: {turn.question: turn.answer for turn in row.turns} for row in read_rows(data.turns, data.train_images)
    }
    entries = [known[bank.entry(number).source] for number in bank.ids]
    keys, asked = answerer.prepare(rows).keys, []
    few = bank.nearest(keys, min(NEAR, len(bank))).rows
    for row, near, key in zip(rows, few, keys, strict=True):
        question = row.turns[0].question
        answer = _answer(question, entries, near)
        if answer is None:
            answer = _answer(question, entries, bank.nearest(key[None], len(bank)).rows[0]) or ""
        asked.append(Asked(question, row.turns[0].answer, answer, 0.0, 1))
    result = summarise(asked)
    del result["loss"]  # there is none
    return result


def _answer(question: str, entries: Sequence[dict[str, str]], near: npt.NDArray[np.int64]) -> str | None:
    """That of the first of the entries `near` whose picture was asked the same."""
    return next((entries[i][question] for i in near if question in entries[i]), None)


def teach(bench: Bench, run: Run) -> Result:
    """Classes that the training never saw, after some examples of each: see `bench/teach.py`."""
    folder = bench.checkpoint(run).folder
    return dict(teach_accuracies(folder, encode=bench.eyes.setdefault(run.dataset, Eye())))


def int8(bench: Bench, run: Run) -> Result:
    """The same questions, or about `ONE_BY_ONE` of more, asked of the int8 bundle of the run's checkpoint, one by one,
    and of torch; where there are classes that no training saw, what the bundle learns of them; with the first seed also
    what picture and memory tell."""
    rows = bench.rows(run)
    rows = rows[:: max(1, len(rows) // ONE_BY_ONE)]
    checkpoint, bundle = bench.checkpoint(run), bench.out / "bundles" / run.name
    shutil.rmtree(bundle, ignore_errors=True)
    manifest = export(checkpoint.folder, bundle, ExportOptions(allow_degraded=True))  # a refusal is a result, too
    assert manifest.gate is not None
    torch_asked = ask(bench.answerer(run), rows)
    with load(bundle) as model:
        asked = list(BundleAnswerer(model).ask_all(rows))
        told = {"emi": asdict(measure(BundleAnswerer(model), rows))} if run.seed == 0 else {}
    if told:
        told["emi_in_torch"] = asdict(measure(bench.answerer(run), rows))
    same = [normalize(a.answer) == normalize(b.answer) for a, b in zip(torch_asked, asked, strict=True)]
    taught = {"teach": teach_accuracies(bundle)} if run.dataset == TAUGHT and checkpoint.bank is not None else {}
    shutil.rmtree(bundle)
    return {
        **summarise(asked),
        **told,
        **taught,
        "fp32": summarise(torch_asked),
        "answers_as_fp32": float(np.mean(same)),
        "given_back": to_json(manifest.given_back),
        "refused": list(manifest.gate.failures),
    }


KINDS: dict[str, Callable[[Bench, Run], Result]] = {
    "scores": scores,
    "emi": emi,
    "copy": copy,
    "full_bank": full_bank,
    "bank_sizes": bank_sizes,
    "teach": teach,
    "int8": int8,
}
