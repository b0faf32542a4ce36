"""The search for formats, on losses that are known: each node adds its own, by format."""

from __future__ import annotations

import pytest

from tinyalign_edge.bundle import Format
from tinyalign_edge.export.matrices import Matrix
from tinyalign_edge.export.plan import Plan
from tinyalign_edge.export.search import MAX_GROWTH, affordable, search

NODES = [f"layers.{i}" for i in range(120)]
MATRICES = {name: Matrix(name, 64, 64, transposed=False) for name in NODES}
SHARE: dict[Format, float] = {"int8": 1.0, "int8_weight": 0.1, "fp32": 0.0, "int4_weight": 20.0}


class Losses:
    """Counts how often it is asked."""

    def __init__(self, bad: dict[str, float]) -> None:
        self.bad, self.calls = bad, 0

    def __call__(self, plan: Plan) -> float:
        self.calls += 1
        return sum(self.bad.get(name, 1e-6) * SHARE[plan.format(name)] for name in NODES)


@pytest.mark.parametrize(("loss", "kind"), [(0.04, "int8_weight"), (0.4, "fp32")])
def test_one_bad_node_gets_the_cheapest_format_that_is_enough(loss: float, kind: Format) -> None:
    losses = Losses({NODES[70]: loss})
    plan = search(Plan("int8"), [NODES[70], *NODES[:70], *NODES[71:]], MATRICES, losses, 0.005)
    assert plan.given_back == {NODES[70]: kind}
    assert losses.calls <= 10


def test_a_ranking_that_is_wrong_is_corrected_in_pieces() -> None:
    losses = Losses({NODES[20]: 0.04})
    plan = search(Plan("int8"), NODES, MATRICES, losses, 0.005)
    assert NODES[20] in plan.given_back
    assert len(plan.given_back) <= 3
    assert losses.calls <= 40


def test_what_nothing_affordable_can_mend_stays_within_the_growth() -> None:
    losses = Losses(dict.fromkeys(NODES, 1.0))
    plan = search(Plan("int8"), NODES, MATRICES, losses, 1e-9)
    assert affordable(plan, MATRICES)
    assert not affordable(Plan("int8").give_back(dict.fromkeys(NODES, "fp32")), MATRICES)
    assert losses(plan) <= losses(Plan("int8")) / MAX_GROWTH
    assert losses(plan) > 1e-9


def test_losses_that_are_not_numbers_give_the_plan_asked_for() -> None:
    assert search(Plan("int8"), NODES, MATRICES, lambda _: float("nan"), 1.0) == Plan("int8")
