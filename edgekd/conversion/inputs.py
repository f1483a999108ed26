"""What a conversion starts from: a model of any format as one kind of source, and real inputs laid out as each format takes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.artifact import StoredArtifact, store_artifact
from edgekd.contracts import Array, Tensors
from edgekd.conversion.formats import TORCH
from edgekd.errors import ConfigError, DataError, ModelError
from edgekd.records import Artifact, Format, IOSpec, Precision, TensorSpec
from edgekd.storage import copy_file, sha256_bytes, sha256_file

CHANNEL_LAST = "channel_last"
_STORED = "artifact.json"


@dataclass(frozen=True)
class Source:
    """The model that a road starts from: a `module`, or an `artifact` of any other format."""

    format: str
    iospec: IOSpec
    module: Any = None
    artifact: StoredArtifact | None = None

    @property
    def precision(self) -> Precision:
        """The arithmetic of the model."""
        return Precision.FP32 if self.artifact is None else self.artifact.record.precision

    def outputs(self, inputs: Tensors) -> dict[str, Array]:
        """What the module gives, `(samples, ...)`."""
        from edgekd.teachers import TorchTeacher

        return TorchTeacher(self.module).outputs({spec.name: inputs[spec.name] for spec in self.iospec.inputs})

    def arrays(self, given: Any, what: str) -> dict[str, Array]:
        """Inputs by name and in the model's order, `(samples, ...)`, from an array, a mapping or a folder of `.npy` files.

        Raises:
            DataError: an input is missing, superfluous, of another shape or type, or not finite.
        """
        names = tuple(spec.name for spec in self.iospec.inputs)
        if isinstance(given, (str, Path)):
            from edgekd.npy import load_inputs

            return load_inputs(Path(given), self.iospec)
        found = named_arrays(given, names, what)
        if sorted(found) != sorted(names):
            raise DataError(f"the {what} has other inputs than the model", found=sorted(found), allowed=sorted(names), subject=what)
        out = {spec.name: _fitting(found[spec.name], spec, what) for spec in self.iospec.inputs}
        if len({len(array) for array in out.values()}) > 1:
            raise DataError(f"the inputs of the {what} have different numbers of samples", found={name: len(array) for name, array in out.items()})
        return out


def source_format(model: Any) -> str:
    """The format of a model: a module, an artifact, a file by its ending or identifier, a folder by what lies in it.

    Raises:
        ModelError: it is none of the known ones.
    """
    if isinstance(model, StoredArtifact):
        return model.record.format.value
    if hasattr(model, "state_dict") and hasattr(model, "forward"):
        return TORCH
    if not isinstance(model, (str, Path)):
        raise ModelError("this is no model that can be converted", found=type(model).__name__, allowed=_ALLOWED)
    path = Path(model)
    if path.is_dir():
        if (path / _STORED).is_file():
            return Artifact.load(path / _STORED).format.value
        if (path / "saved_model.pb").is_file():
            return Format.SAVED_MODEL.value
        raise ModelError(f"the folder {path} holds no model", found=", ".join(sorted(item.name for item in path.iterdir())[:5]), allowed=_ALLOWED, subject=path)
    if not path.is_file():
        raise ModelError(f"{path} does not exist", hint="check the path", subject=path)
    if path.suffix == ".keras":
        return Format.KERAS.value
    if path.suffix not in (".onnx", ".tflite"):
        raise ModelError(f"{path} has no ending that says what it is", found=path.suffix or "(none)", allowed=_ALLOWED, subject=path)
    from edgekd.models.model_file import format_of

    return format_of(path).value


_ALLOWED = "a torch module, .onnx, .tflite, .keras, a folder with saved_model.pb or artifact.json"


def open_source(model: Any, format: str, folder: Path, iospec: IOSpec | None, example: Any, *, channel_last: bool = False) -> Source:
    """The model ready for the first hop; files are copied to `folder`, and a batch axis of an ONNX file is bound to 1.

    A module is described by `iospec`, by an attribute of that name (a streaming cell has one), or by `example`, of which the first
    sample is run. With `channel_last` its tensors of rank 4 are taken to be NCHW.

    Raises:
        ModelError: the file cannot be read. ConfigError: a description is missing, or contradicts what the file tells.
    """
    if format == TORCH:
        told = getattr(model, "iospec", None)
        described = iospec or (told if isinstance(told, IOSpec) else None)
        return Source(format, described or _module_spec(model, example, channel_last), module=model)
    if isinstance(model, StoredArtifact):
        model.verify()
        return Source(format, model.record.iospec, artifact=model)
    path = Path(model)
    if path.is_dir() and (path / _STORED).is_file():
        stored = StoredArtifact(Artifact.load(path / _STORED), path)
        stored.verify()
        return Source(format, stored.record.iospec, artifact=stored)
    if format == Format.ONNX.value:
        from edgekd.models.onnx_artifact import import_onnx
        from edgekd.models.onnx_file import file_hash

        made = import_onnx(path, folder, like=iospec, notes={"source": file_hash(path)})
    elif format == Format.TFLITE.value:
        from edgekd.models.tflite_artifact import import_tflite

        made = import_tflite(path, folder, like=iospec, notes={"source": sha256_file(path)})
    else:
        made = _described(path, format, folder, iospec)
    return Source(format, made.record.iospec, artifact=made)


def _described(path: Path, format: str, folder: Path, iospec: IOSpec | None) -> StoredArtifact:
    """A Keras file or a SavedModel, which only TensorFlow can read, with the description that its user gives."""
    if iospec is None:
        raise ConfigError(
            f"what a {format} model takes and gives must be told, since only TensorFlow can read it",
            found=str(path),
            allowed="iospec=IOSpec(inputs=(TensorSpec(...),), outputs=(...)), or --iospec FILE with its JSON",
            subject=path,
        )
    if path.is_dir():
        names = sorted(str(item.relative_to(path)) for item in path.rglob("*") if item.is_file())
        entry, extra = "saved_model.pb", tuple(name for name in names if name != "saved_model.pb")
        for name in names:
            copy_file(path / name, folder / name)
    else:
        entry, extra = "model.keras", ()
        copy_file(path, folder / entry)
    hashes = [f"{name}:{sha256_file(folder / name)}" for name in sorted((entry, *extra))]
    return store_artifact(
        folder,
        entry,
        format=Format(format),
        precision=Precision.FP32,
        iospec=iospec,
        producers={"unknown": "unknown"},
        metadata={"source": sha256_bytes("\n".join(hashes).encode()) if extra else sha256_file(folder / entry)},
        extra_files=extra,
    )


def _module_spec(module: Any, example: Any, channel_last: bool) -> IOSpec:
    """The description of a module, from running it on the first sample of an example."""
    from edgekd.teachers import TorchTeacher

    found = example_arrays(module, example)
    outputs = TorchTeacher(module).outputs({name: array[:1] for name, array in found.items()})

    def described(arrays: Mapping[str, Array]) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(name=name, dtype=array.dtype.name, shape=("batch", *array.shape[1:]), layout="NCHW" if channel_last and array.ndim == 4 else "")
            for name, array in arrays.items()
        )

    return IOSpec(inputs=described(found), outputs=described(outputs), static_binding={"batch": 1})


def example_arrays(module: Any, example: Any) -> dict[str, Array]:
    """An example of a module's inputs by name, in the order of its arguments, at least one sample each.

    `example` is an array, several in order, a mapping, or the path of a `.npy` file or of a folder of them.

    Raises:
        ConfigError: there is none. DataError: it cannot be read, has other inputs than the module, or holds no sample.
    """
    from edgekd.teachers import forward_names

    if example is None:
        raise ConfigError("a torch module needs example inputs", hint="pass example=, one batch or more, batch first", subject="example")
    names = forward_names(module)
    if isinstance(example, (str, Path)) and Path(example).suffix == ".npy":
        from edgekd.npy import read_array

        example = read_array(Path(example))
    if isinstance(example, (str, Path)):
        found = _folder(Path(example), names)
    else:
        found = named_arrays(example, names or ("input",), "example")
        if names and sorted(names) == sorted(found):
            found = {name: found[name] for name in names}
    if not found or any(array.ndim == 0 or not len(array) for array in found.values()):
        raise DataError("the example holds no sample", found={name: array.shape for name, array in found.items()}, hint="give one batch, batch first")
    return found


def _folder(folder: Path, names: Sequence[str]) -> dict[str, Array]:
    """The arrays of a folder in the order of the module's arguments; without names a single array goes by `input`."""
    from edgekd.npy import read_array

    if not folder.is_dir():
        raise DataError("the folder with the inputs does not exist", found=str(folder), hint="check the path", subject=folder)
    single = folder / "inputs.npy"
    wanted = names or ("input",)
    paths = {name: single if len(wanted) == 1 and not (folder / f"{name}.npy").is_file() else folder / f"{name}.npy" for name in wanted}
    return {name: read_array(path) for name, path in paths.items()}


