"""The study: train, measure, and write what is known.

    python -m tinyalign_edge.bench.study [--out runs/study] [--parts PATTERN ...] [--list | --report]

Needs `TINYALIGN_SHARED`. Every part is a file below `--out`, which begins with what `bench/results/study/` holds of
runs with the present settings; parts that are there are not repeated, those of other settings are refused, and a
training that was killed goes on. Afterwards, or with `--report` alone, the results are gathered in
`bench/results/study/` and the figures and tables of `docs/study.md` are made anew, from whatever parts there are. To
measure a part again, delete it in both places.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from tinyalign_edge.bench.study.datasets import find_dataset
from tinyalign_edge.bench.study.measure import Bench
from tinyalign_edge.bench.study.plan import plan
from tinyalign_edge.bench.study.report import Places, write_report
from tinyalign_edge.bench.study.runner import chosen, run_missing, time_left
from tinyalign_edge.bench.study.store import recorded, results


def main() -> None:
    """Run what is missing and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--parts", nargs="*", default=["*"], metavar="PATTERN", help="only those of these names")
    parser.add_argument("--list", action="store_true", help="show the parts, those that are done with an x")
    parser.add_argument("--report", action="store_true", help="train and measure nothing")
    given = parser.parse_args()
    bench = Bench(given.out, partial(find_dataset, out=given.out))
    bench.take_up(recorded(Places().results, plan()), plan())
    bench.check(plan())
    parts = chosen(plan(), given.parts)
    if given.list:
        done = results(given.out, parts)
        print("\n".join(f"[{'x' if part.name in done else ' '}] {part.name}" for part in parts))
        print(time_left(given.out, parts))
        return
    if not given.report:
        run_missing(bench, parts)
    write_report(results(given.out, plan()))


if __name__ == "__main__":
    main()
