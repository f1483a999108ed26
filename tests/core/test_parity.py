"""The parity ladder on arrays: what passes, what fails, and what the reason says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekd.errors import DataError, ParityRejected
from edgekd.parity.compare import Tolerance, compare_hop, compare_tensors, first_bad_hop, require_parity, tolerance_for
from edgekd.records import HopParity, Precision

RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((16, 10)).astype(np.float32)
FP32 = tolerance_for(Precision.FP32, 20)


def hop(reference: dict[str, np.ndarray], outputs: dict[str, np.ndarray], precision: Precision = Precision.FP32) -> HopParity:
    return compare_hop("torch -> onnx", reference, outputs, precision=precision)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_rounding_passes_and_a_percent_fails_at_every_scale(scale: float) -> None:
    reference = LOGITS * np.float32(scale)
    assert compare_tensors("y", reference, reference * np.float32(1 + 1e-6), FP32).passed
    row = compare_tensors("y", reference, reference * np.float32(1.01), FP32)
    assert not row.passed
    assert row.max_rel == pytest.approx(0.01, rel=1e-3)
    assert row.sqnr_db == pytest.approx(40, abs=0.1)
    assert "allowed" in row.reason


def test_int8_is_judged_by_signal_to_error() -> None:
    step = np.float32(np.ptp(LOGITS) / 255)
    rounded = np.round(LOGITS / step) * step
    row = compare_tensors("y", LOGITS, rounded, tolerance_for(Precision.INT8, 50))
    assert row.passed
    assert row.sqnr_db == pytest.approx(10 * np.log10(LOGITS.var() / (step**2 / 12)), abs=1)
    coarse = np.round(LOGITS) * np.float32(1.0)
    assert not compare_tensors("y", LOGITS, coarse, tolerance_for(Precision.INT8, 1)).passed


def test_tolerances_widen_with_depth_and_are_tighter_for_one_file_on_two_machines() -> None:
    assert tolerance_for(Precision.FP32, 100).value == pytest.approx(10 * tolerance_for(Precision.FP32, 1).value)
    assert tolerance_for(Precision.FP16, 10).value > tolerance_for(Precision.FP32, 10).value
    assert tolerance_for(Precision.INT8, 100).value == pytest.approx(20.0)
    assert tolerance_for(Precision.INT8, 10**9).value == 10.0
    assert tolerance_for(Precision.INT8, 100, same_file=True).value == pytest.approx(30.0)


def test_the_documented_tolerances_are_those_of_the_code() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "parity.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if re.match(r"\| (fp32|fp16|int8)", line)]
    assert len(rows) == 4
    for name, _, *values in rows:
        kind, same_file = Precision(name.split(",")[0]), "same file" in name
        limits = [tolerance_for(kind, depth, same_file=same_file).value for depth in (1, 10, 50, 100)]
        assert values == [f"{limit:.1f}" if kind is Precision.INT8 else f"{limit:.1e}" for limit in limits]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_fail_with_the_sample(bad: float) -> None:
    other = LOGITS.copy()
    other[3, 2] = bad
    row = compare_tensors("y", LOGITS, other, FP32)
    assert not row.passed
    assert row.nonfinite == 1
    assert "sample 3" in row.reason
    assert "reference" in compare_tensors("y", other, LOGITS, FP32).reason


def test_a_constant_output_is_named_even_where_the_tolerance_is_wide() -> None:
    other = np.repeat(LOGITS.mean(0, keepdims=True), len(LOGITS), axis=0)
    row = compare_tensors("y", LOGITS, other, Tolerance("relative", 100.0))
    assert not row.passed
    assert row.constant
    same = compare_tensors("y", other, other, FP32)
    assert same.passed
    assert not same.constant


def test_a_permuted_layout_is_named_with_its_order() -> None:
    image = RNG.standard_normal((4, 3, 8, 6)).astype(np.float32)
    row = compare_tensors("y", image, image.transpose(0, 2, 3, 1), FP32)
    assert not row.passed
    assert "permuted" in row.reason
    assert "(0, 3, 1, 2)" in row.reason
    assert row.max_abs == 0
    other = compare_tensors("y", image, RNG.standard_normal((4, 8, 6, 3)).astype(np.float32), FP32)
    assert "differs even then" in other.reason


def test_a_permuted_layout_of_equal_shape_is_recognised() -> None:
    cube = RNG.standard_normal((4, 5, 5, 5)).astype(np.float32)
    row = compare_tensors("y", cube, cube.transpose(0, 2, 3, 1), FP32)
    assert not row.passed
    assert "layout" in row.reason
    assert compare_tensors("y", cube, cube, FP32).passed


def test_another_shape_fails_with_both_shapes() -> None:
    reason = compare_tensors("y", LOGITS, LOGITS[:, :9], FP32).reason
    assert "(16, 9)" in reason
    assert "(16, 10)" in reason


def test_missing_and_additional_outputs_fail_by_name() -> None:
    found = hop({"a": LOGITS, "b": LOGITS[:, :3]}, {"a": LOGITS, "c": LOGITS})
    assert not found.passed
    assert found.first_bad == "b"
    assert {row.name: row.passed for row in found.tensors} == {"a": True, "b": False, "c": False}


def test_swapped_outputs_are_recognised() -> None:
    other = RNG.standard_normal(LOGITS.shape).astype(np.float32)
    found = hop({"a": LOGITS, "b": other}, {"a": other, "b": LOGITS})
    assert found.first_bad == "a"
    assert "swapped" in found.tensors[0].reason
    assert "'b'" in found.tensors[0].reason


def test_a_reference_of_zeros_is_compared_absolutely() -> None:
    zeros = np.zeros((4, 3), dtype=np.float32)
    assert compare_tensors("y", zeros, zeros + np.float32(1e-12), FP32).passed
    assert not compare_tensors("y", zeros, zeros + np.float32(1e-3), FP32).passed


def test_the_first_bad_hop_is_named_and_raised() -> None:
    good, bad = hop({"y": LOGITS}, {"y": LOGITS}), compare_hop("onnx -> int8", {"y": LOGITS}, {"y": -LOGITS}, precision=Precision.INT8)
    assert first_bad_hop([good, bad, bad]) is bad
    assert first_bad_hop([good]) is None
    require_parity([good])
    with pytest.raises(ParityRejected, match="onnx -> int8") as raised:
        require_parity([good, bad])
    assert raised.value.subject is bad


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(DataError):
        hop({}, {})
    with pytest.raises(DataError):
        hop({"y": LOGITS[:0]}, {"y": LOGITS[:0]})


@given(st.integers(0, 2**32 - 1), st.floats(1e-7, 1e-1))
def test_every_row_can_be_saved_and_grows_worse_with_the_error(seed: int, size: float) -> None:
    error = np.random.default_rng(seed).standard_normal(LOGITS.shape)
    small, large = (compare_hop("h", {"y": LOGITS}, {"y": LOGITS + factor * size * error}, precision=Precision.FP32) for factor in (1, 10))
    assert HopParity.from_json(large.to_json()) == large
    assert small.tensors[0].sqnr_db > large.tensors[0].sqnr_db
    assert small.passed or not large.passed