def named_arrays(given: Any, names: Sequence[str], what: str) -> dict[str, Array]:
    """Arrays by name from one array or tensor, several in order, or a mapping."""
    if isinstance(given, Mapping):
        return {str(name): _array(value) for name, value in given.items()}
    values = list(given) if isinstance(given, (tuple, list)) else [given]
    if len(values) != len(names):
        raise DataError(f"the {what} has another number of inputs than the model", found=len(values), allowed=", ".join(names), hint="pass a mapping by name")
    return {name: _array(value) for name, value in zip(names, values, strict=True)}


def _array(value: Any) -> Array:
    """An array, from an array or a tensor."""
    return np.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)


def _fitting(array: Array, spec: TensorSpec, what: str) -> Array:
    wanted = spec.shape[1:]
    shapes_fit = array.ndim == len(spec.shape) and all(isinstance(axis, str) or axis == size for axis, size in zip(wanted, array.shape[1:], strict=False))
    if not shapes_fit or not len(array):
        raise DataError(f"the {what} does not fit the input {spec.name!r}", found=array.shape, allowed=("samples", *wanted), subject=spec.name)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError(f"the {what} holds NaN or infinity", found=spec.name, subject=spec.name)
    return _typed(array, spec)


def _typed(array: Array, spec: TensorSpec) -> Array:
    """The array in the tensor's type: floats may lose precision, whole numbers nothing."""
    if array.dtype.name == spec.dtype:
        return array
    cast: Array = array.astype(spec.dtype)
    floats = array.dtype.kind == "f" and cast.dtype.kind == "f"
    if not floats and not (array.dtype.kind in "iub" and cast.dtype.kind in "iub" and np.array_equal(cast, array)):
        raise DataError(f"the input {spec.name!r} has the wrong type", found=array.dtype.name, allowed=spec.dtype, subject=spec.name)
    return cast


