"""Whether the machine slowed itself down while something was measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyalign_edge.latency.host import ROOT, read_text

RASPBERRY_PI = "sys/devices/platform/soc/soc:firmware/get_throttled"
NOW = (
    0xF  # of its bits: under-voltage, clock capped, throttled, soft temperature limit; the higher ones are of the past
)


@dataclass(frozen=True)
class Throttle:
    """What the system tells at a moment.

    Attributes:
        events: counted by x86 processors since they were started; None where nothing is counted.
        limited: a cooling device or the firmware holds the clock down now; None where neither tells.
        temperature_c: of the hottest sensor; None where there is none.
    """

    events: int | None
    limited: bool | None
    temperature_c: float | None


def read_throttle(root: Path = ROOT) -> Throttle:
    """Read counters, cooling devices, the Raspberry Pi's firmware and temperatures below `root`."""
    counters = _numbers(root, "sys/devices/system/cpu/cpu*/thermal_throttle/*_throttle_count")
    states = []
    for device in (root / "sys/class/thermal").glob("cooling_device*"):
        kind = read_text(device / "type").lower()
        if "cpu" in kind or kind == "processor":
            states += _numbers(device, "cur_state")
    firmware = read_text(root / RASPBERRY_PI)
    states += [int(firmware, 16) & NOW] if firmware else []
    heat = [value / 1000 for value in _numbers(root, "sys/class/thermal/thermal_zone*/temp")]
    return Throttle(
        events=sum(counters) if counters else None,
        limited=any(states) if states else None,
        temperature_c=max(heat, default=None),
    )


def throttling(moments: list[Throttle]) -> dict[str, Any]:
    """What a result says of a run that was looked at in these moments: `seen` is None where the system is silent."""
    events = [moment.events for moment in moments if moment.events is not None]
    limited = [moment.limited for moment in moments if moment.limited is not None]
    heat = [moment.temperature_c for moment in moments if moment.temperature_c is not None]
    counted = events[-1] > events[0] if events else None
    known = [value for value in (counted, any(limited) if limited else None) if value is not None]
    return {
        "seen": any(known) if known else None,
        "temperature_c": {"first": heat[0], "highest": max(heat)} if heat else None,
    }


def _numbers(root: Path, pattern: str) -> list[int]:
    texts = [read_text(file) for file in sorted(root.glob(pattern))]
    return [int(text) for text in texts if text.lstrip("-").isdecimal()]
