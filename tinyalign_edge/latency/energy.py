"""The energy that work takes, where the platform tells: Linux's RAPL counters, or a battery that discharges."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from tinyalign_edge.latency.host import ROOT, read_text

Source = Literal["rapl", "battery"]


class Meter(Protocol):
    """Measures from `start` to `stop`; both are called in turn."""

    source: Source

    def start(self) -> None:
        """Begin."""

    def stop(self) -> float:
        """Millijoules since `start`."""
        ...


def find_meter(root: Path = ROOT) -> Meter | None:
    """The best meter of this machine; None where there is none that may be read."""
    packages = sorted((root / "sys/class/powercap").glob("intel-rapl:[0-9]*"))
    packages = [p for p in packages if p.name.count(":") == 1 and read_text(p / "energy_uj").isdecimal()]
    if packages:
        return Rapl([_Counter(p / "energy_uj", int(read_text(p / "max_energy_range_uj") or 0)) for p in packages])
    for supply in sorted((root / "sys/class/power_supply").glob("*")):
        discharging = read_text(supply / "type") == "Battery" and read_text(supply / "status") == "Discharging"
        if discharging and battery_watts(supply) is not None:
            return Battery(supply)
    return None


@dataclass(frozen=True)
class _Counter:
    file: Path
    range_uj: int  # where it begins anew


class Rapl:
    """The processor packages' counters, of everything that runs on them."""

    source: Source = "rapl"

    def __init__(self, counters: list[_Counter]) -> None:
        self._counters = counters
        self._before: list[int] = []

    def start(self) -> None:
        self._before = self._read()

    def stop(self) -> float:
        pairs = zip(self._counters, self._before, self._read(), strict=True)
        return (
            sum(after - before + (counter.range_uj if after < before else 0) for counter, before, after in pairs) / 1e3
        )

    def _read(self) -> list[int]:
        return [int(read_text(counter.file) or 0) for counter in self._counters]


class Battery:
    """The whole device's power at both ends, times the time between: coarse, for batteries tell it seldom."""

    source: Source = "battery"

    def __init__(self, supply: Path) -> None:
        self._supply = supply
        self._watts, self._started = 0.0, 0.0

    def start(self) -> None:
        self._watts, self._started = battery_watts(self._supply) or 0.0, time.perf_counter()

    def stop(self) -> float:
        seconds = time.perf_counter() - self._started
        return (self._watts + (battery_watts(self._supply) or 0.0)) / 2 * seconds * 1e3


def battery_watts(supply: Path) -> float | None:
    """What a battery gives now; None where it does not tell."""
    values = [read_text(supply / name).lstrip("-") for name in ("power_now", "current_now", "voltage_now")]
    power, current, voltage = (int(value) / 1e6 if value.isdecimal() else None for value in values)
    if power is None and current is not None and voltage is not None:
        return current * voltage
    return power
