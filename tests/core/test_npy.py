"""Folders of `.npy` files: what fits is read by name, what does not is refused with its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekd.errors import DataError
from edgekd.npy import load_folder, load_inputs
from edgekd.records import IOSpec, TensorSpec


def spec(*inputs: TensorSpec) -> IOSpec:
    return IOSpec(inputs=inputs, outputs=(TensorSpec(name="y", dtype="float32", shape=(1, 4)),))


def tensor(name: str, dtype: str = "float32", shape: tuple[int | str, ...] = (1, 3)) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def saved(folder: Path, **arrays: Any) -> Path:
    for name, value in arrays.items():
        np.save(folder / f"{name}.npy", value)
    return folder


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


def test_folder_of_arrays_gives_inputs_and_targets_and_refuses_pickles(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no inputs"):
        load_folder(tmp_path)
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="not a plain array"):
        load_folder(tmp_path)
