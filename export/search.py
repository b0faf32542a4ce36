"""The search: which matrices of a component need a better format than the one asked for.

The matrices are ranked by the error that each adds by itself (`sensitivity`); whether a plan is good enough is
measured on the component's output. First the shortest head of the ranking is found that is enough when it is given
back; then what was given back in vain is taken again, in at most `CHUNKS` pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from tinyalign_edge.bundle import Format
from tinyalign_edge.export.matrices import Matrix
from tinyalign_edge.export.plan import NEXT_FORMAT, Plan, matrix_bytes

MAX_GROWTH = 1.5  # a component may take so many times the bytes of its base format
CHUNKS = 8

Passes = Callable[[Plan], bool]


def search(
    base: Plan,
    ranking: Sequence[str],
    matrices: Mapping[str, Matrix],
    loss: Callable[[Plan], float],
    limit: float,
) -> Plan:
    """The plan with the fewest bytes given back that was found to lose at most `limit`.

    Args:
        base: nothing given back; it loses more.
        ranking: the component's nodes that are not in float32, the most sensitive first.
        matrices: of those nodes.
        loss: writes and measures a plan. Called some 10 times for one bad node, some 30 at most.

    Returns:
        A plan within the limit and `MAX_GROWTH`; if there is none, the one within `MAX_GROWTH` that loses least.
    """
    tried = [(loss(base), base)]

    def passes(plan: Plan) -> bool:
        found = loss(plan)
        if affordable(plan, matrices):
            tried.append((found, plan))
        return found <= limit

    formats: list[Format] = [base.base]
    while formats[-1] != "fp32":
        formats.append(NEXT_FORMAT[formats[-1]])
        head = _shortest_head(base, ranking, formats[-1], matrices, passes)
        if head is not None:
            plan = _take_again(head, formats[:-1], matrices, passes)
            if affordable(plan, matrices):
                return plan
            break
    return min(tried, key=lambda entry: np.nan_to_num(entry[0], nan=np.inf))[1]


def affordable(plan: Plan, matrices: Mapping[str, Matrix]) -> bool:
    """Whether the component's matrices stay within `MAX_GROWTH` of their size in the base format."""

    def size(kind: Callable[[str], Format]) -> int:
        return sum(matrix_bytes(m.rows, m.columns, kind(name)) for name, m in matrices.items())

    return size(plan.format) <= MAX_GROWTH * size(lambda _: plan.base)


def _shortest_head(
    base: Plan, ranking: Sequence[str], kind: Format, matrices: Mapping[str, Matrix], passes: Passes
) -> Plan | None:
    """The first 1, 2, 4, ... nodes in a better format, then halving between; None if all of them are not enough."""

    def head(count: int) -> Plan:
        return base.give_back({name: _format(kind, matrices[name]) for name in ranking[:count]})

    total = len(ranking)
    if not passes(head(total)):
        return None
    low, high = 0, 1
    while high < total and not passes(head(high)):
        low, high = high, min(2 * high, total)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(head(middle)) else (middle, high)
    return head(high)


def _take_again(plan: Plan, cheaper: Sequence[Format], matrices: Mapping[str, Matrix], passes: Passes) -> Plan:
    """Try a cheaper format for a piece of what was given back after another, the least sensitive first."""
    names = list(plan.given_back)[::-1]
    size = -(-len(names) // CHUNKS)
    for start in range(0, len(names), size):
        for kind in cheaper:
            piece = {name: _format(kind, matrices[name]) for name in names[start : start + size]}
            cut = replace(plan, given_back=_without({**plan.given_back, **piece}, plan.base))
            if cut != plan and passes(cut):
                plan = cut
                break
    return plan


def _format(kind: Format, matrix: Matrix) -> Format:
    """`kind`, or float32 for a convolution, which is in int8 by its weights only already."""
    return "fp32" if matrix.convolution and kind == "int8_weight" else kind


def _without(formats: Mapping[str, Format], base: Format) -> dict[str, Format]:
    return {name: kind for name, kind in formats.items() if kind != base}
