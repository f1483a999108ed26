"""Measuring one file: named clocks with conditions, inputs from a folder, and refusals that name what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekd.benching import bench, load_inputs, random_inputs, summarize
from edgekd.errors import DataError, InputError, ModelError
from edgekd.records import Grade, IOSpec, TensorSpec
from edgekd.target import connect
from tests.pipeline.bundle_kit import home, save_net


def spec(*inputs: TensorSpec) -> IOSpec:
    return IOSpec(inputs=inputs, outputs=(TensorSpec(name="y", dtype="float32", shape=(1, 4)),))


def tensor(name: str, dtype: str = "float32", shape: tuple[int | str, ...] = (1, 3)) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def saved(folder: Path, **arrays: Any) -> Path:
    for name, value in arrays.items():
        np.save(folder / f"{name}.npy", value)
    return folder


# ------------------------------------------------------------------------------------------ results


def test_bench_gives_percentiles_init_and_first_with_conditions() -> None:
    with connect("null") as live:
        result = bench(home() / "net.onnx", target=live, percentile=75.0)
    assert set(result.summary) == {"p50", "p75", "p90", "p99", "init", "first"}
    assert result.summary["p50"] < result.summary["p75"] < result.summary["p90"] < result.summary["p99"]
    taken = result.measurement
    assert (taken.valid, taken.simulated, taken.grade, taken.fingerprint.fields["threads"]) == (True, "null", Grade.SCREEN, "1")
    assert {item.op_type for item in result.op_times} >= {"Conv", "Relu", "MatMul"}


def test_bench_at_verdict_grade_takes_a_verdicts_launches() -> None:
    with connect("null") as live:
        taken = bench(home() / "net.onnx", target=live, verdict_grade=True).measurement
        assert (taken.grade, len(taken.launches)) == (Grade.VERDICT, live.profile.measure.verdict.launches)


def test_bench_is_repeatable_on_the_null_target_and_knows_the_larger_net(tmp_path: Path) -> None:
    with connect("null") as live:
        first, again = (bench(home() / "net.onnx", target=live, inputs=home() / "data").summary for _ in range(2))
        larger = bench(save_net(tmp_path / "net.onnx", channels=256), target=live).summary
    assert first == again
    assert larger["p50"] > first["p50"]


def test_summary_is_computed_from_the_raw_samples() -> None:
    with connect("null") as live:
        taken = bench(home() / "net.onnx", target=live).measurement
    samples = np.concatenate([launch.samples_ns for launch in taken.launches]) / 1e6
    assert summarize(taken)["p50"] == pytest.approx(np.percentile(samples, 50), rel=0.01)
    assert summarize(taken)["init"] == pytest.approx(np.median([launch.init_ns for launch in taken.launches]) / 1e6)


def test_disturbed_device_gives_an_invalid_measurement_with_its_reason() -> None:
    with connect("null", overrides=("measure.limits.temperature_max_c=30.0",)) as live:
        taken = bench(home() / "net.onnx", target=live).measurement
    assert not taken.valid
    assert "hot" in taken.reason


# ------------------------------------------------------------------------------------------ wrong arguments


@pytest.mark.parametrize("percentile", [0.0, 100.0, -5.0, float("nan")])
def test_percentile_out_of_range_is_refused(percentile: float) -> None:
    with connect("null") as live, pytest.raises(InputError, match="90 for p90"):
        bench(home() / "net.onnx", target=live, percentile=percentile)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x07"])
def test_file_that_is_no_model_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(content)
    with connect("null") as live, pytest.raises(ModelError, match="export it again"):
        bench(tmp_path / "net.onnx", target=live)


# ------------------------------------------------------------------------------------------ inputs


def test_inputs_are_read_by_name_in_the_models_dtype(tmp_path: Path) -> None:
    arrays: dict[str, np.ndarray] = {"a": np.ones((4, 3)), "ids": np.arange(4, dtype=np.int32)[:, None], "mask": np.ones((4, 2), dtype=np.uint8)}
    loaded = load_inputs(saved(tmp_path, **arrays), spec(tensor("a"), tensor("ids", "int64", (1, 1)), tensor("mask", "float32", (1, "n"))))
    assert {name: value.dtype.name for name, value in loaded.items()} == {"a": "float32", "ids": "int64", "mask": "float32"}
    assert all(np.array_equal(loaded[name], value) for name, value in arrays.items())


def test_one_input_may_be_called_inputs(tmp_path: Path) -> None:
    assert load_inputs(saved(tmp_path, inputs=np.zeros((4, 3))), spec(tensor("a")))["a"].shape == (4, 3)
    with pytest.raises(DataError, match=r"allowed: a\.npy") as caught:
        load_inputs(tmp_path, spec(tensor("a"), tensor("b")))
    assert caught.value.subject == "a"


@pytest.mark.parametrize(
    ("value", "dtype", "text"),
    [
        (np.zeros((4, 2)), "float32", "allowed: ('samples', 3)"),
        (np.zeros((4, 3, 1)), "float32", "allowed: ('samples', 3)"),
        (np.zeros(3), "float32", "allowed: ('samples', 3)"),
        (np.float64(1.0), "float32", "allowed: ('samples', 3)"),
        (np.zeros((0, 3)), "float32", "allowed: ('samples', 3)"),
        (np.full((4, 3), np.nan), "float32", "NaN or infinity"),
        (np.full((4, 3), 1e300), "float32", "float32 cannot"),
        (np.full((4, 3), 300), "int8", "300 to 300"),
        (np.full((4, 3), 0.5), "int64", "another kind of numbers"),
        (np.full((4, 3), "a"), "float32", "another kind of numbers"),
        (np.array([[{}] * 3] * 4, dtype=object), "float32", "numpy.save"),
    ],
)
def test_array_that_does_not_fit_is_refused(value: Any, dtype: str, text: str, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", value, allow_pickle=True)
    with pytest.raises(DataError) as caught:
        load_inputs(tmp_path, spec(tensor("a", dtype)))
    assert text in str(caught.value)
    assert "a.npy" in str(caught.value)


def test_inputs_of_different_lengths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="different numbers of samples"):
        load_inputs(saved(tmp_path, a=np.zeros((4, 3)), b=np.zeros((5, 3))), spec(tensor("a"), tensor("b")))


def test_file_that_is_no_array_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(b"text")
    with pytest.raises(DataError, match=r"numpy\.save"):
        load_inputs(tmp_path, spec(tensor("a")))


def test_random_inputs_are_seeded_and_bind_symbols_to_one() -> None:
    wanted = spec(tensor("a", "float32", (1, "n", 3)), tensor("ids", "int64", (1, 2)))
    first, again, other = (random_inputs(wanted, samples=5, seed=seed) for seed in (0, 0, 1))
    assert {name: value.shape for name, value in first.items()} == {"a": (5, 1, 3), "ids": (5, 2)}
    assert np.array_equal(first["a"], again["a"])
    assert not np.array_equal(first["a"], other["a"])
    assert (first["ids"] == 0).all()
