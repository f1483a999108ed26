"""What the device is and how it is now, as far as Linux tells; it is pushed to devices beside `runner.py`, which loads it.

Python 3.8, standard library only.
"""

# ruff: noqa: B905 (zip has no `strict` before Python 3.10)
from __future__ import annotations

import glob
import os
import platform
import re
import time
from typing import Any

_PRIME = (1 << 521) - 1
ISA = {name: name for name in ["avx", "avx2", "fma", "f16c", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "neon", "i8mm", "bf16", "sve", "sve2"]}
ISA.update(avx512f="avx512", avx512_vnni="vnni", asimd="neon", asimddp="dotprod", asimdhp="fp16")
ARM_PARTS = {
    (0x41, 0xD03): "Cortex-A53", (0x41, 0xD04): "Cortex-A35", (0x41, 0xD05): "Cortex-A55", (0x41, 0xD07): "Cortex-A57", (0x41, 0xD08): "Cortex-A72",
    (0x41, 0xD09): "Cortex-A73", (0x41, 0xD0A): "Cortex-A75", (0x41, 0xD0B): "Cortex-A76", (0x41, 0xD0C): "Neoverse-N1", (0x41, 0xD0D): "Cortex-A77",
    (0x41, 0xD40): "Neoverse-V1", (0x41, 0xD41): "Cortex-A78", (0x41, 0xD42): "Cortex-A78AE", (0x41, 0xD44): "Cortex-X1", (0x41, 0xD46): "Cortex-A510",
    (0x41, 0xD47): "Cortex-A710", (0x41, 0xD48): "Cortex-X2", (0x41, 0xD49): "Neoverse-N2", (0x41, 0xD4F): "Neoverse-V2", (0x4E, 0x004): "Carmel",
}  # fmt: skip


def read_text(path: str) -> str:
    """The text of a file of the system, or an empty text where the device has none or hides it."""
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.read()
    except OSError:
        return ""


def cpuinfo_values(text: str, key: str) -> list[str]:
    """Every value of a key in the text of `/proc/cpuinfo`, in order; keys are compared without case."""
    return [value.strip() for value in re.findall(rf"(?im)^{re.escape(key)}[ \t]*:(.*)$", text)]


def cpu_model(text: str) -> str:
    """The processor's name in the text of `/proc/cpuinfo`: the model name, or Arm's implementer and part for each kind of core."""
    names = set()
    for implementer, part in zip(cpuinfo_values(text, "CPU implementer"), cpuinfo_values(text, "CPU part")):
        numbers = [int(word, 16) if re.match(r"^0x[0-9a-fA-F]+$", word) else -1 for word in (implementer, part)]
        names.add(ARM_PARTS.get((numbers[0], numbers[1]), f"Arm implementer {implementer} part {part}"))
    if names:
        return " + ".join(sorted(names))
    for key in ("model name", "Hardware", "Processor", "cpu model"):
        values = cpuinfo_values(text, key)
        if values:
            return values[0]
    return "unknown"


def isa_text(text: str) -> str:
    """The instruction sets that all cores have, sorted, separated by spaces, from the text of `/proc/cpuinfo`; only those that `ISA` names."""
    cores = [set(value.split()) for value in cpuinfo_values(text, "flags") or cpuinfo_values(text, "Features")]
    common = set.intersection(*cores) if cores else set()
    return " ".join(sorted({ISA[flag] for flag in common if flag in ISA}))


def cpuinfo_mhz(text: str) -> float | None:
    """The largest clock in the text of `/proc/cpuinfo` in MHz, or `None`; idle cores clock down, so that the largest is the one at work."""
    values = [float(value) for value in cpuinfo_values(text, "cpu MHz") if re.match(r"^[0-9.]+$", value)]
    return max(values) if values else None


def stat_ticks(text: str) -> tuple[int, int] | None:
    """Stolen and total ticks of all processors in the text of `/proc/stat`, or `None`. Guest time is part of user time (man 5 proc)."""
    match = re.search(r"(?m)^cpu +([0-9 ]+)$", text)
    ticks = [int(word) for word in match.group(1).split()] if match else []
    return (ticks[7], sum(ticks[:8])) if len(ticks) >= 8 else None


