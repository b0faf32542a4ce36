"""In which format each matrix of a component is written, what that costs, and for which processors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from tinyalign_edge.bundle import Component, Format, Precision, Target

INT8_MAX = 127
BLOCK = 32  # numbers that share a scale in the weight-only formats

PRECISIONS: dict[Format, Precision] = {"int8": "int8", "int8_weight": "int8", "int4_weight": "int4", "fp32": "fp32"}

# Each format's next better one: what the search gives back.
NEXT_FORMAT: dict[Format, Format] = {"int4_weight": "int8_weight", "int8": "int8_weight", "int8_weight": "fp32"}

# x86 without VNNI adds pairs of products u8 * s8 in 16 bits: 2 * 255 * 63 fits, 2 * 255 * 127 saturates.
MAX_LEVELS: dict[Target, int] = {"portable": 63, "vnni": INT8_MAX, "avx2": 63, "arm64": INT8_MAX}


@dataclass(frozen=True)
class Plan:
    """The format of a component's matrices: `base`, but for those `given_back`.

    Attributes:
        base: what was asked for.
        given_back: node name to a better format.
        max_level: largest magnitude of an int8 weight's level.
        smooth: outlier channels are folded into neighbouring weights (`smooth`).
    """

    base: Format
    given_back: Mapping[str, Format] = field(default_factory=dict)
    max_level: int = INT8_MAX
    smooth: bool = False

    def format(self, name: str) -> Format:
        """The format of the matrix `name`."""
        return self.given_back.get(name, self.base)

    def give_back(self, formats: Mapping[str, Format]) -> Plan:
        """This plan with these formats beside those already given back."""
        return replace(self, given_back={**self.given_back, **formats})


@dataclass(frozen=True)
class Plans:
    """One plan a component."""

    vision: Plan
    memory: Plan
    decoder: Plan

    def of(self, component: Component) -> Plan:
        """The plan of a component by its name."""
        plan: Plan = getattr(self, component)
        return plan


def matrix_bytes(rows: int, columns: int, kind: Format) -> int:
    """Bytes of a matrix (rows, columns) with its scales."""
    blocks = rows * -(-columns // BLOCK)
    return {
        "int8": rows * (columns + 4),
        "int8_weight": blocks * (BLOCK + 4),
        "int4_weight": blocks * (BLOCK // 2 + 4),
        "fp32": rows * columns * 4,
    }[kind]
