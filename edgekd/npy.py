"""Folders of `.npy` files: how data come in without any code."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgekd.contracts import Array
from edgekd.data import Arrays
from edgekd.errors import DataError
from edgekd.records import IOSpec, TensorSpec
from edgekd.tree import first_line


def read_array(path: Path) -> Array:
    """The plain array in a `.npy` file.

    Raises:
        DataError: the file cannot be read, or holds objects.
    """
    try:
        value: Array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a plain array", found=first_line(error), hint="save it with numpy.save", subject=path) from error
    return value


def load_inputs(folder: Path, iospec: IOSpec) -> dict[str, Array]:
    """The arrays `NAME.npy` of a folder, one per input of the model, `(samples, ...)`; `inputs.npy` serves a model with one input.

    Raises:
        DataError: the folder or a file is missing, a file holds other shapes, or is not finite.
    """
    if not folder.is_dir():
        raise DataError("the folder with the inputs does not exist", found=str(folder), hint="check the path", subject=folder)
    out: dict[str, Array] = {}
    for spec in iospec.inputs:
        path = folder / f"{spec.name}.npy"
        if not path.is_file() and len(iospec.inputs) == 1:
            path = folder / "inputs.npy"
        if not path.is_file():
            raise DataError(
                f"no array for the model's input {spec.name!r}",
                found=str(folder),
                allowed=f"{spec.name}.npy" + (" or inputs.npy" if len(iospec.inputs) == 1 else ""),
                subject=spec.name,
            )
        value = read_array(path)
        wanted = spec.shape[1:]
        if (
            value.ndim != len(spec.shape)
            or len(value) == 0
            or any(isinstance(axis, int) and axis != size for axis, size in zip(wanted, value.shape[1:], strict=True))
        ):
            raise DataError(f"{path.name} does not fit the input {spec.name!r}", found=value.shape, allowed=("samples", *wanted), subject=spec.name)
        if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
            raise DataError(f"{path.name} holds NaN or infinity", found=str(path), subject=spec.name)
        out[spec.name] = _cast(value, spec, path)
    if len({len(value) for value in out.values()}) > 1:
        raise DataError("the inputs have different numbers of samples", found={name: len(value) for name, value in out.items()})
    return out


def _cast(value: Array, spec: TensorSpec, path: Path) -> Array:
    """The values in the input's dtype; nothing but the precision of floats may get lost."""
    if np.can_cast(value.dtype, spec.dtype, casting="same_kind"):
        with np.errstate(over="ignore"):
            cast: Array = value.astype(spec.dtype, copy=False)
        if np.isfinite(cast).all() if np.issubdtype(cast.dtype, np.floating) else np.array_equal(cast, value):
            return cast
        raise DataError(f"{path.name} holds values that {spec.dtype} cannot", found=f"{value.min()} to {value.max()}", allowed=spec.dtype, subject=spec.name)
    raise DataError(
        f"{path.name} holds another kind of numbers than the input {spec.name!r} takes", found=str(value.dtype), allowed=spec.dtype, subject=spec.name
    )


def load_folder(folder: Path) -> Arrays:
    """The `edgekd.Arrays` in a folder: `targets.npy` (or `targets.NAME.npy`), every other `.npy` is the input of that name.

    Raises:
        DataError: there are no inputs, or a file is no plain array.
    """
    inputs: dict[str, Array] = {}
    targets: dict[str, Array] = {}
    for path in sorted(folder.glob("*.npy")):
        value = read_array(path)
        if path.stem == "targets" or path.stem.startswith("targets."):
            targets[path.stem.removeprefix("targets").removeprefix(".")] = value
        else:
            inputs[path.stem] = value
    if not inputs:
        raise DataError("the folder holds no inputs", found=str(folder), allowed="NAME.npy for each input, and targets.npy", subject=folder)
    return Arrays(inputs, targets.get("", targets or None))
