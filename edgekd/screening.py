"""The screen grade: many candidates in few short launches, interleaved, ranked by a quantile that interference hardly moves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from edgekd.contracts import Target
from edgekd.launching import Bench, Progress, Subject, by_label, cache_path, cached, structure_hash
from edgekd.records import Grade, Launch, Limits, Measurement, Record
from edgekd.stats import CONFIDENCE, percentile_of, student_quantile
from edgekd.validity import causes, validity_reason

_PENDING = ".pending"

LOW = 10.0
"""The percentile of a launch's inferences that candidates are ranked by: interference is one-sided, it only slows inferences down."""

_SD_OF_MINIMUM = (1.0, 0.826, 0.748, 0.701, 0.669, 0.645, 0.626)
"""Standard deviation of the minimum of n = 1 to 7 standard normal values (Harter, Biometrika 48:151, 1961); it falls with n."""


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
    candidates of (the launch's percentile over its candidate's low). Bounds: the noise between launches is pooled over the candidates as
    a standard deviation of log p10, times the standard deviation of a minimum of n and the t quantile at 99 %, together with the
    uncertainty of the ratio. With a single launch per candidate the noise within launches, log(p90/p10), stands in.
    A candidate without a valid launch is described by its rejected ones, from the smallest p10 to the largest percentile.
    """
    valid = {label: one.launches for label, one in measurements.items() if one.launches}
    logs = {label: np.log([_low_ms(launch) for launch in launches]) for label, launches in valid.items()}
    ratios = np.asarray([math.log(_at_ms(launch, percentile)) - float(logs[label].min()) for label, launches in valid.items() for launch in launches])
    degrees = sum(values.size - 1 for values in logs.values())
    ratio = float(np.median(ratios)) if ratios.size else 0.0
    quantile = student_quantile(CONFIDENCE, max(1, degrees))
    if degrees:
        sd = math.sqrt(sum(float(((values - values.mean()) ** 2).sum()) for values in logs.values()) / degrees)
        ratio_error = 1.2533 * float(ratios.std(ddof=1)) / math.sqrt(ratios.size)  # sqrt(pi / 2): a median of normal values
    out: dict[str, Screened] = {}
    for label, one in measurements.items():
        if label in valid:
            n = len(valid[label])
            if degrees:
                half = quantile * math.hypot(sd * _SD_OF_MINIMUM[min(n, len(_SD_OF_MINIMUM)) - 1], ratio_error)
            else:
                half = max(math.log(_at_ms(launch, 90.0) / _low_ms(launch)) for launch in valid[label])
            centre = float(logs[label].min()) + ratio
            out[label] = Screened(label, math.exp(centre), math.exp(centre - half), math.exp(centre + half), one)
        else:
            lows = [_low_ms(launch) for launch in one.rejected]
            highs = [_at_ms(launch, percentile) for launch in one.rejected]
            out[label] = Screened(label, min(highs), min(lows), max(highs), one)
    return out


def screen(
    target: Target,
    subjects: Sequence[Subject],
    *,
    percentile: float,
    limits: Limits,
    seed: int,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Screened]:
    """Screen-grade latencies of all subjects by label, under the profile's `measure.screen` plan.

    Each round runs one launch of every candidate that still lacks valid ones, in a seeded order that rotates from round to round. A candidate
    gets `plan.launches` valid launches within at most `plan.max_launches` attempts. It is invalid, with the reason, when none was
    valid; and all that were measured now are invalid when more than `plan.max_reject_share` of all launches were rejected. None is dropped.

    With `cache_dir`, a valid measurement is stored under device fingerprint, runtime options, protocol and structure (`structure_hash`),
    and served again if enough of its launches are valid under `limits`.
    """
    plan = target.profile.measure.screen
    wanted = by_label(subjects)
    if cache_dir is not None:
        _settle(cache_dir / "screen")
    paths: dict[str, Path] = {}
    found: dict[str, Measurement] = {}
    for label, subject in wanted.items():
        if cache_dir is None:
            continue
        paths[label] = cache_path(cache_dir, "screen", target, plan.launch.digest(), structure_hash(subject.artifact.record))
        stored = cached(paths[label], Measurement)
        if stored is not None:
            launches = tuple(msgspec.structs.replace(one, label=label) for one in stored.launches if not validity_reason(one, limits))
            if len(launches) >= plan.launches:
                found[label] = msgspec.structs.replace(stored, label=label, launches=launches)
    fresh = {label: subject for label, subject in wanted.items() if label not in found}
    if fresh:
        found |= _measure(target, fresh, limits, seed, progress)
    if cache_dir is not None:
        good = {paths[label].name: found[label] for label in fresh if found[label].valid and len(found[label].launches) >= plan.launches}
        _store(cache_dir / "screen", good)
    return rank({label: found[label] for label in wanted}, percentile)


class _Together(Record, tag="edgekd.screen_together/1", frozen=True, kw_only=True):
    """Measurements that were taken together, by the names of their files in the cache."""

    files: dict[str, Measurement]


def _store(folder: Path, files: Mapping[str, Measurement]) -> None:
    """Cache what was measured together, all or nothing: a process killed here neither measures a part again nor ranks a part alone."""
    if files:
        together = _Together(files=dict(files))
        together.save(folder / f"{together.digest()[:40]}{_PENDING}")
        _settle(folder)


def _settle(folder: Path) -> None:
    """File away what a process, this one or one that was killed, has measured."""
    for pending in sorted(folder.glob(f"*{_PENDING}")):
        together = cached(pending, _Together)
        for name, measurement in together.files.items() if together is not None else ():
            measurement.save(folder / name)
        pending.unlink(missing_ok=True)


def _measure(target: Target, fresh: Mapping[str, Subject], limits: Limits, seed: int, progress: Progress | None) -> dict[str, Measurement]:
    plan = target.profile.measure.screen
    bench = Bench(target, fresh, plan.launch, limits, seed)
    order = [list(fresh)[index] for index in np.random.default_rng([seed, 0x5C]).permutation(len(fresh))]
    shift = max(1, len(order) // plan.launches)
    for turn in range(plan.max_launches):
        start = turn * shift % len(order)
        schedule = [label for label in order[start:] + order[:start] if len(bench.valid[label]) < plan.launches]
        if not schedule:
            break
        bench.run(schedule)
        if progress is not None:
            progress("screen", sum(min(plan.launches, len(one)) for one in bench.valid.values()), plan.launches * len(order))
    rejected = [launch for launches in bench.rejected.values() for launch in launches]
    taken = sum(bench.taken(label) for label in order)
    busy = len(rejected) > plan.max_reject_share * taken
    out: dict[str, Measurement] = {}
    for label in fresh:
        own = bench.rejected[label]
        reason = ""
        if not bench.valid[label]:
            reason = f"all {len(own)} launches rejected: {causes(own)}"
        elif busy:
            reason = f"{len(rejected)} of {taken} launches of this screen rejected, more than {plan.max_reject_share:.0%}: {causes(rejected)}"
        out[label] = bench.measurement(label, Grade.SCREEN, reason)
    return out
