"""The latency verdict: a tolerance bound over launches, looked at a planned number of times.

Latency: x = log of the percentile per launch, over launches in fresh processes. A look is taken after `plan.launches`
valid launches and after each further `plan.step`, up to `plan.max_launches` (20, 40, 60 by default). At a look the latency
passes iff mean + k s <= log limit, where k bounds 90 % of all launches; it fails iff the lower bound of the mean exceeds
log limit; else more launches are taken, and after the last look it is a refuse.

Looking repeatedly inflates the error, so the error of 1 % is split evenly over the planned looks (Bonferroni). With three
looks each is judged at confidence 1 - 0.01/3, which makes k 2.51 at 20 launches, 2.03 at 40 and 1.86 at 60 (a single look
would take 2.28, 1.90 and 1.76). The whole procedure passes an artifact whose 90 % content quantile lies at the limit, and fails one
whose mean lies at the limit, in at most 1 % of the cases, if launches are independent and normal in the log (simulated: 0.8 % and 0.6 %).

A limit that is a share of the teacher's latency is itself measured. A pass is then judged against the share of the lower bound of
the teacher's mean, a fail against the share of its upper bound, and each look's error is split evenly between student and teacher.

Launches in a row on a busy machine are correlated. The lower bound of the mean is widened for the correlation seen, so that noise
is not called failure: at a lag-1 correlation of 0.3 the simulated false fail is 1.8 % (4.8 % without), at 0.6 it is 3.5 %. The tolerance
bound is not widened: at 0.3 it passes an artifact at the content quantile in 2.8 % of the cases, at 0.6 in 13 %, and one whose mean lies
at the limit in 2 of 40 000 (benchmarks/verdict_rates.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgekd.errors import BudgetError, InputError, MeasurementInvalid
from edgekd.records import Check, Clock, Grade, Launch, LaunchProtocol, Measurement, MeasurePlan, Outcome
from edgekd.stats import CONFIDENCE, Interval, min_samples, percentile_of, serial_mean_bounds, tolerance_factor

CONTENT = 0.90
"""The share of all launches that must lie below the limit for a pass."""

ROUNDING = 1e-9
"""Relative slack, far below any clock's resolution: equal latencies must not fail by the last bit of a logarithm."""

_PERCENTILE_CLOCKS = (Clock.END_TO_END,)


class Limit(NamedTuple):
    """A latency limit in milliseconds. `upper_ms` is `None` where the limit is a given number. A share of a measured latency has
    two ends: a pass must stay below `ms`, the lower one, and a fail lie above `upper_ms`."""

    ms: float
    upper_ms: float | None = None


def planned_looks(plan: MeasurePlan) -> int:
    """How many times a verdict looks at the launches: 3 for 20, 40 and 60."""
    return 1 + max(0, math.ceil((plan.max_launches - plan.launches) / plan.step))


def look_confidence(plan: MeasurePlan, *, share: bool = False) -> float:
    """The one-sided confidence of each look, so that all looks together hold 0.99 (Bonferroni).

    `share`: the limit is a share of the teacher's latency, so student and teacher take half of the look's error each.
    """
    return 1.0 - (1.0 - CONFIDENCE) / planned_looks(plan) / (2 if share else 1)


def require_samples(protocol: LaunchProtocol, percentile: float) -> None:
    """Refuse a protocol whose launches are too short for the percentile; call it before anything is measured.

    Raises:
        InputError: `protocol.min_samples` is below `min_samples(percentile)`.
    """
    needed = min_samples(percentile)
    if protocol.min_samples < needed and percentile < 1.0:
        raise InputError(
            f"a launch has too few inferences for percentile {percentile:g}",
            found=f"percentile {percentile:g}, min_samples = {protocol.min_samples}",
            allowed=f"min_samples of at least {needed}",
            hint=f"percentiles go from 0 to 100; did you mean {percentile * 100:g}?",
        )
    if protocol.min_samples < needed:
        raise InputError(
            f"a launch has too few inferences for percentile {percentile:g}",
            found=f"min_samples = {protocol.min_samples}",
            allowed=f"at least {needed}",
            hint=f"set measure.verdict.launch.min_samples = {needed}, or use a lower percentile",
        )


