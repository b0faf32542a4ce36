"""The process that measures one setting: a request as JSON on standard input, answers as lines on standard output.

    python -m tinyalign_edge.latency.child

Lines are `{"advance": 1}`, and at the end `{"result": ...}` or `{"error": ..., "kind": ...}`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinyalign_edge.config import from_json, to_json
from tinyalign_edge.errors import TinyAlignError


def main() -> None:
    """Do what is asked for, once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started this process ends it
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not come between the lines
    request = json.loads(sys.stdin.read())

    def advance() -> None:
        lines.write('{"advance": 1}\n')

    try:
        answer = {"result": run(request, advance)}
    except TinyAlignError as error:
        answer = {"error": str(error), "kind": type(error).__name__}
    lines.write(json.dumps(answer) + "\n")


def run(request: dict[str, Any], advance: Callable[[], None]) -> Any:
    """Check, measure or profile a setting."""
    from tinyalign_edge.latency.measure import Setting, check, measure
    from tinyalign_edge.latency.profile import profile
    from tinyalign_edge.latency.work import Work

    setting = from_json(Setting, request["setting"], "setting")
    work = from_json(Work, request["work"], "work")
    match request["do"]:
        case "check":
            return to_json(check(setting, work))
        case "measure":
            given = {"expected": request["expected"], "repetitions": request["repetitions"]}
            rows = measure(setting, work, **given, scratch=Path(request["scratch"]), advance=advance)
            return [row.to_json() for row in rows]
        case _:
            return profile(Path(setting.folder), threads=setting.threads, tokens=request["tokens"])


if __name__ == "__main__":
    main()
