"""The screen grade: many candidates in few short launches, interleaved, ranked by a quantile that interference hardly moves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from edgekd.contracts import Target
from edgekd.measuring.launching import Bench, Progress, Subject, by_label, cache_path, cached
from edgekd.measuring.validity import causes, validity_reason
from edgekd.records import Grade, Launch, Limits, Measurement, MeasurePlan, Record
from edgekd.stats import CONFIDENCE, percentile_of, student_quantile

LOW = 10.0
"""The percentile of a launch's inferences that candidates are ranked by: interference is one-sided, it only slows inferences down."""

_SD_OF_MINIMUM = (1.0, 0.826, 0.748, 0.701, 0.669, 0.645, 0.626)
"""Standard deviation of the minimum of n = 1 to 7 standard normal values (Harter, Biometrika 48:151, 1961); it falls with n."""

_DEGREES = 8
"""Degrees of freedom that the spread of a screen aims at: Student's t at 99 % is then 2.9, with one subject of three launches 7.0."""


@dataclass(frozen=True)
class Screened:
    """A candidate's screened latency at the asked percentile, in milliseconds, with bounds that are one-sided at 99 % each.

    `measurement.valid` is false when no launch of the candidate was valid, or the device was too busy to rank any; then
    the numbers come from whatever was seen and must not decide anything.
    """

    label: str
    latency_ms: float
    lower_ms: float
    upper_ms: float
    measurement: Measurement


def _low_ms(launch: Launch) -> float:
    value = percentile_of(launch.samples_ns, LOW) if launch.samples_ns else float(launch.summary_ns.get("min", 0))
    return max(value, 1.0) / 1e6


def _at_ms(launch: Launch, percentile: float) -> float:
    if launch.samples_ns:
        return max(percentile_of(launch.samples_ns, percentile), 1.0) / 1e6
    return max(float(launch.summary_ns.get("max" if percentile > 50.0 else "median", 0)), 1.0) / 1e6


def rank(measurements: Mapping[str, Measurement], percentile: float) -> dict[str, Screened]:
    """What the launches of some candidates say about the percentile of each.

    low = the smallest p10 of a candidate's valid launches; latency = low * ratio, where ratio is the median over the valid launches of all
    candidates of (the launch's percentile over its candidate's low). Bounds: the spread between launches is the standard deviation of log p10,
    pooled over the candidates, or the candidate's own where that is larger. It is taken times the standard deviation of a minimum of n and the
    t quantile at 99 %, together with the uncertainty of the ratio. The quantile's degrees of freedom are those of the pooled variance by
    Satterthwaite (Biometrics Bulletin 2:110, 1946): all of them where the candidates spread alike, few where one of them makes up the spread.
    With a single launch per candidate the noise within launches, log(p90/p10), stands in.
    A candidate without a valid launch is described by its rejected ones, from the smallest p10 to the largest percentile.
    """
    valid = {label: one.launches for label, one in measurements.items() if one.launches}
    logs = {label: np.log([_low_ms(launch) for launch in launches]) for label, launches in valid.items()}
    ratios = np.asarray([math.log(_at_ms(launch, percentile)) - float(logs[label].min()) for label, launches in valid.items() for launch in launches])
    ratio = float(np.median(ratios)) if ratios.size else 0.0
    own = {label: float(values.var(ddof=1)) for label, values in logs.items() if values.size > 1}
    if own:
        sums = {label: variance * (logs[label].size - 1) for label, variance in own.items()}
        total, degrees = sum(sums.values()), sum(logs[label].size - 1 for label in own)
        if total > 0.0:
            degrees = math.floor(total**2 / sum(value**2 / (logs[label].size - 1) for label, value in sums.items()) + 1e-9)
        pooled = total / sum(logs[label].size - 1 for label in own)
        quantile = student_quantile(CONFIDENCE, degrees)
        ratio_error = 1.2533 * float(ratios.std(ddof=1)) / math.sqrt(ratios.size)  # sqrt(pi / 2): a median of normal values
    out: dict[str, Screened] = {}
    for label, one in measurements.items():
        if label in valid:
            if own:
                sd = math.sqrt(max(pooled, own.get(label, 0.0)))
                half = quantile * math.hypot(sd * _SD_OF_MINIMUM[min(len(valid[label]), len(_SD_OF_MINIMUM)) - 1], ratio_error)
            else:
                half = max(math.log(_at_ms(launch, 90.0) / _low_ms(launch)) for launch in valid[label])
            centre = float(logs[label].min()) + ratio
            out[label] = Screened(label, math.exp(centre), math.exp(centre - half), math.exp(centre + half), one)
        else:
            lows = [_low_ms(launch) for launch in one.rejected]
            highs = [_at_ms(launch, percentile) for launch in one.rejected]
            out[label] = Screened(label, min(highs), min(lows), max(highs), one)
    return out


