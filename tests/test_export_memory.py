"""The measurement of an export's peak memory: the child's own, whatever the parent holds."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from tinyalign_edge.bench.export_memory import measure, run_watched
from tinyalign_edge.errors import TinyAlignError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from Linux's /proc")
MEBIBYTE = 2**20


def test_the_peak_is_the_childs_and_not_the_parents() -> None:
    parents = np.ones(300 * MEBIBYTE, np.uint8)
    code = f"import time; held = b'x' * {100 * MEBIBYTE}; time.sleep(0.3)"
    peak = run_watched([sys.executable, "-c", code])
    assert 100 * MEBIBYTE <= peak.anonymous_bytes <= peak.resident_bytes < 200 * MEBIBYTE < parents.nbytes


def test_a_command_that_fails_is_an_error() -> None:
    with pytest.raises(TinyAlignError, match="ended with 3"):
        run_watched([sys.executable, "-c", "raise SystemExit(3)"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_an_export_is_measured_above_what_its_imports_take(tmp_path: Path) -> None:
    row = measure("smoke-lm", tmp_path)
    assert row.weight_bytes == 4 * row.parameters
    assert row.peak_bytes > row.import_bytes > 0
    assert row.multiple == (row.peak_bytes - row.import_bytes) / row.weight_bytes