def latencies_ms(launches: Sequence[Launch], percentile: float, clock: Clock = Clock.END_TO_END, *, enough: bool = True) -> NDArray[np.float64]:
    """One latency per launch in milliseconds, `(launches,)`: the percentile of its inferences, or its one first or init time.

    A launch that holds a summary only gives its maximum, which no percentile exceeds. `enough=False` takes launches with fewer inferences
    than a verdict at this percentile needs, for rough estimates.

    Raises:
        InputError: the clock is not recorded, or a launch has fewer inferences than the percentile needs.
    """
    if clock not in (*_PERCENTILE_CLOCKS, Clock.INIT, Clock.FIRST):
        raise InputError(f"launches hold no times of the clock {clock.value!r}", allowed="end_to_end, init, first", subject=clock)
    needed = min_samples(percentile) if enough and clock in _PERCENTILE_CLOCKS else 1
    out: list[float] = []
    for launch in launches:
        if clock is Clock.INIT:
            value = float(launch.init_ns)
        elif clock is Clock.FIRST:
            value = float(launch.first_ns)
        elif launch.samples_ns:
            if len(launch.samples_ns) < needed:
                raise InputError(
                    f"launch {launch.index} of {launch.label!r} has too few inferences for percentile {percentile:g}",
                    found=len(launch.samples_ns),
                    allowed=f"at least {needed}",
                    hint="raise min_samples or max_time_s of the profile's protocol, or use a lower percentile",
                    subject=launch.label,
                )
            value = percentile_of(launch.samples_ns, percentile)
        elif "max" in launch.summary_ns:
            value = float(launch.summary_ns["max"])
        else:
            value = 0.0
        if value <= 0.0:
            raise InputError(
                f"launch {launch.index} of {launch.label!r} has no {clock.value} time",
                found=value,
                hint="the runtime does not record this clock; leave its line out of the budget",
                subject=launch.label,
            )
        out.append(value / 1e6)
    return np.asarray(out, dtype=np.float64)


def estimate_latency(measurement: Measurement, percentile: float, clock: Clock = Clock.END_TO_END, confidence: float = 0.975) -> Interval:
    """The geometric mean over the valid launches in milliseconds, with t bounds of the mean log, each one-sided at `confidence`.

    Serves the ledger and the report. One valid launch gives bounds equal to its value. A screen-grade measurement may have fewer
    inferences a launch than a verdict at this percentile needs; a verdict-grade one may not.

    Raises:
        MeasurementInvalid: there is no valid launch.
        InputError: a verdict-grade launch has fewer inferences than the percentile needs.
    """
    launches = launches_for(measurement, clock)
    if not launches:
        raise _nothing_valid(measurement)
    x = np.log(latencies_ms(launches, percentile, clock, enough=measurement.grade is Grade.VERDICT))
    if x.size == 1:
        return Interval(*(float(np.exp(x[0])),) * 3)
    return Interval(*(math.exp(value) for value in serial_mean_bounds(x, confidence)))


def _nothing_valid(measurement: Measurement) -> MeasurementInvalid:
    return MeasurementInvalid(
        f"no launch of {measurement.label!r} was valid, so it has no latency",
        found=measurement.reason or f"{len(measurement.rejected)} rejected",
        hint="end other work on the device and run the same command again: finished stages are kept",
        subject=measurement.label,
    )


def share_of(share: float, teacher: Measurement, percentile: float, clock: Clock, plan: MeasurePlan) -> Limit:
    """`share` of the teacher's geometric mean over its valid launches, as the two ends of a limit.

    Raises:
        MeasurementInvalid: fewer than two valid launches.
    """
    launches = launches_for(teacher, clock)
    if len(launches) < 2:
        raise _nothing_valid(teacher)
    x = np.log(latencies_ms(launches, percentile, clock, enough=teacher.grade is Grade.VERDICT))
    mean = serial_mean_bounds(x, look_confidence(plan, share=True))
    return Limit(share * math.exp(mean.lower), share * math.exp(mean.upper))


def launches_for(measurement: Measurement, clock: Clock) -> tuple[Launch, ...]:
    """The valid launches that count for a clock: all for the timed inferences; for the init and the first time those whose sentinel was calm before
    they began, since one that was looked at within a launch says nothing on its start."""
    slow_ns = measurement.limits.sentinel_max_ns
    if clock in _PERCENTILE_CLOCKS or slow_ns is None:
        return measurement.launches
    return tuple(one for one in measurement.launches if (one.before.sentinel_ns or 0) <= slow_ns)