def given_inputs(source: Source, example: Any, calibration: Any, samples: int, seed: int) -> tuple[dict[str, Array], str]:
    """The inputs that hops are compared on, at most `samples`, and what they are, in words.

    Raises:
        ConfigError: `samples` is not positive. DataError: they do not fit the model.
    """
    if samples < 1:
        raise ConfigError("hops are compared on one sample at least", found=samples, allowed="1 or more", subject="samples")
    if example is None and calibration is None:
        from edgekd.benching import random_inputs

        return random_inputs(source.iospec, samples=samples, seed=seed), f"{samples} random samples (seed {seed}), no real inputs"
    what = "example" if example is not None else "calibration"
    arrays = source.arrays(example if example is not None else calibration, what)
    taken = {name: array[:samples] for name, array in arrays.items()}
    return taken, f"{len(next(iter(taken.values())))} samples of the {what}"


def refit(arrays: Tensors, before: IOSpec, made: StoredArtifact, *, changed: bool, outputs: bool = False) -> dict[str, Array]:
    """Inputs, or `outputs`, laid out as in `before`, laid out and typed as `made` takes or gives them.

    A converter that turns axes says so in the metadata `orders` (JSON: tensor to its axes in the source), or by layouts on both sides.

    Raises:
        DataError: the two layouts differ in another way, or whole numbers do not fit the new type.
    """
    from edgekd.models.tflite_artifact import fit_layouts

    told = made.record.metadata.get("orders", "") if changed else ""
    if told:
        orders: dict[str, list[int]] = json.loads(told)
        fitted = {name: np.ascontiguousarray(np.transpose(array, orders[name])) if name in orders else array for name, array in arrays.items()}
    else:
        fitted = fit_layouts(arrays, before, made.record.iospec)
    if outputs:
        return fitted
    specs = {spec.name: spec for spec in made.record.iospec.inputs}
    return {name: _typed(array, specs[name]) if name in specs else array for name, array in fitted.items()}
