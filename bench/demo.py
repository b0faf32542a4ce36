"""The demo, timed and recorded: `tinyalign-edge demo` in a folder, its report with machine, commit and versions.

    python -m tinyalign_edge.bench.demo [--out runs/demo] [--seed 0]

Writes `bench/results/demo.json`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tinyalign_edge.bench.record import record
from tinyalign_edge.demo.run import run_demo


def main() -> None:
    """Run the demo and record its report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    report = run_demo(given.out, seed=given.seed)
    print(record("demo", f"python -m tinyalign_edge.bench.demo --seed {given.seed}", report))


if __name__ == "__main__":
    main()