def check_latency(measurement: Measurement, limit: Limit | float, percentile: float, clock: Clock, plan: MeasurePlan, name: str = "latency") -> Check:
    """The latency at a percentile (or the init or first time) against `limit`; see the module's words for the rule.

    The check's `limit` is the end that a pass must stay below. `lower` is the lower bound of the mean, `upper` the tolerance bound, both
    in milliseconds. A refuse that more launches may resolve is `undecided`. Launches with a summary only are judged by their maxima: they
    pass if each is within the limit and the tolerance bound of the maxima is too; otherwise they refuse, because the percentile lies
    somewhere below the maximum. They never fail. For the init and the first time only launches count that began on an undisturbed device.

    Raises:
        InputError: the limit is not positive and finite, or a launch has fewer inferences than the percentile needs.
    """
    limit_ms, limit_upper_ms = limit if isinstance(limit, Limit) else Limit(limit)
    share = limit_upper_ms is not None
    fail_above_ms = limit_ms if limit_upper_ms is None else limit_upper_ms
    if not (math.isfinite(fail_above_ms) and 0 < limit_ms <= fail_above_ms):
        raise BudgetError(f"the limit of {name} must be a positive number of milliseconds", found=limit_ms if not share else (limit_ms, limit_upper_ms))
    what = f"p{percentile:g}" if clock in _PERCENTILE_CLOCKS else clock.value
    launches, taken = launches_for(measurement, clock), len(measurement.launches)
    n = len(launches)
    begun = " that began on a calm device" if n < taken else ""

    def refuse(value: float, reason: str, **more: float | bool | int | None) -> Check:
        fields = {"n": n, "confidence": CONFIDENCE, **more}
        return Check(name=name, outcome=Outcome.REFUSE, value=value, limit=limit_ms, unit="ms", reason=reason, **fields)  # type: ignore[arg-type]

    if not measurement.valid or n < 2:
        seen = launches or measurement.rejected
        value = float(np.exp(np.log(latencies_ms(seen, percentile, clock, enough=False)).mean())) if seen else 0.0
        if not measurement.valid:
            return refuse(value, f"invalid measurement: {measurement.reason or 'no reason recorded'}")
        return refuse(value, f"{n} valid launches{begun} of {plan.launches}", undecided=plan.max_launches >= 2 and taken < plan.max_launches)
    per_launch = latencies_ms(launches, percentile, clock)
    x = np.log(per_launch)
    confidence = look_confidence(plan, share=share)
    mean = serial_mean_bounds(x, confidence)
    k = tolerance_factor(n, CONTENT, confidence)
    value, lower, upper = math.exp(mean.value), math.exp(mean.lower), math.exp(mean.value + k * float(x.std(ddof=1)))
    log_limit = math.log(limit_ms) + ROUNDING
    log_fail = math.log(fail_above_ms) + ROUNDING
    conditions = f"{n} launches, {CONFIDENCE:.0%} confidence over {planned_looks(plan)} looks{', the teacher included' if share else ''}"
    if clock in _PERCENTILE_CLOCKS and (aside := sum(launch.set_aside for launch in launches)):
        conditions += f", {aside / (aside + sum(len(launch.samples_ns) for launch in launches)):.0%} of the inferences set aside beside a slow sentinel"
    if n < plan.launches:
        return refuse(value, f"only {n} valid launches{begun} of {plan.launches}", lower=lower, upper=upper, undecided=taken < plan.max_launches)
    summary_only = clock in _PERCENTILE_CLOCKS and any(not launch.samples_ns for launch in launches)
    if summary_only:
        what, conditions = f"max (for {what}, the runtime gives a summary only)", conditions + ", judged by the maximum"
    within = math.log(upper) <= log_limit and (not summary_only or bool(np.all(x <= log_limit)))
    exceeds = math.log(lower) > log_fail and not summary_only
    about = f"the limit of {limit_ms:.4g} to {limit_upper_ms:.4g} ms" if share else f"{limit_ms:.4g} ms"
    if not within and not exceeds:
        more = taken < plan.max_launches
        end = "more launches may decide" if more else f"{n} launches do not decide"
        reason = f"{what} {value:.4g} ms in [{lower:.4g}, {upper:.4g}] around {about}; {end}"
        return refuse(value, f"{reason} ({conditions})", lower=lower, upper=upper, undecided=more)
    side = f"upper bound {upper:.4g} ms within {limit_ms:.4g} ms" if within else f"lower bound {lower:.4g} ms above {fail_above_ms:.4g} ms"
    return Check(
        name=name,
        outcome=Outcome.PASS if within else Outcome.FAIL,
        value=value,
        limit=limit_ms,
        unit="ms",
        lower=lower,
        upper=upper,
        confidence=CONFIDENCE,
        n=n,
        reason=f"{what} {value:.4g} ms, {side} ({conditions})",
    )
