"""The few statistical procedures that every verdict and every preference rest on, each with its source."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgekd.errors import DataError, InputError

CONFIDENCE = 0.99
"""One-sided confidence of every verdict, at each end of an interval."""


class Interval(NamedTuple):
    """An estimate with its lower and upper confidence bound, in the unit of the data."""

    value: float
    lower: float
    upper: float


def _check_probability(name: str, value: float) -> None:
    if not 0.0 < value < 1.0:
        raise InputError(f"{name} is a probability strictly between 0 and 1", found=value, hint="write 0.99 for 99 percent")


def finite_vector(name: str, values: ArrayLike, *, at_least: int = 1) -> NDArray[np.float64]:
    """`values` as a float64 vector `(n,)`.

    Raises:
        DataError: not one-dimensional, fewer than `at_least` values, or a value is NaN or infinite.
    """
    out = np.asarray(values, dtype=np.float64)
    if out.ndim != 1:
        raise DataError(f"{name} must be one-dimensional, one value per item", found=f"shape {out.shape}")
    if out.size < at_least:
        raise DataError(f"{name} has too few values", found=out.size, allowed=f"at least {at_least}")
    bad = int(np.count_nonzero(~np.isfinite(out)))
    if bad:
        raise DataError(f"{name} holds values that are NaN or infinite", found=f"{bad} of {out.size}", hint="look at the items with these values first")
    return out


@lru_cache(maxsize=256)
def normal_quantile(probability: float) -> float:
    """The quantile of the standard normal distribution, for example 2.326 at 0.99."""
    from scipy.special import ndtri

    _check_probability("probability", probability)
    return float(ndtri(probability))


@lru_cache(maxsize=1024)
def student_quantile(probability: float, degrees: int) -> float:
    """The quantile of Student's t distribution with `degrees` degrees of freedom."""
    from scipy.special import stdtrit

    _check_probability("probability", probability)
    return float(stdtrit(degrees, probability))


@lru_cache(maxsize=256)
def tolerance_factor(n: int, content: float = 0.90, confidence: float = CONFIDENCE) -> float:
    """The factor k of the one-sided normal tolerance bound `mean + k * s` over `n` values, for example 2.28 at n = 20.

    With probability `confidence`, at least the share `content` of the population lies below the bound. k is the quantile
    of the noncentral t distribution with n - 1 degrees of freedom and noncentrality z_content * sqrt(n), over sqrt(n)
    (Hahn and Meeker, Statistical Intervals, 1991, section 4.6).

    Raises:
        InputError: n is below 2, or a probability is not inside (0, 1).
    """
    from scipy.special import nctdtrit

    if n < 2:
        raise InputError("a tolerance bound needs at least two values", found=n)
    _check_probability("content", content)
    _check_probability("confidence", confidence)
    factor = float(nctdtrit(n - 1, normal_quantile(content) * math.sqrt(n), confidence)) / math.sqrt(n)
    if not math.isfinite(factor):
        raise ArithmeticError(f"no tolerance factor for n={n}, content={content}, confidence={confidence}")
    return factor


@lru_cache(maxsize=64)
def min_samples(percentile: float) -> int:
    """The smallest count of inferences in a launch that supports `percentile`: 11 for 50, 64 for 90, 662 for 99.

    It is the smallest n with P(Binomial(n, tail) <= 1) <= 0.01, where tail is the share beyond the percentile: MLPerf
    Inference's early-stopping rule with one allowed overrun at 99 % confidence (mlcommons/inference_policies, "Early
    Stopping Criterion"). Below the median the tail is the lower one.

    Raises:
        InputError: the percentile is not inside (0, 100).
    """
    if not 0.0 < percentile < 100.0:
        raise InputError("a percentile is strictly between 0 and 100", found=percentile)
    tail = min(percentile, 100.0 - percentile) / 100.0

    def enough(n: int) -> bool:
        return (1.0 - tail) ** n + n * tail * (1.0 - tail) ** (n - 1) <= 0.01

    high = 2
    while not enough(high):
        high *= 2
    low = high // 2
    while low < high:  # the probability falls with n, so the first n that is enough is found by halving
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low


