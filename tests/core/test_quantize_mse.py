"""Calibration by the least squared error against brute force on the raw values, and how stable ranges are over disjoint samples."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from edgekd.errors import ConfigError
from edgekd.quantize.calibrate import STABILITY_LIMIT, SUBSETS, observe
from edgekd.quantize.histogram import Histogram
from tests.core.test_quantize_calibrate import Doubling, filled, small_model

SHAPES: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "normal": lambda random: random.standard_normal(40_000),
    "one-sided": lambda random: np.maximum(random.standard_normal(40_000), 0.0),
    "heavy tails": lambda random: random.standard_t(2.5, 40_000),
    "shifted": lambda random: random.standard_normal(40_000) * 0.3 + 2.0,
    "skewed": lambda random: random.exponential(1.0, 40_000) - 0.2,
    "negative": lambda random: -random.exponential(1.0, 40_000),
    "outlier": lambda random: np.append(random.standard_normal(40_000), 60.0),
}


def squared_error(values: np.ndarray, low: float, high: float, *, symmetric: bool) -> float:
    """The mean squared error of the values in 8 bits, rounded one by one."""
    if symmetric:
        step = max(abs(low), abs(high)) / 127
        return float(np.mean((np.clip(np.rint(values / step), -127, 127) * step - values) ** 2))
    low, high = min(low, 0.0), max(high, 0.0)
    step = (high - low) / 255
    zero = round(-low / step)
    return float(np.mean(((np.clip(np.rint(values / step) + zero, 0, 255) - zero) * step - values) ** 2))


def brute_force(values: np.ndarray, *, symmetric: bool) -> float:
    """The least error over a dense grid of ranges."""
    low, high = float(values.min()), float(values.max())
    shares = np.geomspace(0.02, 1.0, 48)
    if symmetric:
        return min(squared_error(values, low * share, high * share, symmetric=True) for share in shares)
    lows = low * shares if low < 0 else [low]
    highs = high * shares if high > 0 else [high]
    return min(squared_error(values, a, b, symmetric=False) for a in lows for b in highs)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_least_squared_error_is_that_of_brute_force_on_the_raw_values(shape: str, symmetric: bool) -> None:
    values = SHAPES[shape](np.random.default_rng(3)).astype(np.float32)
    sample = values if symmetric else np.append(values[:4000], [values.min(), values.max()])
    low, high = filled(sample).mse(symmetric=symmetric)
    found = squared_error(sample, low, high, symmetric=symmetric)
    assert found <= 1.03 * brute_force(sample, symmetric=symmetric)
    assert found <= squared_error(sample, float(sample.min()), float(sample.max()), symmetric=symmetric) * 1.001
    assert sample.min() <= low <= high <= sample.max()


def test_heavy_tails_are_cut_and_even_values_are_not() -> None:
    random = np.random.default_rng(0)
    tails = random.standard_t(2.5, 40_000).astype(np.float32)
    low, high = filled(tails).mse(symmetric=False)
    assert high - low < 0.95 * np.ptp(tails)
    even = random.uniform(-1, 1, 40_000).astype(np.float32)
    low, high = filled(even).mse(symmetric=True)
    assert (low, high) == pytest.approx((-1.0, 1.0), abs=0.02)


def test_degenerate_tensors_keep_their_extremes() -> None:
    for values in (np.zeros(9), np.full(9, 2.5), np.full(9, -0.125), np.array([0.0, 1e-30])):
        for symmetric in (True, False):
            assert filled(values.astype(np.float32)).mse(symmetric=symmetric) == filled(values.astype(np.float32)).minmax()


def test_merged_histograms_are_the_histogram_of_all_values() -> None:
    random = np.random.default_rng(1)
    values = (random.standard_normal(3000) * 10.0 ** random.integers(-4, 4, 3000)).astype(np.float32)
    values[::7] = 0
    whole, merged = filled(values), Histogram.merged([filled(part) for part in np.array_split(values, 5)])
    for symmetric in (True, False):
        assert whole.mse(symmetric=symmetric) == merged.mse(symmetric=symmetric)
    assert (whole.entropy(), whole.percentile(99.0), whole.size, whole.zeros) == (merged.entropy(), merged.percentile(99.0), merged.size, merged.zeros)
    assert Histogram.merged([]).size == 0


def test_stability_is_that_of_the_ranges_of_disjoint_samples_in_the_same_pass() -> None:
    inputs = {"x": np.random.default_rng(2).standard_normal((401, 2)).astype(np.float32)}
    infer = Doubling(width=4)
    seen = observe(infer, small_model(), inputs, {"x": 2, "y": 2, "big": 4}, memory_mb=1)
    assert sum(count for count, _ in infer.calls) == 401
    stability = seen.stability("minmax")
    assert stability is not None
    assert (stability.subsets, stability.samples) == (SUBSETS, 401)
    parts = [inputs["x"][number::SUBSETS] for number in range(SUBSETS)]
    ends = np.array([(part.min(), part.max()) for part in parts])
    expected = np.ptp(ends, axis=0).max() / 2 / np.ptp(inputs["x"])
    assert stability.worst == pytest.approx(expected)
    assert dict(stability.tensors) == pytest.approx({"x": expected, "y": expected, "big": expected})


def test_ranges_that_one_sample_decides_are_warned_of() -> None:
    calm = {"x": np.tile(np.array([[-1.0, 1.0]], np.float32), (64, 1))}
    seen = observe(Doubling(), small_model(), calm, {"y": 2})
    stable = seen.stability("minmax")
    assert stable is not None
    assert stable.worst == 0.0
    assert stable.stable
    assert "warning" not in stable.text()
    calm["x"][5, 1] = 50.0
    wild = observe(Doubling(), small_model(), calm, {"y": 2}).stability("minmax")
    assert wild is not None
    assert wild.worst == pytest.approx(98.0 / 2 / 102.0)
    assert wild.worst > STABILITY_LIMIT
    assert wild.text().startswith("warning")
    assert "y" in wild.text()
    assert "quantize.calibration_size" in wild.text()


def test_one_sample_has_no_stability_and_methods_are_checked() -> None:
    seen = observe(Doubling(), small_model(), {"x": np.ones((1, 2), np.float32)}, {"y": 2})
    assert seen.stability("minmax") is None
    with pytest.raises(ConfigError, match="mse"):
        observe(Doubling(), small_model(), {"x": np.ones((4, 2), np.float32)}, {"y": 2}).stability("average")
