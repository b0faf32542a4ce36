"""How much memory this process takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def resident_bytes() -> int:
    """Physical memory now; 0 where the system does not tell."""
    if STATUS.is_file():
        return _status("VmRSS")
    done = subprocess.run(["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True, check=False)
    return int(done.stdout.strip() or 0) * 1024


def peak_bytes() -> int:
    """The most physical memory since the program started; on Linux `ru_maxrss` would begin with the parent's."""
    if STATUS.is_file():
        return _status("VmHWM")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status(name: str) -> int:
    return next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith(name))
