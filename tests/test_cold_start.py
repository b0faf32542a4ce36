"""What a process holds: little more than the weights after loading, and no more after a hundred answers."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("torch")

from tests.conftest import STORED_BUNDLE
from tinyalign_edge.bench import cold_start
from tinyalign_edge.bench.peers.shapes import LANGUAGE
from tinyalign_edge.bench.random_bundle import random_bundle

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from Linux's /proc")

SIZES = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 8}
CACHE_MB = 1  # full after a few answers
NOISE = 2 * 2**20  # bytes: what an allocator keeps or gives back from one moment to the next
PICTURE = STORED_BUNDLE.parent / "picture.png"


def test_a_hundred_answers_take_no_more_memory() -> None:
    arguments = [str(STORED_BUNDLE), str(PICTURE), "1", str(CACHE_MB)]
    assert cold_start.growth(arguments)["growth_bytes"] < NOISE


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Both arms, for a bundle large enough that its weights outweigh everything else."""
    out = tmp_path_factory.mktemp("cold")
    with pytest.MonkeyPatch.context() as patch:
        smoke = LANGUAGE["smoke-lm"]
        patch.setitem(LANGUAGE, "medium-lm", replace(smoke, config={**smoke.config, **SIZES}))
        made = random_bundle("smoke-encoder", "medium-lm", out / "source", visual_tokens=4)
    return cold_start.measure(made.folder, PICTURE, out / "packed", threads=1, rounds=1, cache_mb=CACHE_MB)


@pytest.mark.slow
def test_loading_takes_at_most_1_3_times_the_weights(found: dict[str, Any]) -> None:
    assert found["weight_bytes"] > 90e6
    for arm in cold_start.ARMS:
        assert 0.5 < found[arm]["load_to_weights"] <= 1.3
        assert found[arm]["growth_bytes"] < NOISE


@pytest.mark.slow
def test_two_processes_share_packed_weights(found: dict[str, Any]) -> None:
    plain, packed = (found[arm]["two_share_bytes"] for arm in cold_start.ARMS)
    assert packed < plain - 0.8 * found["weight_bytes"]
    assert found["packed"]["two_private_bytes"] < found["plain"]["two_private_bytes"] - found["weight_bytes"]
