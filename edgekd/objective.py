"""The one order in which artifacts are preferred; every step that is kept and every choice that is made goes through it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekd.errors import DataError, InputError
from edgekd.records import Precision
from edgekd.stats import Interval, finite_vector, graded_bounds, paired_binary_interval, paired_counts

TWO_SIDED = 0.95
_EACH_END = 0.5 + TWO_SIDED / 2.0


@dataclass(frozen=True)
class Standing:
    """Where one artifact stands. `scores` are per item on the validation split, `(items,)`, or `None` before any training.

    Latencies are in milliseconds with their confidence bounds. `student` names the network: the same name in two standings
    says that they are one student at two precisions, different names that they are not; empty says nothing.
    """

    label: str
    scores: NDArray[np.float64] | None
    latency_ms: float
    latency_lower_ms: float
    latency_upper_ms: float
    size_bytes: int
    precision: Precision
    meets_budget: bool
    within_floor: bool = True
    student: str = ""

    def __post_init__(self) -> None:
        bounds = (self.latency_lower_ms, self.latency_ms, self.latency_upper_ms)
        if not all(math.isfinite(value) and value > 0 for value in bounds) or not bounds[0] <= bounds[1] <= bounds[2]:
            raise InputError("a standing needs a latency inside its bounds, in milliseconds", found=f"{self.label}: {bounds}", subject=self.label)
        if self.scores is not None:
            finite_vector(f"the scores of {self.label!r}", self.scores)


@dataclass(frozen=True)
class Preference:
    """Whether `after` is preferred to `before`, and why, with numbers."""

    after_preferred: bool
    reason: str


def accuracy_gain(first: Standing, second: Standing, *, binary: bool) -> Interval | None:
    """The mean score of `second` minus that of `first` with its 95 % two-sided paired interval; `None` if neither was scored.

    Raises:
        DataError: only one of the two was scored, or on another number of items.
    """
    if first.scores is None and second.scores is None:
        return None
    if first.scores is None or second.scores is None:
        missing = first if first.scores is None else second
        raise DataError("two artifacts cannot be compared when only one was scored", found=f"{missing.label!r} has no scores", subject=missing.label)
    if first.scores.shape != second.scores.shape:
        raise DataError("two artifacts are scored on the same items", found=f"{first.scores.size} and {second.scores.size} items", subject=second.label)
    if binary:
        return paired_binary_interval(*paired_counts(second.scores, first.scores), _EACH_END)
    diff = np.asarray(second.scores, dtype=np.float64) - np.asarray(first.scores, dtype=np.float64)
    if diff.size == 1:
        raise DataError("graded scores of a single item cannot be compared", found=1, allowed="at least 2 items")
    return graded_bounds(diff, _EACH_END)


def is_faster(first: Standing, second: Standing) -> bool:
    """Whether `first` is faster than `second` beyond the noise: its upper bound lies below the other's lower bound."""
    return first.latency_upper_ms < second.latency_lower_ms


def _span(standing: Standing) -> str:
    return f"{standing.latency_ms:.4g} ms [{standing.latency_lower_ms:.4g}, {standing.latency_upper_ms:.4g}]"


def _slow_int8(first: Standing, second: Standing) -> bool:
    """Whether `first` is an int8 of the float `second` that is not faster than it."""
    if first.precision is not Precision.INT8 or second.precision is Precision.INT8:
        return False
    other_student = bool(first.student and second.student and first.student != second.student)
    return not other_student and not is_faster(first, second)


