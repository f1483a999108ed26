"""The one function that decides pass, fail or refuse, for compress, validate and gate alike (the latency's rule is in `latency`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgekd.errors import EXIT_FAIL, EXIT_PASS, EXIT_REFUSE, BudgetError, DataError, InputError
from edgekd.measuring.latency import (
    CONTENT,
    ROUNDING,
    Limit,
    check_latency,
    estimate_latency,
    latencies_ms,
    look_confidence,
    planned_looks,
    require_samples,
    share_of,
)
from edgekd.records import Budget, Check, Clock, Measurement, MeasurePlan, Outcome, Verdict
from edgekd.stats import (
    CONFIDENCE,
    Interval,
    finite_vector,
    graded_bounds,
    normal_quantile,
    paired_binary_interval,
    paired_counts,
    proportion_interval,
)

__all__ = [
    "CONTENT",
    "EXIT_OF",
    "Limit",
    "check_accuracy",
    "check_ceiling",
    "check_floor",
    "check_latency",
    "check_plausible",
    "check_scores",
    "combine",
    "estimate_latency",
    "is_undecided",
    "judge",
    "latencies_ms",
    "look_confidence",
    "planned_looks",
    "outcome_of",
    "require_samples",
    "resolve_limit",
    "same_outputs",
    "worst",
]

EXIT_OF: Mapping[Outcome, int] = {Outcome.PASS: EXIT_PASS, Outcome.FAIL: EXIT_FAIL, Outcome.REFUSE: EXIT_REFUSE}
"""The exit code of a command that ends in a verdict."""

_POWER = 0.95


def _items_needed(spread: float, distance: float, reach: float | None) -> str:
    """How many items would separate a difference from the limit with 95 % power, given the variance of one paired difference.

    `reach` is that of `graded_bounds`; `None` for binary scores.
    """
    if distance <= 0.0:
        return "no number of items decides a difference that lies at the limit"
    z = normal_quantile(CONFIDENCE)
    seen = (z + normal_quantile(_POWER)) ** 2 * spread / distance**2
    n = seen + z * z * reach / distance if reach is not None else max(seen, z * z * (1.0 - min(distance, 1.0)) / distance)
    return f"about {math.ceil(n)} items would decide it if the difference stays as seen"


def same_outputs(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two sets of named outputs hold the same values, to the last bit."""
    return first.keys() == second.keys() and all(np.array_equal(value, second[name]) for name, value in first.items())


def _no_spread(values: NDArray[np.float64], magnitude: float) -> bool:
    """Whether all values are equal but for rounding."""
    return float(np.ptp(values)) <= 1e-12 * max(1.0, magnitude)


_ROUNDED = 1e-6
"""How far a score in [0, 1] may lie outside by rounding: a mean in float32 may come out as 1.0000001."""


def _within_bounds(name: str, values: NDArray[np.float64]) -> NDArray[np.float64]:
    if values.min() < -_ROUNDED or values.max() > 1.0 + _ROUNDED:
        raise DataError(
            f"{name} leave the range that the task states (bounded = True)", found=f"{values.min():.9g} to {values.max():.9g}", allowed="0 to 1, within 1e-6"
        )
    return np.clip(values, 0.0, 1.0)


def check_scores(scores: ArrayLike, binary: bool, *, bounded: bool, items: int) -> NDArray[np.float64]:
    """The scores of one model as `check_accuracy` and `check_floor` take them, `(items,)`, before anything rests on them.

    Raises:
        DataError: not one finite score per item, binary scores that are not 0 or 1, or bounded ones not in [0, 1] within 1e-6.
    """
    values = finite_vector("the task's scores", scores)
    if values.size != items:
        raise DataError("the task does not give one score per item", found=f"{values.size} scores", allowed=f"{items} items")
    if binary:
        other = values[(values != 0.0) & (values != 1.0)]
        if other.size:
            raise DataError(
                "the task says that its scores are 0 or 1 (binary = True), and they are not",
                found=float(other[0]),
                hint="set binary = False at the end of the task's check, and bounded = True on its class if they lie in [0, 1]",
            )
        return values
    return _within_bounds("the task's scores", values) if bounded else values