def launches_each(plan: MeasurePlan, subjects: int) -> int:
    """How many valid launches each of so many subjects gets in one screen: `plan.launches`, and up to `plan.max_launches` where the subjects are
    so few that their spread would have less than eight degrees of freedom. By default 7 for one, 5 for two, 4 for three, 3 for more."""
    return max(plan.launches, min(plan.max_launches, 1 + math.ceil(_DEGREES / subjects)))


def screen(
    target: Target,
    subjects: Sequence[Subject],
    *,
    percentile: float,
    limits: Limits,
    seed: int,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
    nonce: str = "",
) -> dict[str, Screened]:
    """Screen-grade latencies of all subjects by label, under the profile's `measure.screen` plan. What one call gives was measured side by side.

    Each round runs one launch of every candidate that still lacks valid ones, in a seeded order that rotates from round to round. A candidate
    gets `launches_each` valid launches within at most `plan.max_launches` attempts. It is invalid, with the reason, when none was
    valid; and all are invalid when more than `plan.max_reject_share` of all launches were rejected. None is dropped.

    With `cache_dir`, the measurements of one call are stored in one file, under device fingerprint, governor, power mode, runtime options, protocol
    and the hashes of all artifacts. They are served again to a call with the same subjects if each still has `plan.launches` valid launches
    under `limits`; never a part of them, since two latencies are compared only if they were taken together.
    """
    wanted = by_label(subjects)
    plan = target.profile.measure.screen
    hashes = {label: subject.artifact.record.content_hash() for label, subject in wanted.items()}
    order = sorted(wanted, key=lambda label: hashes[label])
    path = None if cache_dir is None else cache_path(cache_dir, "screen", target, plan.launch.digest(), *(hashes[label] for label in order))
    stored = cached(path, _Together)
    if stored is not None:
        found = {label: _served(one, label, limits) for label, one in zip(order, stored.measurements, strict=True)}
        if all(len(one.launches) >= plan.launches for one in found.values()):
            return rank({label: found[label] for label in wanted}, percentile)
    found = _measure(target, wanted, limits, seed, progress, nonce)
    if path is not None and all(one.valid and len(one.launches) >= plan.launches for one in found.values()):
        _Together(measurements=tuple(found[label] for label in order)).save(path)
    return rank(found, percentile)


class _Together(Record, tag="edgekd.screen_together/2", frozen=True, kw_only=True):
    """Measurements that were taken together, in the order of their artifacts' hashes."""

    measurements: tuple[Measurement, ...]


def _served(stored: Measurement, label: str, limits: Limits) -> Measurement:
    launches = tuple(msgspec.structs.replace(one, label=label) for one in stored.launches if not validity_reason(one, limits))
    return msgspec.structs.replace(stored, label=label, launches=launches)


def _measure(target: Target, wanted: Mapping[str, Subject], limits: Limits, seed: int, progress: Progress | None, nonce: str) -> dict[str, Measurement]:
    plan = target.profile.measure.screen
    each = launches_each(plan, len(wanted))
    bench = Bench(target, wanted, plan.launch, limits, seed, nonce)
    order = [list(wanted)[index] for index in np.random.default_rng([seed, 0x5C]).permutation(len(wanted))]
    shift = max(1, len(order) // each)
    for turn in range(plan.max_launches):
        start = turn * shift % len(order)
        schedule = [label for label in order[start:] + order[:start] if len(bench.valid[label]) < each]
        if not schedule:
            break
        bench.run(schedule)
        if progress is not None:
            progress("screen", sum(min(each, len(one)) for one in bench.valid.values()), each * len(order))
    rejected = [launch for launches in bench.rejected.values() for launch in launches]
    taken = sum(bench.taken(label) for label in order)
    busy = len(rejected) > plan.max_reject_share * taken
    out: dict[str, Measurement] = {}
    for label in wanted:
        own = bench.rejected[label]
        reason = ""
        if not bench.valid[label]:
            reason = f"all {len(own)} launches rejected: {causes(own)}"
        elif busy:
            reason = f"{len(rejected)} of {taken} launches of this screen rejected, more than {plan.max_reject_share:.0%}: {causes(rejected)}"
        out[label] = bench.measurement(label, Grade.SCREEN, reason)
    return out
