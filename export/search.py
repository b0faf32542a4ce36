"""The search: which matrices of a component need a better format than the one asked for.

The matrices are ranked by the error that each adds by itself (`sensitivity`); whether a plan is good enough is
measured on the component's output. First the shortest head of the ranking is found that is enough when it is given
back; then what was given back in vain is taken again, in at most `CHUNKS` pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tinyalign_edge.bundle import Format
from tinyalign_edge.export.matrices import Matrix
from tinyalign_edge.export.plan import NEXT_FORMAT, Plan, matrix_bytes

MAX_GROWTH = 1.5  # a component may take so many times the bytes of its base format
CHUNKS = 8

Passes = Callable[[Plan], bool]


def search(base: Plan, ranking: Sequence[str], matrices: Mapping[str, Matrix], passes: Passes) -> Plan:
    """The plan with the fewest bytes given back that was found to pass.

    Args:
        base: nothing given back; it does not pass.
        ranking: the component's nodes that are not in float32, the most sensitive first.
        matrices: of those nodes.
        passes: writes and measures a plan. Called some 10 times for one bad node, some 30 at most.

    Returns:
        A plan that passes; or one that does not, cut to `MAX_GROWTH`.
    """
    formats: list[Format] = [base.base]
    while formats[-1] != "fp32":
        formats.append(NEXT_FORMAT[formats[-1]])
        found = _shortest_head(base, ranking, formats[-1], matrices, passes)
        if found is not None:
            return _affordable(_take_again(found, formats[:-1], matrices, passes), ranking, matrices)
    return base


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
            cut = Plan(plan.base, _without({**plan.given_back, **piece}, plan.base), plan.max_level)
            if cut != plan and passes(cut):
                plan = cut
                break
    return plan


def _affordable(plan: Plan, ranking: Sequence[str], matrices: Mapping[str, Matrix]) -> Plan:
    """The plan without its least sensitive nodes that make the component grow beyond `MAX_GROWTH`."""

    def size(name: str, kind: Format) -> int:
        return matrix_bytes(matrices[name].rows, matrices[name].columns, kind)

    budget = (MAX_GROWTH - 1) * sum(size(name, plan.base) for name in matrices)
    kept: dict[str, Format] = {}
    for name in ranking:
        kind = plan.format(name)
        budget -= size(name, kind) - size(name, plan.base)
        if budget < 0:
            break
        kept[name] = kind
    return Plan(plan.base, _without(kept, plan.base), plan.max_level)


def _format(kind: Format, matrix: Matrix) -> Format:
    """`kind`, or float32 for a convolution, which is in int8 by its weights only already."""
    return "fp32" if matrix.convolution and kind == "int8_weight" else kind


def _without(formats: Mapping[str, Format], base: Format) -> dict[str, Format]:
    return {name: kind for name, kind in formats.items() if kind != base}
