"""Calibration: exact streaming, bounded memory, independent references, and refusal of bad data."""

from __future__ import annotations

import tracemalloc
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekd.artifact import StoredArtifact
from edgekd.errors import ConfigError, DataError
from edgekd.quantize.calibrate import calibration_set, observe, plan_taps
from edgekd.quantize.histogram import BINS, Histogram
from edgekd.records import Artifact, Format, IOSpec, Precision, TensorSpec


def filled(*blocks: np.ndarray) -> Histogram:
    histogram = Histogram()
    for block in blocks:
        histogram.update(block)
    return histogram


def small_model() -> StoredArtifact:
    spec = IOSpec(inputs=(TensorSpec(name="x", dtype="float32", shape=(1, 2)),), outputs=(TensorSpec(name="y", dtype="float32", shape=(1, 2)),))
    record = Artifact(files={"m": "0"}, entry="m", format=Format.ONNX, precision=Precision.FP32, iospec=spec, size_bytes=1)
    return StoredArtifact(record, Path("."))


class Doubling:
    """A model in a function: `big` repeats the input many times; remembers how it was called."""

    def __init__(self, width: int = 1000) -> None:
        self.width = width
        self.calls: list[tuple[int, tuple[str, ...]]] = []

    def __call__(self, model: StoredArtifact, inputs: Mapping[str, np.ndarray], taps: Sequence[str] = ()) -> dict[str, np.ndarray]:
        self.calls.append((len(inputs["x"]), tuple(taps)))
        return {name: self._tensor(name, inputs["x"]) for name in ("y", *taps)}

    def _tensor(self, name: str, x: np.ndarray) -> np.ndarray:
        if name == "big":
            return np.tile(x, (1, self.width // 2))
        return np.log(x) if name == "log" else 2 * x


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_histograms_do_not_depend_on_how_the_data_are_cut(seed: int, cuts: int) -> None:
    generator = np.random.default_rng(seed)
    values = (generator.standard_normal(500) * 10.0 ** generator.integers(-6, 6, 500)).astype(np.float32)
    values[generator.integers(0, 500, 20)] = 0
    whole, parts = filled(values), filled(*np.array_split(values, cuts))
    for method in (Histogram.minmax, Histogram.entropy, lambda histogram: histogram.percentile(99.0)):
        assert method(whole) == method(parts)
    assert whole.size == parts.size == 500


def test_percentile_agrees_with_numpy_within_a_bin() -> None:
    values = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    low, high = filled(values).percentile(99.0)
    bin_width = 8.0 / BINS
    assert low == pytest.approx(np.quantile(values, 0.005), abs=1.5 * bin_width)
    assert high == pytest.approx(np.quantile(values, 0.995), abs=1.5 * bin_width)
    positive = np.abs(values)
    low, high = filled(positive).percentile(99.0)
    assert low == positive.min()
    assert high == pytest.approx(np.quantile(positive, 0.99), abs=1.5 * bin_width)


def test_entropy_cuts_outliers_and_keeps_a_uniform_range() -> None:
    generator = np.random.default_rng(1)
    body = np.abs(generator.standard_normal(50_000)).astype(np.float32)
    low, high = filled(np.append(body, np.float32(1000.0))).entropy()
    assert low >= 0
    assert high < 200
    uniform = generator.uniform(-1, 1, 50_000).astype(np.float32)
    low, high = filled(uniform).entropy()
    assert high > 0.9
    assert low < -0.9


def test_ranges_never_exceed_what_was_seen() -> None:
    histogram = filled(np.array([-0.5, 0.0, 3.0], dtype=np.float32))
    for low, high in (histogram.minmax(), histogram.percentile(99.99), histogram.percentile(100.0), histogram.entropy()):
        assert -0.5 <= low <= 0 <= high <= 3.0
    zeros = filled(np.zeros(10, dtype=np.float32))
    assert zeros.minmax() == zeros.percentile(99.0) == zeros.entropy() == (0.0, 0.0)


def test_observing_runs_in_blocks_that_fit_the_memory_and_sees_all() -> None:
    inputs = {"x": np.random.default_rng(0).standard_normal((4000, 2)).astype(np.float32)}
    infer = Doubling(width=2000)
    seen = observe(infer, small_model(), inputs, {"x": 2, "y": 2, "big": 2000}, memory_mb=4)
    assert seen.samples == 4000
    assert sum(count for count, _ in infer.calls) == 4000
    assert max(count for count, _ in infer.calls) * 2000 * 4 * 2 <= 4_000_000
    ranges = seen.ranges("minmax")
    assert ranges["big"] == ranges["x"] == (float(inputs["x"].min()), float(inputs["x"].max()))
    assert ranges["y"][1] == 2 * ranges["x"][1]


def test_observing_stays_under_its_memory_cap() -> None:
    inputs = {"x": np.random.default_rng(0).standard_normal((4000, 2)).astype(np.float32)}
    tracemalloc.start()
    observe(Doubling(width=4000), small_model(), inputs, {"big": 4000, "y": 2}, memory_mb=16)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert inputs["x"].shape[0] * 4000 * 4 > 60_000_000
    assert peak < 16_000_000


def test_tensors_of_unknown_size_are_probed_with_one_sample() -> None:
    infer = Doubling()
    observe(infer, small_model(), {"x": np.ones((50, 2), dtype=np.float32)}, {"y": 2, "big": -1}, memory_mb=1)
    assert infer.calls[0] == (1, ("big",))
    assert sum(count for count, _ in infer.calls[1:]) == 50


def test_planning_groups_tensors_and_refuses_what_cannot_fit() -> None:
    assert plan_taps({"a": 40, "b": 40, "c": 40}, 10, 200) == ((("a", "b"), 1), (("c",), 2))
    with pytest.raises(ConfigError, match="memory_mb"):
        plan_taps({"a": 101}, 10, 200)
    with pytest.raises(ConfigError, match="memory_mb"):
        observe(Doubling(), small_model(), {"x": np.ones((2, 2), dtype=np.float32)}, {f"t{index}": 2 for index in range(40)}, memory_mb=1)


def test_values_that_are_not_finite_are_refused_with_their_place() -> None:
    bad = np.ones((4, 2), dtype=np.float32)
    bad[2, 1] = np.nan
    with pytest.raises(DataError, match="sample 2"):
        calibration_set({"x": bad}, split="train")
    with np.errstate(divide="ignore"), pytest.raises(DataError, match="'log'"):
        observe(Doubling(), small_model(), {"x": np.zeros((4, 2), dtype=np.float32)}, {"log": 2})
    with pytest.raises(DataError, match="nothing to calibrate"):
        calibration_set({"x": bad[:0]}, split="train")


def test_calibration_inputs_are_identified_by_their_content() -> None:
    values = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    first, again, other = (calibration_set({"x": array}, split="train", indices=range(8)) for array in (values, values.copy(), values[::-1]))
    assert first.data_hash == again.data_hash != other.data_hash
    assert (first.split, first.indices) == ("train", tuple(range(8)))


def test_unknown_methods_and_percentiles_are_refused() -> None:
    seen = observe(Doubling(), small_model(), {"x": np.ones((3, 2), dtype=np.float32)}, {"y": 2})
    with pytest.raises(ConfigError, match="minmax"):
        seen.ranges("average")
    with pytest.raises(ConfigError, match="percentile"):
        seen.ranges("percentile", 40.0)