def check_accuracy(
    student_scores: ArrayLike, teacher_scores: ArrayLike, max_drop: float, binary: bool, *, bounded: bool = False, identical: bool = False
) -> Check:
    """The paired difference of the scores, student minus teacher, against `-max_drop`.

    Passes iff its lower bound is above -max_drop, fails iff its upper bound is below, else refuses: 99 % at each end. Binary scores
    take Tango's interval. Its lower bound lets a true drop of exactly max_drop pass in at most 1.05 % of the cases; its plain upper
    bound would fail such a student in up to 2 % where few items decide, so the upper bound is taken with one loss fewer: at most
    1.2 % (exact sizes by enumeration over 40 to 719 items, drops of 0 to 0.1; see the tests).
    Graded scores take `graded_bounds`: `bounded` says that they lie in [0, 1], so that one unseen item may lose 1; otherwise the
    largest deviation seen stands for it, and differences that are all equal refuse, because they show no spread to judge by.
    `identical` (the outputs themselves are the same values, see `same_outputs`) lets them pass: the student then is the teacher on
    every item. Values are differences of the task's metric.

    Raises:
        DataError: lengths differ, values are not finite, binary scores are not 0 or 1, or bounded ones not in [0, 1] within 1e-6.
        InputError: `max_drop` is negative or not finite.
    """
    if not (math.isfinite(max_drop) and max_drop >= 0.0):
        raise BudgetError("max_drop must be a number of at least 0", found=max_drop)
    student, teacher = finite_vector("the student's scores", student_scores), finite_vector("the teacher's scores", teacher_scores)
    if student.shape != teacher.shape:
        raise DataError("student and teacher are scored on the same items", found=f"{student.size} and {teacher.size} scores")
    n = student.size
    unknown = ""
    reach = None
    if binary:
        n11, n10, n01, n00 = paired_counts(student, teacher)
        bounds = paired_binary_interval(n11, n10, n01, n00, CONFIDENCE)
        upper = paired_binary_interval(n11, n10, n01 - 1, n00 + 1, CONFIDENCE).upper if n01 else bounds.upper
        bounds = Interval(bounds.value, bounds.lower, max(upper, bounds.upper))
        spread = (n10 + n01) / n - bounds.value**2
        counts = f"{n} items, {n10} only the student has right, {n01} only the teacher"
    else:
        if bounded:
            student, teacher = _within_bounds("the student's scores", student), _within_bounds("the teacher's scores", teacher)
        diff = student - teacher
        bounds = graded_bounds(diff, CONFIDENCE, reach=1.0 if bounded else None)
        bounds = Interval(bounds.value, max(-1.0, bounds.lower), min(1.0, bounds.upper)) if bounded else bounds
        spread = float(diff.var(ddof=1))
        reach = 1.0 if bounded else float(np.abs(diff - bounds.value).max())
        if not bounded and not identical and _no_spread(diff, float(np.abs(student).max())):
            unknown = f"all {n} differences are equal and the metric's range is not known, so nothing shows how far another item may lie"
        counts = f"{n} items, {int(np.count_nonzero(diff > 0))} better, {int(np.count_nonzero(diff < 0))} worse"
    if identical:
        counts = f"{counts}; the outputs are the same values"
    numbers = f"difference {bounds.value:+.4f} in [{bounds.lower:+.4f}, {bounds.upper:+.4f}], limit {-max_drop:+.4f} ({counts})"
    if unknown:
        outcome, reason = Outcome.REFUSE, f"{numbers}; {unknown}"
    elif bounds.lower > -max_drop:
        outcome, reason = Outcome.PASS, numbers
    elif bounds.upper < -max_drop:
        outcome, reason = Outcome.FAIL, numbers
    else:
        outcome, reason = Outcome.REFUSE, f"{numbers}; {_items_needed(spread, abs(bounds.value + max_drop), reach)}"
    return Check(
        name="accuracy drop",
        outcome=outcome,
        value=bounds.value,
        limit=-max_drop,
        unit="",
        lower=bounds.lower,
        upper=bounds.upper,
        confidence=CONFIDENCE,
        n=n,
        reason=reason,
    )


def check_floor(scores: ArrayLike, floor: float, binary: bool, name: str = "accuracy floor", *, bounded: bool = False) -> Check:
    """The mean score against a floor: passes iff its lower 99 % bound reaches it, fails iff the upper one does not, else refuses.

    Binary scores take Wilson's interval, graded ones `graded_bounds`; equal scores of an unknown range refuse (see `check_accuracy`).
    """
    if not math.isfinite(floor):
        raise BudgetError(f"the {name} must be a finite number", found=floor)
    values = finite_vector("the scores", scores)
    if binary:
        right = paired_counts(values, values)[0]
        bounds = proportion_interval(right, values.size, CONFIDENCE)
    else:
        if bounded:
            values = _within_bounds("the scores", values)
        bounds = graded_bounds(values, CONFIDENCE, reach=1.0 if bounded else None)
        bounds = Interval(bounds.value, max(0.0, bounds.lower), min(1.0, bounds.upper)) if bounded else bounds
    outcome = Outcome.PASS if bounds.lower >= floor else Outcome.FAIL if bounds.upper < floor else Outcome.REFUSE
    numbers = f"{bounds.value:.4f} in [{bounds.lower:.4f}, {bounds.upper:.4f}], floor {floor:.4f} ({values.size} items)"
    if not binary and not bounded and _no_spread(values, float(np.abs(values).max())):
        outcome, numbers = Outcome.REFUSE, f"{numbers}; all scores are equal and the metric's range is not known"
    return Check(
        name=name,
        outcome=outcome,
        value=bounds.value,
        limit=floor,
        unit="",
        lower=bounds.lower,
        upper=bounds.upper,
        confidence=CONFIDENCE,
        n=values.size,
        reason=numbers,
    )


