"""A bank of a given size: which entries it keeps, and what that costs in the loss of held-out answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tinyalign_edge.data import Row
from tinyalign_edge.errors import InputError
from tinyalign_edge.evaluate import single_questions
from tinyalign_edge.memory import Bank
from tinyalign_edge.memory.choose import answer_numbers, content_numbers, entry_costs, within_budget
from tinyalign_edge.memory.coverage import Keys, by_worth
from tinyalign_edge.memory.layout import BankSpec
from tinyalign_edge.memory.publish import publish
from tinyalign_edge.memory.snapshot import open_snapshot
from tinyalign_edge.memory.table import Table
from tinyalign_edge.progress import progress
from tinyalign_edge.runtime.launch import threads
from tinyalign_edge.runtime.model import Model, load

FACTORS = (0.5, 1.0, 2.0)  # of the budget: what is measured
OVERHEAD_BYTES = 4096  # of manifest and alignment


def check_budget(budget_bytes: int) -> None:
    """Refuse a budget that cannot be halved, before any work.

    Raises:
        InputError: half of it has no room for an entry.
    """
    if FACTORS[0] * budget_bytes <= OVERHEAD_BYTES:
        raise _too_small(budget_bytes)


@dataclass(frozen=True)
class BudgetPoint:
    """A bank of at most `budget_bytes`. `nll_per_token` is of the held-out answers, in nats, over `tokens` tokens."""

    budget_bytes: int
    entries: int
    bytes: int
    nll_per_token: float
    tokens: int


@dataclass(frozen=True)
class Fitted:
    """The entries of `table` that the budget has room for, and the points that were measured."""

    table: Table
    keep: npt.NDArray[np.bool_]
    points: tuple[BudgetPoint, ...]


def fit(bundle: Path, everything: Path, spec: BankSpec, budget_bytes: int, held_out: Iterable[Row]) -> Fitted:
    """Choose among the entries of the bank `everything`, and measure half the budget, all of it, and twice as much.

    The banks that are measured are written beside `everything`.

    Raises:
        InputError: the budget has no room for an entry, or a held-out picture cannot be read.
    """
    (table,) = open_snapshot(everything).segments
    answers, costs = answer_numbers(table), entry_costs(table)
    with progress("Choosing entries", len(table)) as advance:
        order = by_worth(Keys(table.keys, table.key_scales), content_numbers(table), costs, advance)
    budgets = [int(factor * budget_bytes) for factor in FACTORS]
    keeps = [within_budget(order, answers, costs, budget - OVERHEAD_BYTES) for budget in budgets]
    if not keeps[0].any():
        raise _too_small(budget_bytes)
    folders = [everything.with_name(f"budget-{factor}") for factor in FACTORS]
    for folder, keep in zip(folders, keeps, strict=True):
        publish(folder, spec, [(table, keep)])
    with load(bundle, memory_dir=folders[0], threads=threads()) as model:
        losses, tokens = held_out_losses(model, [Bank(folder) for folder in folders], held_out)
    points = tuple(
        BudgetPoint(budget, int(keep.sum()), sum(path.stat().st_size for path in folder.iterdir()), loss, tokens)
        for budget, keep, folder, loss in zip(budgets, keeps, folders, losses, strict=True)
    )
    return Fitted(table, keeps[FACTORS.index(1.0)], points)


def held_out_losses(model: Model, banks: Sequence[Bank], rows: Iterable[Row]) -> tuple[list[float], int]:
    """The mean loss of the rows' answers with each of `banks` as the model's memory, and the number of their tokens.

    Raises:
        InputError: a picture cannot be read; the message names its row.
    """
    settings = model.manifest.memory
    sums, tokens = np.zeros(len(banks)), 0
    with progress("Measuring held-out loss", None) as advance:
        for row in rows:
            try:
                image = model.encode(row.path, memories=())
            except InputError as error:
                raise InputError(f"{row.where}: {error}") from None
            assert image.key is not None
            for single in single_questions([row]):
                (turn,) = single.turns
                key = model.keys.key(image.key, turn.question)
                found = [bank.search(key, settings.k, floor=settings.floor) for bank in banks]
                seen = [replace(image, memories=said, memory_tokens=model.memory_tokens(said)) for said in found]
                losses = [model.answer_nll(one, turn.question, turn.answer) for one in seen]
                sums += [float(loss.sum()) for loss in losses]
                tokens += len(losses[0])
            advance()
    return (sums / tokens).tolist(), tokens


def _too_small(budget_bytes: int) -> InputError:
    return InputError(
        f"--budget-mb {budget_bytes / 1e6:g}: half of it must have room for an entry and {OVERHEAD_BYTES} bytes"
    )
