"""What a smaller bank costs: held-out loss on real photographs against bytes, chosen entries beside random ones.

    python -m tinyalign_edge.bench.budget [--bundle runs/caltech/tokens-bundle] [--out runs/budget] [--limit N]

Needs `TINYALIGN_SHARED` and a bundle of the Caltech-101 run; writes `bench/results/budget.json`. A bank that is built
already is not built again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyalign_edge.bench.record import record, shared
from tinyalign_edge.data import read_rows
from tinyalign_edge.memory import Bank
from tinyalign_edge.memory.choose import answer_numbers, content_numbers, entry_costs, within_budget
from tinyalign_edge.memory.coverage import Keys, by_worth
from tinyalign_edge.memory.manifest import is_bank
from tinyalign_edge.memory.publish import publish
from tinyalign_edge.memory.snapshot import open_snapshot
from tinyalign_edge.runtime.budget import held_out_losses
from tinyalign_edge.runtime.build import BuildOptions, build
from tinyalign_edge.runtime.model import load

COMMAND = "python -m tinyalign_edge.bench.budget"
SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)  # of the whole bank's bytes
SEEDS = 3  # of random choices

Mask = npt.NDArray[np.bool_]


def main() -> None:
    """Build the whole bank, choose from it, measure, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=Path("runs/caltech/tokens-bundle"))
    parser.add_argument("--out", type=Path, default=Path("runs/budget"))
    parser.add_argument("--limit", type=int, help="Ask about the first rows only.")
    given = parser.parse_args()
    images, everything = shared("data", "caltech101"), given.out / "everything"
    if not is_bank(everything):
        build(given.bundle, data=images / "train.json", images=images, out=everything, options=BuildOptions())
    banks = _banks(everything, given.out)
    with load(given.bundle, memory_dir=everything) as model:
        rows = read_rows(images / "test.json", images)[: given.limit]
        losses, tokens = held_out_losses(model, [Bank(given.out / name) for name in banks], rows)
    points = [{**banks[name], "name": name, "nll_per_token": loss} for name, loss in zip(banks, losses, strict=True)]
    for point in points:
        print(f"{point['name']:<16} {point['entries']:>6} {point['bytes']:>9,} B {point['nll_per_token']:.4f}")
    options = f" --limit {given.limit}" if given.limit else ""
    print(record("budget", COMMAND + options, {"tokens": tokens, "points": points}))


def _banks(everything: Path, out: Path) -> dict[str, dict[str, Any]]:
    """Write the banks to compare; their names, entries and bytes."""
    snapshot = open_snapshot(everything)
    (table,) = snapshot.segments
    answers, costs = answer_numbers(table), entry_costs(table)
    order, total = by_worth(Keys(table.keys, table.key_scales), content_numbers(table), costs), int(costs.sum())
    keeps: dict[str, Mask] = {"everything": np.ones(len(table), np.bool_)}
    for share in SHARES:
        keeps[f"chosen-{share:.4g}"] = within_budget(order, answers, costs, int(share * total))
        for seed in range(SEEDS):
            keeps[f"random-{share:.4g}-{seed}"] = _random(costs, int(share * total), seed)
    for name, keep in keeps.items():
        if name != "everything":
            publish(out / name, snapshot.manifest.spec, [(table, keep)])
    return {name: {"entries": int(keep.sum()), "bytes": int(costs[keep].sum())} for name, keep in keeps.items()}


def _random(costs: npt.NDArray[np.int64], budget_bytes: int, seed: int) -> Mask:
    order = np.random.default_rng(seed).permutation(len(costs))
    keep = np.zeros(len(costs), np.bool_)
    keep[order[np.cumsum(costs[order]) <= budget_bytes]] = True
    return keep


if __name__ == "__main__":
    main()