def percentile_of(samples: ArrayLike, q: float) -> float:
    """The `q`-th percentile of `samples`, in their unit: always one of the samples, never a mixture of two.

    It is the smallest sample that at least q percent of the samples do not exceed (the inverse of the empirical
    distribution function; type 1 of Hyndman and Fan, The American Statistician 50:361, 1996).

    Raises:
        InputError: no samples, or q is not inside (0, 100].
    """
    values: NDArray[Any] = np.asarray(samples)
    if values.size == 0:
        raise InputError("there is no percentile of nothing", found="0 samples")
    if not 0.0 < q <= 100.0:
        raise InputError("a percentile is above 0 and at most 100", found=q)
    rank = max(1, math.ceil(q * values.size / 100.0 - 1e-9))
    return float(np.partition(values.ravel(), rank - 1)[rank - 1])


def mean_bounds(x: ArrayLike, confidence: float = CONFIDENCE) -> Interval:
    """The mean of `x` with Student's t bounds, each one-sided at `confidence`.

    Assumes independent values and a mean that is close to normal. All values equal gives an interval of width zero.

    Raises:
        DataError: fewer than two values, or a value that is not finite.
    """
    values = finite_vector("the sample", x, at_least=2)
    _check_probability("confidence", confidence)
    mean = float(values.mean())
    half = student_quantile(confidence, values.size - 1) * float(values.std(ddof=1)) / math.sqrt(values.size)
    return Interval(mean, mean - half, mean + half)


def lag_one(x: ArrayLike) -> float:
    """The correlation of each value with the next, corrected for its downward bias of (1 + 4 r) / n (Kendall, Biometrika 41:403,
    1954), in [0, 0.95]: negative estimates count as none. 0 for fewer than 10 values or no variance."""
    values = finite_vector("the series", x)
    centred = values - values.mean()
    total = float(centred @ centred)
    if values.size < 10 or total <= 0.0:
        return 0.0
    r = float(centred[:-1] @ centred[1:]) / total
    return min(0.95, max(0.0, r + (1.0 + 4.0 * r) / values.size))


def serial_mean_bounds(x: ArrayLike, confidence: float = CONFIDENCE) -> Interval:
    """Like `mean_bounds` for values in the order they were taken: the half width grows by sqrt((1 + r) / (1 - r)), r = `lag_one(x)`.

    That is the standard error of the mean of a first-order autoregressive series (Box and Jenkins, Time Series Analysis, section 2.1).
    """
    plain = mean_bounds(x, confidence)
    r = lag_one(x)
    half = (plain.upper - plain.value) * math.sqrt((1.0 + r) / (1.0 - r))
    return Interval(plain.value, plain.value - half, plain.value + half)


def graded_bounds(x: ArrayLike, confidence: float = CONFIDENCE, *, reach: float | None = None) -> Interval:
    """The mean of real-valued scores or of their paired differences, `(items,)`, with score-type bounds, each one-sided at `confidence`.

    The half width is (r q^2 / 2 + q sqrt(n s^2 + r^2 q^2 / 4)) / n, with q Student's quantile, s the standard deviation seen and `reach` = r
    how far one item not seen yet may lie from the mean: 1 for scores in [0, 1] and their differences. It is the far end of Wilson's
    interval (JASA 22:209, 1927) for a rare event of size r, with n s^2 in place of the event's variance, taken at both ends. So it is
    wider than t, and with s = 0 it is r q^2 / n, more than Tango's z^2 / (n + z^2) with no discordant pair. `reach=None` takes the largest
    distance from the mean that was seen, which says nothing where all values are equal: then the width is zero.

    For scores that are 0 or 1 use `paired_binary_interval`. Assumes independent items.

    Raises:
        DataError: fewer than two values, or a value that is not finite.
    """
    values = finite_vector("the sample", x, at_least=2)
    _check_probability("confidence", confidence)
    n, mean = values.size, float(values.mean())
    far = float(np.abs(values - mean).max()) if reach is None else reach
    q = student_quantile(confidence, n - 1)
    half = (far * q * q / 2.0 + q * math.sqrt(n * float(values.var(ddof=1)) + (far * q / 2.0) ** 2)) / n
    return Interval(mean, mean - half, mean + half)


