"""Statistical procedures against tables, literature and independent computations."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from edgekd.errors import DataError, InputError
from edgekd.stats import (
    graded_bounds,
    lag_one,
    mean_bounds,
    min_samples,
    normal_quantile,
    paired_binary_interval,
    paired_counts,
    percentile_of,
    proportion_interval,
    serial_mean_bounds,
    tolerance_factor,
)


@pytest.mark.parametrize(("n", "k"), [(10, 3.05), (20, 2.28), (30, 2.03)])
def test_tolerance_factor_equals_published_table(n: int, k: float) -> None:
    assert tolerance_factor(n) == pytest.approx(k, abs=0.005)


@pytest.mark.parametrize("n", [2, 3, 7, 20, 40, 60, 500])
@pytest.mark.parametrize("confidence", [0.95, 0.99, 1 - 0.01 / 3])
def test_tolerance_factor_equals_noncentral_t_of_another_implementation(n: int, confidence: float) -> None:
    expected = stats.nct.ppf(confidence, n - 1, stats.norm.ppf(0.9) * math.sqrt(n)) / math.sqrt(n)
    assert tolerance_factor(n, 0.9, confidence) == pytest.approx(expected, rel=1e-6)


def test_tolerance_bound_covers_content_in_simulation() -> None:
    x = np.random.default_rng(0).normal(size=(20000, 20))
    upper = x.mean(axis=1) + tolerance_factor(20) * x.std(axis=1, ddof=1)
    covered = float(np.mean(stats.norm.cdf(upper) >= 0.90))
    assert abs(covered - 0.99) < 4 * math.sqrt(0.99 * 0.01 / 20000)


def test_tolerance_factor_refuses_a_single_value() -> None:
    with pytest.raises(InputError, match="at least two"):
        tolerance_factor(1)


@pytest.mark.parametrize(("percentile", "n"), [(50, 11), (90, 64), (99, 662), (10, 64)])
def test_min_samples_equals_mlperf_counts(percentile: float, n: int) -> None:
    assert min_samples(percentile) == n
    tail = min(percentile, 100 - percentile) / 100
    assert stats.binom.cdf(1, n, tail) <= 0.01 < stats.binom.cdf(1, n - 1, tail)


@pytest.mark.parametrize("percentile", [0.0, 100.0, -1.0, math.nan])
def test_min_samples_refuses_percentiles_outside(percentile: float) -> None:
    with pytest.raises(InputError):
        min_samples(percentile)


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=200), st.integers(1, 100))
@settings(max_examples=200, deadline=None)
def test_percentile_of_is_the_smallest_sample_with_enough_below(samples: list[int], q: int) -> None:
    value = percentile_of(samples, q)
    assert value in samples
    assert 100 * sum(s <= value for s in samples) >= q * len(samples)
    assert 100 * sum(s < value for s in samples) < q * len(samples)


def test_percentile_of_refuses_nothing() -> None:
    with pytest.raises(InputError):
        percentile_of([], 50)


def test_mean_bounds_equal_scipy_t_interval() -> None:
    x = np.random.default_rng(1).normal(3, 2, size=17)
    got = mean_bounds(x, 0.99)
    expected = stats.t.interval(0.98, 16, loc=x.mean(), scale=stats.sem(x))
    assert (got.lower, got.upper) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("bad", [[1.0], [1.0, math.nan], [1.0, math.inf], [[1.0, 2.0]]])
def test_mean_bounds_refuse_what_has_no_mean(bad: list[float]) -> None:
    with pytest.raises(DataError):
        mean_bounds(bad)


def test_proportion_interval_equals_scipy_wilson() -> None:
    for successes, n in ((0, 10), (3, 17), (950, 1000), (12, 12)):
        got = proportion_interval(successes, n, 0.99)
        expected = stats.binomtest(successes, n).proportion_ci(0.98, method="wilson")
        assert (got.lower, got.upper) == pytest.approx((expected.low, expected.high), abs=1e-10)


def brute_force_bounds(n10: int, n01: int, n: int, confidence: float) -> tuple[float, float]:
    """Tango's interval another way: the restricted likelihood maximised numerically, the statistic inverted by a root finder."""
    z = stats.norm.ppf(confidence)

    def statistic(delta: float) -> float:
        low, high = max(0.0, -delta), (1.0 - delta) / 2.0  # p01 = q, p10 = q + delta, the rest 1 - 2 q - delta

        def minus_loglik(q: float) -> float:
            cells = ((n10, q + delta), (n01, q), (n - n10 - n01, 1 - 2 * q - delta))
            return -sum(count * math.log(max(p, 1e-300)) for count, p in cells if count)

        found = optimize.minimize_scalar(minus_loglik, bounds=(low, high), method="bounded", options={"xatol": 1e-14})
        q = min((low, high, float(found.x)), key=minus_loglik)
        variance = (2 * q + delta - delta**2) / n
        return ((n10 - n01) / n - delta) / math.sqrt(max(variance, 1e-300))

    estimate = (n10 - n01) / n
    lower = optimize.brentq(lambda d: statistic(d) - z, -1 + 1e-9, estimate - 1e-9) if estimate > -1 else -1.0
    upper = optimize.brentq(lambda d: statistic(d) + z, estimate + 1e-9, 1 - 1e-9) if estimate < 1 else 1.0
    return lower, upper