def steal_share(before: tuple[int, int] | None, after: tuple[int, int] | None) -> float | None:
    """The share of processor time that the hypervisor took between two `stat_ticks`, in [0, 1], or `None`."""
    if before is None or after is None or after[1] <= before[1]:
        return None
    return min(1.0, max(0.0, (after[0] - before[0]) / float(after[1] - before[1])))


def memory_bytes(text: str, key: str) -> int | None:
    """A size in the text of `/proc/meminfo` or `/proc/self/status` in bytes, or `None`."""
    match = re.search(rf"(?m)^{re.escape(key)}:\s+([0-9]+) kB", text)
    return int(match.group(1)) * 1024 if match else None


def zone_celsius(text: str) -> float | None:
    """A thermal zone's temperature in degrees Celsius; `None` for a text that is no temperature of a working sensor (0 to 130)."""
    try:
        value = float(text)
    except ValueError:
        return None
    return next((celsius for celsius in (value, value / 1000.0) if 0.0 < celsius < 130.0), None)


def os_name(text: str) -> str:
    """The system's name in the text of `/etc/os-release`."""
    match = re.search(r'(?m)^PRETTY_NAME="?([^"\n]*)"?', text)
    return match.group(1) if match else platform.system()


def look_ns() -> int:
    """How long one run of a fixed kernel takes, in nanoseconds; longer means a slower machine at this moment.

    The kernel is a power modulo a prime: one loop of C over 70 bytes. Python's own loops differ by a tenth from process to process, with their addresses.
    """
    start = time.perf_counter_ns()
    pow(3, _PRIME - 2, _PRIME)
    return time.perf_counter_ns() - start


def sentinel_ns(window_s: float = 0.15) -> int:
    """The shortest of at least three runs of the kernel within the window, in nanoseconds: how fast the machine was at its calmest."""
    end = time.perf_counter_ns() + int(window_s * 1e9)
    times = [look_ns(), look_ns(), look_ns()]
    while time.perf_counter_ns() < end:
        times.append(look_ns())
    return min(times)


def snapshot(since: tuple[int, int] | None = None) -> dict[str, Any]:
    """The device's state now; `since` is an earlier `stat_ticks` from which the share of stolen time counts."""
    cpu = "/sys/devices/system/cpu/cpu[0-9]*/cpufreq/"
    clocks = [float(text) / 1000.0 for text in map(read_text, glob.glob(cpu + "scaling_cur_freq")) if text.strip().isdigit()]
    governors = sorted({text.strip() for text in map(read_text, glob.glob(cpu + "scaling_governor")) if text.strip()})
    zones = [zone_celsius(read_text(path)) for path in glob.glob("/sys/class/thermal/thermal_zone*/temp")]
    available = memory_bytes(read_text("/proc/meminfo"), "MemAvailable")
    return {
        "load_1m": os.getloadavg()[0],
        "frequency_mhz": max(clocks) if clocks else cpuinfo_mhz(read_text("/proc/cpuinfo")),
        "governor": " ".join(governors) or None,
        "temperature_c": max((zone for zone in zones if zone is not None), default=None),
        "steal_share": steal_share(since, stat_ticks(read_text("/proc/stat"))),
        "sentinel_ns": sentinel_ns(),
        "available_mb": None if available is None else available / 1e6,
    }


def fingerprint() -> dict[str, str]:
    """What the device is, as texts."""
    cpuinfo, memory = read_text("/proc/cpuinfo"), memory_bytes(read_text("/proc/meminfo"), "MemTotal")
    return {
        "cpu_model": cpu_model(cpuinfo), "isa": isa_text(cpuinfo), "cores": str(os.cpu_count() or 0), "machine": platform.machine(),
        "ram_mb": "unknown" if memory is None else f"{memory / 1e6:.0f}", "os": os_name(read_text("/etc/os-release")), "kernel": platform.release(),
        "python": platform.python_version(),
    }  # fmt: skip
