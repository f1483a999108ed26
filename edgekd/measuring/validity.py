"""Whether a launch counts: its own facts against the limits of validity, and nothing else (never its label, never its latency's size)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgekd.records import Launch, Limits
from edgekd.stats import percentile_of


def _known(*values: float | None) -> list[float]:
    return [value for value in values if value is not None]


def spread_of(launch: Launch) -> float | None:
    """p90 over p50 of the launch's inferences; `None` where there are no raw samples."""
    if not launch.samples_ns:
        return None
    median = percentile_of(launch.samples_ns, 50.0)
    return percentile_of(launch.samples_ns, 90.0) / median if median > 0 else math.inf


def sentinel_drift_of(launch: Launch, sentinel_ns: int | None) -> float | None:
    """The larger relative excess of the fixed kernel's time over its calibration; `None` if unknown.

    It is that beside the timed inferences where it was looked at there, else before or after the launch.
    """
    seen = _known(launch.before.sentinel_ns, launch.after.sentinel_ns) if launch.sentinel_ns is None else [launch.sentinel_ns]
    return max(seen) / sentinel_ns - 1.0 if seen and sentinel_ns else None


def steal_of(launch: Launch) -> float | None:
    """The larger share of CPU time that the hypervisor took, before or after; `None` if unknown."""
    seen = _known(launch.before.steal_share, launch.after.steal_share)
    return max(seen) if seen else None


def frequency_drop_of(launch: Launch) -> float | None:
    """The relative fall of the clock from before to after; `None` unless both are known."""
    before, after = launch.before.frequency_mhz, launch.after.frequency_mhz
    return 1.0 - after / before if before and after is not None else None


def temperature_rise_of(launch: Launch) -> float | None:
    """Kelvin from before to after; `None` unless both are known."""
    before, after = launch.before.temperature_c, launch.after.temperature_c
    return after - before if before is not None and after is not None else None


def temperature_of(launch: Launch) -> float | None:
    """The higher of the temperatures before and after, in degrees Celsius; `None` if unknown."""
    seen = _known(launch.before.temperature_c, launch.after.temperature_c)
    return max(seen) if seen else None


def _facts(launch: Launch, limits: Limits) -> tuple[tuple[str, float | None, float | None, str, str], ...]:
    """Per check: its name, the value seen, the limit, the sentence of a failure and how its numbers are written."""
    return (
        ("steal", steal_of(launch), limits.steal_max, "contended: the hypervisor took {} of CPU time, limit {}", ".1%"),
        (
            "sentinel",
            sentinel_drift_of(launch, limits.sentinel_ns),
            limits.sentinel_drift_max,
            "slowed: the sentinel kernel took {} longer than at calibration, limit {}",
            ".1%",
        ),
        ("frequency", frequency_drop_of(launch), limits.frequency_drop_max, "throttled: the clock fell by {}, limit {}", ".1%"),
        ("temperature rise", temperature_rise_of(launch), limits.temperature_rise_max_c, "heating: {} K warmer at the end, limit {} K", ".1f"),
        ("temperature", temperature_of(launch), limits.temperature_max_c, "hot: {} degrees Celsius, limit {}", ".1f"),
        ("spread", spread_of(launch), limits.spread_max, "unsteady: p90/p50 is {}, limit {}", ".3f"),
    )


def validity_reason(launch: Launch, limits: Limits, *, sentinel_ns: int | None = None) -> str:
    """Why the launch does not count, with numbers, or "" if it does.

    `sentinel_ns` is the calibrated time of the fixed kernel; `None` takes the one of `limits`. What the device does not report
    is not checked (`unchecked` lists it), but a sensor that reported before the launch and not after it makes the launch invalid,
    and so does a value that is not finite: a sensor that died must not certify.
    """
    if sentinel_ns is not None:
        limits = _with_sentinel(limits, sentinel_ns)
    if launch.invalid:
        return launch.invalid
    share, floor = launch.cpu_share, limits.cpu_share_min
    if share is not None and floor is not None and not share >= floor:
        return f"contended: the timed loop had {share:.1%} of its CPU time, at least {floor:.1%} needed"
    for name in ("temperature_c", "frequency_mhz", "sentinel_ns", "steal_share"):
        if getattr(launch.before, name) is not None and getattr(launch.after, name) is None:
            return f"sensor lost: {name} was reported before the launch and not after it"
    for name, value, limit, sentence, form in _facts(launch, limits):
        if value is None or limit is None:
            continue
        if not math.isfinite(value):
            return f"sensor: {name} is {value}, not a finite number"
        if value > limit + 1e-9:  # a value at the limit is inside it, whatever the last bit
            return sentence.format(format(value, form), format(limit, form))
    return ""


def _with_sentinel(limits: Limits, sentinel_ns: int) -> Limits:
    import msgspec

    return msgspec.structs.replace(limits, sentinel_ns=sentinel_ns)


def unchecked(launches: Sequence[Launch], limits: Limits) -> tuple[str, ...]:
    """The conditions that could not be checked on at least one of the launches, sorted: no sensor, or no limit.

    For the report: a condition in this list was not certified.
    """
    names: set[str] = set()
    for launch in launches:
        if launch.cpu_share is None or limits.cpu_share_min is None:
            names.add("cpu share")
        names |= {name for name, value, limit, _, _ in _facts(launch, limits) if value is None or limit is None}
    return tuple(sorted(names))


def causes(rejected: Sequence[Launch]) -> str:
    """Rejected launches counted by cause, the most frequent first: `5 contended, 1 throttled`; "" for none."""
    counts: dict[str, int] = {}
    for launch in rejected:
        cause = launch.invalid.partition(":")[0] or "unknown"
        counts[cause] = counts.get(cause, 0) + 1
    return ", ".join(f"{count} {cause}" for cause, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])))
