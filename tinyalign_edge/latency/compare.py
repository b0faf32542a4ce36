"""Two results side by side: ratios, and whether they exceed the noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tinyalign_edge.errors import InputError
from tinyalign_edge.latency.rows import Result, Row, Unit

FEWEST = 3  # samples of each side by which a difference can be told from noise
RULE = (
    "beyond the noise: the medians differ by more than the sum of both spreads (half the distance of the quartiles), "
    f"with at least {FEWEST} samples each; sizes on disk: by a byte"
)
Verdict = Literal["less", "more", "within the noise", "too few samples", "equal"]


@dataclass(frozen=True)
class Change:
    """One quantity in both results; times, bytes and energy are better where they are less."""

    bundle: str
    memory: bool | None
    threads: int | None
    stage: str
    context: int | None
    unit: Unit
    a: float  # median
    b: float
    ratio: float | None  # b to a; None where a is 0
    verdict: Verdict

    @property
    def beyond_noise(self) -> bool:
        """Whether the two differ by more than chance explains."""
        return self.verdict in ("less", "more")

    def to_json(self) -> dict[str, Any]:
        """As `bench compare --output json` prints it."""
        named = {"bundle": self.bundle, "memory": self.memory, "threads": self.threads, "stage": self.stage}
        named |= {} if self.context is None else {"context": self.context}
        sides = {f"a_{self.unit}": self.a, f"b_{self.unit}": self.b}
        return {**named, **sides, "ratio": self.ratio, "verdict": self.verdict, "beyond_noise": self.beyond_noise}


@dataclass(frozen=True)
class Comparison:
    """What two results have in common, and in what their circumstances differ."""

    changes: tuple[Change, ...]
    notes: tuple[str, ...]


def compare(a: Result, b: Result) -> Comparison:
    """Set `b` beside `a`, row by row; where each is about one bundle, its name does not matter.

    Raises:
        InputError: one of them was measured under emulation, or they have no row in common.
    """
    for name, result in (("A", a), ("B", b)):
        if result.host.get("emulated"):
            raise InputError(
                f"{name} was measured under emulation, whose times say nothing of the processor; use a device"
            )
    single = len(a.bundles) == len(b.bundles) == 1
    others = {_key(row, single): row for row in b.rows}
    pairs = [(row, others[_key(row, single)]) for row in a.rows if _key(row, single) in others]
    if not pairs:
        raise InputError(
            f"nothing in common: A has {_about(a)}; B has {_about(b)}; measure the same bundles with the same --threads"
        )
    return Comparison(tuple(_change(*pair) for pair in pairs), tuple(_notes(a, b, single)))


def _change(a: Row, b: Row) -> Change:
    ratio = b.median / a.median if a.median else None
    return Change(a.bundle, a.memory, a.threads, a.stage, a.context, a.unit, a.median, b.median, ratio, _verdict(a, b))


def _verdict(a: Row, b: Row) -> Verdict:
    difference = b.median - a.median
    if difference == 0:
        return "equal"
    measured = a.threads is not None  # sizes on disk are counted, not measured
    if measured and min(len(a.samples), len(b.samples)) < FEWEST:
        return "too few samples"
    if measured and abs(difference) <= a.spread + b.spread:
        return "within the noise"
    return "less" if difference < 0 else "more"


def _key(row: Row, single: bool) -> tuple[object, ...]:
    return row.key[1:] if single else row.key


def _about(result: Result) -> str:
    threads = sorted({row.threads for row in result.rows if row.threads is not None})
    return f"{', '.join(result.bundles)} with threads {', '.join(map(str, threads))}"


def _notes(a: Result, b: Result, single: bool) -> list[str]:
    """Circumstances that differ, one sentence each."""
    pairs: list[tuple[str, Any, Any]] = [
        (what, a.host.get(key), b.host.get(key))
        for what, key in (("processor", "cpu"), ("device", "device"), ("governor", "governor"))
    ]
    pairs += [(f"version of {name}", a.versions.get(name), b.versions.get(name)) for name in (*a.versions, *b.versions)]
    pairs += [("commit", a.commit, b.commit)]
    pairs += [(name, a.work.get(name), b.work.get(name)) for name in ("new_tokens", "repetitions", "warmup", "picture")]
    couples: Sequence[tuple[str, str]] = [(name, name) for name in a.bundles if name in b.bundles]
    for first, second in [(next(iter(a.bundles)), next(iter(b.bundles)))] if single else couples:
        sizes = ("visual_tokens", "memory_tokens", "prompt_tokens")
        pairs += [(f"{n} of {first}", a.bundles[first].get(n), b.bundles[second].get(n)) for n in sizes]
    notes = dict.fromkeys(f"{what}: {one} and {other}" for what, one, other in pairs if one != other)
    seen = [name for name, result in (("A", a), ("B", b)) if (result.host.get("throttling") or {}).get("seen")]
    return [*notes, *(f"{name} was throttled while it was measured" for name in seen)]