@pytest.mark.parametrize(
    ("n11", "n10", "n01", "n00"), [(1, 1, 7, 12), (700, 5, 12, 2), (50, 0, 3, 7), (90, 4, 0, 6), (10, 9, 9, 2), (300, 0, 0, 20), (0, 0, 5, 0), (0, 6, 0, 1)]
)
@pytest.mark.parametrize("confidence", [0.975, 0.99])
def test_paired_binary_interval_equals_brute_force_inversion(n11: int, n10: int, n01: int, n00: int, confidence: float) -> None:
    got = paired_binary_interval(n11, n10, n01, n00, confidence)
    assert (got.lower, got.upper) == pytest.approx(brute_force_bounds(n10, n01, n11 + n10 + n01 + n00, confidence), abs=2e-6)


def test_paired_binary_interval_equals_published_example() -> None:
    """Airway hyper-responsiveness before and after transplantation (Bentur et al.), as evaluated by Fagerland, Lydersen and Laake,
    Statistics in Medicine 33:2850, 2014: Tango's 95 % interval is -0.517 to -0.026."""
    got = paired_binary_interval(1, 1, 7, 12, 0.975)
    assert (round(got.lower, 3), round(got.upper, 3)) == (-0.517, -0.026)


@pytest.mark.parametrize("n", [1, 10, 719, 100_000])
def test_paired_binary_interval_has_width_without_discordant_pairs(n: int) -> None:
    z = normal_quantile(0.99)
    got = paired_binary_interval(n, 0, 0, 0, 0.99)
    assert got.value == 0.0
    assert (got.lower, got.upper) == pytest.approx((-z * z / (n + z * z), z * z / (n + z * z)), rel=1e-9)


@given(st.tuples(*[st.integers(0, 60)] * 4).filter(lambda c: sum(c) > 0))
@settings(max_examples=200, deadline=None)
def test_paired_binary_interval_mirrors_when_the_two_swap(counts: tuple[int, int, int, int]) -> None:
    n11, n10, n01, n00 = counts
    one, two = paired_binary_interval(n11, n10, n01, n00), paired_binary_interval(n11, n01, n10, n00)
    assert (one.lower, one.upper) == pytest.approx((-two.upper, -two.lower), abs=1e-9)
    assert -1.0 <= one.lower <= one.value <= one.upper <= 1.0


def test_paired_counts_counts_and_refuses_other_values() -> None:
    assert paired_counts([1, 1, 0, 0, 1], [1, 0, 1, 0, 1]) == (2, 1, 1, 1)
    with pytest.raises(DataError, match="0 or 1"):
        paired_counts([0.5, 1], [1, 1])
    with pytest.raises(DataError, match="one value per item"):
        paired_counts([1], [1, 1])


def test_lag_one_estimates_the_correlation_of_neighbours() -> None:
    rng = np.random.default_rng(0)
    for r in (0.0, 0.4, 0.8):
        x = rng.normal(size=5000)
        for i in range(1, x.size):
            x[i] += r * x[i - 1]
        assert lag_one(x) == pytest.approx(r, abs=0.04)
    assert lag_one([1.0, -1.0] * 20) == 0.0
    assert lag_one([3.0] * 20) == 0.0
    assert lag_one([1.0, 2.0, 3.0]) == 0.0


def test_serial_mean_bounds_cover_the_mean_of_a_correlated_series_where_plain_ones_do_not() -> None:
    rng, r, n, replicates = np.random.default_rng(1), 0.5, 60, 1500
    x = rng.normal(size=(replicates, n))
    for i in range(1, n):
        x[:, i] = r * x[:, i - 1] + math.sqrt(1 - r * r) * x[:, i]
    serial = sum(serial_mean_bounds(row, 0.975).lower > 0 for row in x) / replicates
    plain = sum(mean_bounds(row, 0.975).lower > 0 for row in x) / replicates
    assert serial < 0.05 < plain


@pytest.mark.parametrize("n", [2, 20, 200, 719, 5000])
def test_graded_bounds_are_never_narrower_than_t_nor_than_tango_without_discordant_pairs(n: int) -> None:
    tango = paired_binary_interval(n, 0, 0, 0, 0.99)
    rng = np.random.default_rng(n)
    for diff in (np.zeros(n), rng.normal(0.0, 0.1, size=n), np.where(np.arange(n) == 0, -1.0, 0.0)):
        got, plain = graded_bounds(diff, 0.99, reach=1.0), mean_bounds(diff, 0.99)
        assert got.upper - got.value == pytest.approx(got.value - got.lower)
        assert got.lower <= plain.lower
        assert got.value - got.lower >= -tango.lower
        free = graded_bounds(diff, 0.99)
        assert free.lower <= plain.lower


def test_graded_bounds_tend_to_t_with_many_items_and_scale_with_the_unit() -> None:
    x = np.random.default_rng(0).normal(size=50000)
    got, plain = graded_bounds(x, 0.99), mean_bounds(x, 0.99)
    assert 1.0 < (got.value - got.lower) / (plain.value - plain.lower) < 1.03
    scaled = graded_bounds(10.0 * x + 3.0, 0.99)
    assert scaled.lower == pytest.approx(10.0 * got.lower + 3.0)
    still = graded_bounds([0.5] * 20)
    assert (still.lower, still.upper) == (0.5, 0.5)
