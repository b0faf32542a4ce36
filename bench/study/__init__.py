"""The study of what the memory buys: `python -m tinyalign_edge.bench.study`, report in `docs/study.md`."""