def check_ceiling(name: str, value: float | None, limit: float, unit: str) -> Check:
    """A value that is known exactly (size, peak memory) against its ceiling; `None`, the device does not tell, refuses."""
    if not (math.isfinite(limit) and limit > 0):
        raise BudgetError(f"the limit of {name} must be a positive number", found=limit)
    if value is None:
        return Check(name=name, outcome=Outcome.REFUSE, value=None, limit=limit, unit=unit, reason=f"the device does not report {name}")
    if not math.isfinite(value):
        raise InputError(f"the value of {name} is not a finite number", found=value)
    within = value <= limit
    reason = f"{value:.4g} {unit} {'within' if within else 'above'} {limit:.4g} {unit}"
    return Check(name=name, outcome=Outcome.PASS if within else Outcome.FAIL, value=value, limit=limit, unit=unit, n=1, reason=reason)


def worst(outcomes: Iterable[Outcome]) -> Outcome:
    """What several outcomes come to together: any fail is a fail; else any refuse is a refuse; else pass."""
    found = set(outcomes)
    return next((outcome for outcome in (Outcome.FAIL, Outcome.REFUSE) if outcome in found), Outcome.PASS)


def outcome_of(checks: Sequence[Check]) -> Outcome:
    """What checks come to by themselves, the worst of them."""
    return worst(check.outcome for check in checks)


def combine(checks: Sequence[Check], simulated: str = "", accept_simulated: bool = False) -> Verdict:
    """Any fail is a fail; else any refuse is a refuse; else pass. Simulated numbers neither pass nor fail unless `accept_simulated`.

    The reason is one line with the numbers of the check that decided. Where simulation turns a verdict into a refuse the checks keep
    what they came to, and the reason names it.

    Raises:
        InputError: there are no checks.
    """
    if not checks:
        raise InputError("a verdict needs at least one check")
    outcome = outcome_of(checks)
    reason = "; ".join(f"{check.name}: {check.reason}" for check in checks if check.outcome is outcome)
    if simulated and accept_simulated:
        reason = f"simulated ({simulated}), accepted; {reason}"
    elif simulated:
        would = f"; accepted it would be a {outcome.value}" if outcome is not Outcome.REFUSE else ""
        outcome, reason = Outcome.REFUSE, f"simulated ({simulated}){would}; {reason}"
    return Verdict(outcome=outcome, checks=tuple(checks), reason=reason, simulated=simulated, accepted_simulated=bool(simulated) and accept_simulated)


def is_undecided(verdict: Verdict) -> bool:
    """Whether more launches may change the verdict: nothing failed, and a check waits for launches."""
    return not any(check.outcome is Outcome.FAIL for check in verdict.checks) and any(check.undecided for check in verdict.checks)