def _compare(before: Standing, after: Standing, binary: bool) -> tuple[int, str]:
    """1 if `after` is better, -1 if `before` is, 0 if neither; swapping the two swaps the sign."""
    for standing, other, sign in ((after, before, -1), (before, after, 1)):
        if _slow_int8(standing, other):
            return sign, f"int8 {standing.label} {_span(standing)} is not faster than {other.precision.value} {other.label} {_span(other)}"
    if before.meets_budget != after.meets_budget:
        return (1 if after.meets_budget else -1), f"only {(after if after.meets_budget else before).label} meets the budget"
    faster = 1 if is_faster(after, before) else -1 if is_faster(before, after) else 0
    times = f"latency {_span(before)} -> {_span(after)}"
    if not after.meets_budget and before.within_floor != after.within_floor:
        return (1 if after.within_floor else -1), f"only {(after if after.within_floor else before).label} is within the accuracy floor"
    if not after.meets_budget and after.within_floor and faster:
        return faster, f"none meets the budget yet; {times}"
    gain = accuracy_gain(before, after, binary=binary)
    if gain is not None and (gain.lower > 0.0 or gain.upper < 0.0):
        return (1 if gain.lower > 0.0 else -1), f"accuracy {gain.value:+.4f} [{gain.lower:+.4f}, {gain.upper:+.4f}]"
    equal = "accuracy not scored" if gain is None else f"accuracy equal within noise ({gain.value:+.4f} [{gain.lower:+.4f}, {gain.upper:+.4f}])"
    if faster:
        return faster, f"{equal}; {times}"
    if before.size_bytes != after.size_bytes:
        return (1 if after.size_bytes < before.size_bytes else -1), f"{equal}; {times} overlap; size {before.size_bytes} -> {after.size_bytes} bytes"
    return 0, f"{equal}; {times} overlap; same size"


def prefer(before: Standing, after: Standing, *, binary: bool) -> Preference:
    """Whether a step's output is preferred to its input.

    An int8 that is not faster than its float is never preferred. An artifact that meets every budget is preferred to one that does not.
    Where both meet it: the more accurate by the 95 % paired interval; if that includes 0 the faster, where the latency intervals separate;
    then the smaller. Where neither does: the one within the accuracy floor, then the faster, then as above. A tie keeps `before`.

    Raises:
        DataError: only one of the two was scored, or on another number of items, where accuracy decides.
    """
    sign, reason = _compare(before, after, binary)
    return Preference(sign > 0, reason)


def _mean(standing: Standing) -> float:
    return -math.inf if standing.scores is None else float(np.mean(standing.scores))


def _rank(standing: Standing) -> tuple[float, float, int, str]:
    return (-_mean(standing), standing.latency_ms, standing.size_bytes, standing.label)


def best(standings: Sequence[Standing], binary: bool) -> Standing:
    """The one to ship: the same whatever the order of `standings`, as long as labels differ.

    Preferences between pairs rest on intervals and need not be transitive, so the choice goes by steps: an int8 that is not faster
    than its float leaves; then all that do not meet the budget (or, if none does, the floor) leave; then all that are less accurate than
    the highest mean by the paired interval; then all that are slower than the fastest by separate intervals; the smallest of the rest
    is chosen, then the higher mean, the lower latency and the label. While none meets the budget speed comes before accuracy.

    Raises:
        InputError: there is nothing to choose from.
        DataError: some were scored and some were not.
    """
    if not standings:
        raise InputError("there is nothing to choose from")
    pool = [one for one in standings if not any(_slow_int8(one, other) for other in standings)]
    pool = [one for one in pool if one.meets_budget] or [one for one in pool if one.within_floor] or pool
    if len({one.scores is None for one in pool}) > 1:
        raise DataError("scored and unscored artifacts cannot be compared", found=[one.label for one in pool if one.scores is None])

    def most_accurate(among: list[Standing]) -> list[Standing]:
        top = min(among, key=_rank)
        kept = []
        for one in among:
            gain = None if one is top else accuracy_gain(one, top, binary=binary)
            if gain is None or gain.lower <= 0.0:
                kept.append(one)
        return kept

    def fastest(among: list[Standing]) -> list[Standing]:
        top = min(among, key=lambda one: (one.latency_upper_ms, one.latency_ms, one.label))
        return [one for one in among if not is_faster(top, one)]

    speed_first = not pool[0].meets_budget and pool[0].within_floor
    pool = most_accurate(fastest(pool)) if speed_first else fastest(most_accurate(pool))
    return min(pool, key=lambda one: (one.size_bytes, *_rank(one)))
