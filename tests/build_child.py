"""One of several processes that build a bank together, under torch.distributed. For `test_build.py`.

RANK=0 WORLD_SIZE=2 python -m tests.build_child BUNDLE DATA OUT
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from tinyalign_edge.memory.shards import Shards
from tinyalign_edge.runtime.build import BuildOptions, build


def main(bundle: Path, data: Path, out: Path) -> None:
    """Build, and write down which shards each process made."""
    meeting = f"file://{out.with_name('meeting')}"
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    made, write = list[int](), Shards.write
    Shards.write = lambda self, shard, *rest: (made.append(shard), write(self, shard, *rest))[1]  # type: ignore[assignment, method-assign, func-returns-value]
    built = build(bundle, data=data, images=data.parent, out=out, options=BuildOptions(shard_rows=5))
    complete, shares = [None] * dist.get_world_size(), [None] * dist.get_world_size()
    dist.all_gather_object(complete, built.complete)
    dist.all_gather_object(shares, made)
    assert any(complete)
    if dist.get_rank() == 0:
        (out.parent / "shares.json").write_text(json.dumps(shares), "utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