def judge(
    *,
    budget: Budget,
    limit_ms: Limit | float,
    measurement: Measurement,
    plan: MeasurePlan,
    student_scores: ArrayLike | None = None,
    teacher_scores: ArrayLike | None = None,
    binary: bool = True,
    bounded: bool = False,
    identical: bool = False,
    size_bytes: int | None = None,
    accept_simulated: bool = False,
    teacher_measurement: Measurement | None = None,
) -> Verdict:
    """Pass, fail or refuse: every line of the budget against its evidence.

    `limit_ms` is the latency limit, from `resolve_limit` or a number. Scores are per item on the test split, in the same order;
    `binary`, `bounded` and `identical` are told by `check_accuracy`. Give `teacher_measurement` where the limit is a share of the teacher's
    latency: if it is invalid the limit is worth nothing and the latency neither passes nor fails.

    Raises:
        InputError: evidence for a line of the budget is missing, not finite, or too small for the percentile.
    """
    latency = check_latency(measurement, limit_ms, budget.percentile, budget.clock, plan)
    if budget.latency_share is not None and teacher_measurement is not None and not teacher_measurement.valid:
        reason = f"the limit is a share of the teacher's latency, and that is an invalid measurement: {teacher_measurement.reason or 'no reason recorded'}"
        latency = msgspec.structs.replace(latency, outcome=Outcome.REFUSE, lower=None, upper=None, reason=reason, undecided=False)
    checks = [latency]
    if budget.first_inference_ms is not None:
        checks.append(check_latency(measurement, budget.first_inference_ms, budget.percentile, Clock.FIRST, plan, "first inference"))
    if budget.init_ms is not None:
        checks.append(check_latency(measurement, budget.init_ms, budget.percentile, Clock.INIT, plan, "initialization"))
    if budget.size_mb is not None:
        if size_bytes is None:
            raise InputError("the budget limits the size, but no size was given", hint="pass size_bytes=artifact.record.size_bytes")
        checks.append(check_ceiling("size", size_bytes / 1e6, budget.size_mb, "MB"))
    if budget.memory_mb is not None:
        peaks = [launch.peak_memory_bytes for launch in measurement.launches if launch.peak_memory_bytes is not None]
        checks.append(check_ceiling("memory", max(peaks) / 1e6 if peaks else None, budget.memory_mb, "MB"))
    if budget.max_drop is not None:
        if student_scores is None or teacher_scores is None:
            raise InputError("the budget limits the drop, but scores are missing", hint="score student and teacher on the same items")
        checks.append(check_accuracy(student_scores, teacher_scores, budget.max_drop, binary, bounded=bounded, identical=identical))
    if budget.accuracy_floor is not None:
        if student_scores is None:
            raise InputError("the budget has an accuracy floor, but the student's scores are missing")
        checks.append(check_floor(student_scores, budget.accuracy_floor, binary, bounded=bounded))
    verdict = combine(checks, measurement.simulated, accept_simulated)
    if budget.max_drop is None and budget.accuracy_floor is None:
        verdict = msgspec.structs.replace(verdict, reason=f"{verdict.reason}; accuracy: not judged, the budget has no max_drop")
    return verdict


def resolve_limit(budget: Budget, plan: MeasurePlan, teacher_measurement: Measurement | None = None, *, allow_extreme: bool = False) -> Limit:
    """The latency limit: the budget's own, or its share of the teacher's geometric mean over valid launches, with the mean's bounds.

    With a teacher's measurement, an absolute limit is checked for its unit. A share is resolved anew at each look, with the teacher's
    launches of that look: its bounds hold at `look_confidence(plan, share=True)`, so all looks together stay within the error of 1 %.

    Raises:
        BudgetError: a share without a teacher; or a limit above the teacher's latency or below a hundredth of it, unless `allow_extreme`.
        MeasurementInvalid: the teacher has fewer than two valid launches.
    """
    if budget.latency_share is not None and teacher_measurement is None:
        raise BudgetError("a budget as a share needs the teacher's latency on this target", found=f"latency_share={budget.latency_share}")
    if teacher_measurement is None:
        assert budget.latency_ms is not None  # Budget holds exactly one of the two
        return Limit(budget.latency_ms)
    if not teacher_measurement.launches and budget.latency_ms is not None:
        return Limit(budget.latency_ms)  # the plausibility of an absolute limit cannot be checked; the verdict refuses on its own
    teacher_ms = estimate_latency(teacher_measurement, budget.percentile, budget.clock).value
    wanted = budget.latency_ms if budget.latency_ms is not None else budget.latency_share * teacher_ms  # type: ignore[operator]
    check_plausible(wanted, teacher_ms, budget.percentile, allow_extreme=allow_extreme)
    if budget.latency_share is None:
        return Limit(wanted)
    return share_of(budget.latency_share, teacher_measurement, budget.percentile, budget.clock, plan)


def check_plausible(limit_ms: float, teacher_ms: float, percentile: float, *, allow_extreme: bool) -> None:
    """Refuse a limit that points to a wrong unit: above the teacher's latency, or below a hundredth of it.

    Raises:
        BudgetError: so it is, and `allow_extreme` is false.
    """
    if not allow_extreme and not teacher_ms / 100.0 <= limit_ms <= teacher_ms * (1.0 + ROUNDING):
        above = limit_ms > teacher_ms
        raise BudgetError(
            "the latency limit is above the teacher's own latency" if above else "the latency limit is below a hundredth of the teacher's latency",
            found=f"limit {limit_ms:.4g} ms, teacher {teacher_ms:.4g} ms at p{percentile:g}",
            allowed=f"{teacher_ms / 100.0:.4g} to {teacher_ms:.4g} ms",
            hint="latencies are in milliseconds (0.3 ms, not 300 us or 0.0003 s); allow_extreme=True accepts it as it is "
            "(options.allow_extreme = true in a job, --allow-extreme on the command line)",
            subject="latency_ms",
        )