def proportion_interval(successes: int, n: int, confidence: float = CONFIDENCE) -> Interval:
    """A proportion with its score bounds (Wilson, JASA 22:209, 1927), each one-sided at `confidence`."""
    if not 0 <= successes <= n or n < 1:
        raise InputError("a proportion is of some items", found=f"{successes} of {n}")
    z = normal_quantile(confidence)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Interval(p, max(0.0, centre - half), min(1.0, centre + half))


def paired_counts(first: ArrayLike, second: ArrayLike) -> tuple[int, int, int, int]:
    """How often both are 1, only the first, only the second, none: `(n11, n10, n01, n00)` of two vectors of 0 and 1.

    Raises:
        DataError: the lengths differ, or a value is neither 0 nor 1.
    """
    a, b = finite_vector("the first scores", first), finite_vector("the second scores", second)
    if a.shape != b.shape:
        raise DataError("paired scores have one value per item each", found=f"{a.size} and {b.size} values")
    for values in (a, b):
        if not np.all((values == 0.0) | (values == 1.0)):
            raise DataError("binary scores are 0 or 1", found=float(values[(values != 0.0) & (values != 1.0)][0]), hint="use binary=False for graded scores")
    n11, n10, n01 = int(np.sum(a * b)), int(np.sum(a * (1 - b))), int(np.sum((1 - a) * b))
    return n11, n10, n01, a.size - n11 - n10 - n01


def paired_score(n10: int, n01: int, n: int, delta: float) -> float:
    """Tango's score statistic of the hypothesis that the paired difference p10 - p01 equals `delta`; about normal under it.

    The statistic is (n10 - n01 - n delta) / sqrt(n (2 q + delta (1 - delta))), where q is the most likely p01 under the
    hypothesis: the larger root of 2n q^2 + B q + C with B = (2n - n10 + n01) delta - n10 - n01, C = -n01 delta (1 - delta)
    (Tango, Statistics in Medicine 17:891, 1998).
    """
    b = (2 * n - n10 + n01) * delta - n10 - n01
    c = -n01 * delta * (1.0 - delta)
    q = (math.sqrt(max(0.0, b * b - 8.0 * n * c)) - b) / (4.0 * n)
    gap = n10 - n01 - n * delta
    variance = n * (2.0 * q + delta * (1.0 - delta))
    if variance <= 0.0:
        return 0.0 if gap == 0.0 else math.copysign(math.inf, gap)
    return gap / math.sqrt(variance)


@lru_cache(maxsize=4096)
def _score_bounds(n10: int, n01: int, n: int, confidence: float) -> Interval:
    z = normal_quantile(confidence)
    estimate = (n10 - n01) / n

    def bound(far: float, target: float) -> float:
        near = estimate
        for _ in range(60):  # the statistic falls with delta; halving keeps the crossing between far and near
            middle = 0.5 * (near + far)
            beyond = abs(paired_score(n10, n01, n, middle)) > target
            near, far = (near, middle) if beyond else (middle, far)
        return far

    return Interval(estimate, bound(-1.0, z) if estimate > -1.0 else -1.0, bound(1.0, z) if estimate < 1.0 else 1.0)


def paired_binary_interval(n11: int, n10: int, n01: int, n00: int, confidence: float = CONFIDENCE) -> Interval:
    """The difference p10 - p01 of two paired proportions with Tango's score bounds, each one-sided at `confidence`.

    `n10` counts the items that only the first got right, `n01` those that only the second did. With no discordant item
    among n the bounds are -+ z^2 / (n + z^2), not zero as Wald's would be.

    Raises:
        InputError: a count is negative, all are zero, or the confidence is not inside (0, 1).
    """
    n = n11 + n10 + n01 + n00
    if min(n11, n10, n01, n00) < 0 or n == 0:
        raise InputError("paired counts are not negative and not all zero", found=(n11, n10, n01, n00))
    _check_probability("confidence", confidence)
    return _score_bounds(n10, n01, n, confidence)
