"""The machine that something is measured on, and the software."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import tinyalign_edge

FEATURES = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimd", "asimddp", "i8mm", "sve", "sve2",
)  # fmt: skip
PACKAGES = ("numpy", "onnxruntime", "pillow", "tokenizers", "usearch")
ARM_CORES = {  # Main ID Register: implementer and part number, as Arm's technical reference manuals give them
    ("0x41", "0xd03"): "Cortex-A53", ("0x41", "0xd04"): "Cortex-A35", ("0x41", "0xd05"): "Cortex-A55",
    ("0x41", "0xd07"): "Cortex-A57", ("0x41", "0xd08"): "Cortex-A72", ("0x41", "0xd09"): "Cortex-A73",
    ("0x41", "0xd0a"): "Cortex-A75", ("0x41", "0xd0b"): "Cortex-A76", ("0x41", "0xd0c"): "Neoverse-N1",
    ("0x41", "0xd0d"): "Cortex-A77", ("0x41", "0xd40"): "Neoverse-V1", ("0x41", "0xd41"): "Cortex-A78",
    ("0x41", "0xd44"): "Cortex-X1", ("0x41", "0xd46"): "Cortex-A510", ("0x41", "0xd47"): "Cortex-A710",
    ("0x41", "0xd48"): "Cortex-X2", ("0x41", "0xd49"): "Neoverse-N2", ("0x41", "0xd4d"): "Cortex-A715",
    ("0x41", "0xd4e"): "Cortex-X3", ("0x41", "0xd4f"): "Neoverse-V2", ("0x41", "0xd80"): "Cortex-A520",
    ("0x41", "0xd81"): "Cortex-A720", ("0x41", "0xd82"): "Cortex-X4",
}  # fmt: skip
ROOT = Path("/")


def host(root: Path = ROOT, *, machine: str | None = None) -> dict[str, Any]:
    """What of this machine speed depends on. What the system does not tell is None or missing.

    Args:
        root: where `proc` and `sys` are found.
        machine: the processor's architecture; None: this machine's.
    """
    machine = machine or platform.machine()
    processors = _processors(root)
    flags = " ".join(_values(processors, "flags") + _values(processors, "Features")).split()
    kinds = _core_kinds(root, processors)
    names = _values(processors, "model name") or [", ".join(dict.fromkeys(kind["kind"] for kind in kinds))]
    return {
        "cpu": names[0] or platform.processor() or "unknown",
        "device": read_text(root / "proc/device-tree/model").rstrip("\0") or None,
        "features": [feature for feature in FEATURES if feature in flags],
        "cores": os.cpu_count(),
        "core_kinds": kinds,
        "governor": _governor(root),
        "machine": machine,
        "system": platform.system(),
        "emulated": _emulated(root, machine, processors),
        "memory_bytes": _memory_bytes(root),
        "temporary_files": _file_system(root, tempfile.gettempdir()),
    }


def versions() -> dict[str, str]:
    """Of Python, of this package and of those it answers with."""
    ours = {"python": platform.python_version(), "tinyalign-edge": tinyalign_edge.__version__}
    return ours | {name: importlib.metadata.version(name) for name in PACKAGES}


def commit() -> str:
    """The commit of the working tree that this package is run from, "-dirty" where files differ from it; else
    "unknown"."""
    root = Path(tinyalign_edge.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return "unknown"
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False
        )
    except OSError:  # no git
        return "unknown"
    return done.stdout.strip() or "unknown"


def read_text(path: Path) -> str:
    """The text of a file of `proc` or `sys`; "" where there is none or it is not ours to read."""
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""


def _processors(root: Path) -> list[dict[str, str]]:
    """The blocks of `/proc/cpuinfo`, one a processor; on ARM a last one may be about the board."""
    found: list[dict[str, str]] = []
    for block in read_text(root / "proc/cpuinfo").split("\n\n"):
        pairs = (line.partition(":") for line in block.splitlines())
        found.append({key.strip(): value.strip() for key, _, value in pairs})
    return found


def _values(processors: list[dict[str, str]], key: str) -> list[str]:
    return [block[key] for block in processors if key in block][:1]


def _core_kinds(root: Path, processors: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Kinds of cores with their number and highest clock; empty where all that is known is their number."""
    kinds: Counter[tuple[str, int | None]] = Counter()
    for block in processors:
        if "processor" in block and "CPU part" in block:
            part = block.get("CPU implementer", ""), block["CPU part"]
            highest = read_text(root / f"sys/devices/system/cpu/cpu{block['processor']}/cpufreq/cpuinfo_max_freq")
            kinds[ARM_CORES.get(part, " ".join(part)), int(highest) // 1000 if highest.isdecimal() else None] += 1
    for kind in ("core", "atom"):  # x86 with two kinds
        if cores := read_text(root / f"sys/devices/cpu_{kind}/cpus"):
            kinds[kind, None] = _count(cores)
    return [{"kind": kind, "count": count, "max_mhz": mhz} for (kind, mhz), count in kinds.items()]


def _count(ranges: str) -> int:
    """How many numbers "0-7,16" names."""
    ends = [part.partition("-") for part in ranges.split(",")]
    return sum(int(last or first) - int(first) + 1 for first, _, last in ends)


def _governor(root: Path) -> str | None:
    """How the system chooses clocks, of all cores."""
    files = sorted((root / "sys/devices/system/cpu").glob("cpu*/cpufreq/scaling_governor"))
    return ", ".join(sorted({read_text(file) for file in files} - {""})) or None


def _emulated(root: Path, machine: str, processors: list[dict[str, str]]) -> bool:
    """Whether an emulator runs ARM code on an x86 machine, whose kernel shows through."""
    if not machine.startswith(("aarch64", "arm")):
        return False
    kernel = read_text(root / "proc/version")
    x86 = any("vendor_id" in block for block in processors) or "x86_64" in kernel or "amd64" in kernel
    return x86 or (root / "sys/devices/system/machinecheck").is_dir()


def _memory_bytes(root: Path) -> int | None:
    lines = read_text(root / "proc/meminfo").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal")), None)


def _file_system(root: Path, folder: str) -> str | None:
    """The kind of file system that holds `folder`."""
    mounts = [line.split()[1:3] for line in read_text(root / "proc/mounts").splitlines()]
    above = [(where, kind) for where, kind in mounts if Path(folder).is_relative_to(where)]
    return max(above, key=lambda mount: len(mount[0]))[1] if above else None
