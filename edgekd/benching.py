"""One model file on one target: latency by named clocks, with its conditions; no budget, no verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgekd.contracts import Array, Target
from edgekd.errors import DataError, InputError, UnsupportedModel
from edgekd.measure import Subject, calibrate_limits, measure_verdict, screen
from edgekd.onnx_io import import_onnx
from edgekd.records import Capabilities, IOSpec, Measurement, OpTime, TensorSpec
from edgekd.stats import percentile_of
from edgekd.tree import first_line


@dataclass(frozen=True)
class BenchResult:
    """`summary` holds milliseconds: `p50`, `p90`, `p99` of all valid samples, `init` and `first` as medians over launches."""

    measurement: Measurement
    summary: dict[str, float]
    op_times: tuple[OpTime, ...]
    iospec: IOSpec
    capabilities: Capabilities


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
        try:
            value = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is not a plain array", found=first_line(error), hint="save it with numpy.save", subject=path) from error
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


def random_inputs(iospec: IOSpec, *, samples: int, seed: int) -> dict[str, Array]:
    """Seeded inputs of the right shapes: standard normal for floats, zeros for integers; good for timing only."""
    generator = np.random.default_rng(seed)
    out: dict[str, Array] = {}
    for spec in iospec.inputs:
        sizes = [1 if isinstance(axis, str) else axis for axis in spec.shape[1:]]
        kind = np.dtype(spec.dtype)
        out[spec.name] = generator.standard_normal((samples, *sizes)).astype(kind) if kind.kind == "f" else np.zeros((samples, *sizes), dtype=kind)
    return out


def bench(
    model: Path | str,
    *,
    target: Target,
    percentile: float = 50.0,
    inputs: Path | str | None = None,
    seed: int = 0,
    verdict_grade: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> BenchResult:
    """How long a model takes on a target, with everything needed to trust the number. `inputs` is a folder of `.npy` arrays.

    Raises:
        ModelError, DataError: the file or the inputs cannot be used.
        InputError: the percentile is not between 0 and 100.
        UnsupportedModel: the target cannot run it; the message names the operator.
    """
    import tempfile

    if not 0.0 < percentile < 100.0:
        raise InputError("the percentile is out of range", found=percentile, allowed="above 0 and below 100", hint="use 50 for the median, 90 for p90")
    with tempfile.TemporaryDirectory(prefix="edgekd-bench-") as name:
        artifact = import_onnx(Path(model), Path(name))
        iospec = artifact.record.iospec
        rotation = target.profile.measure.verdict.launch.rotation
        samples = random_inputs(iospec, samples=rotation, seed=seed) if inputs is None else load_inputs(Path(inputs), iospec)
        support = target.runtime.supports(artifact)
        if not support.supported:
            raise UnsupportedModel(
                "the target cannot run the model", found="; ".join(f"{op}: {why}" for op, why in support.missing.items()), subject=str(model)
            )
        subject = Subject(Path(model).stem, artifact, {key: value[:rotation] for key, value in samples.items()})
        limits = calibrate_limits(target, subject, cache_dir=None, seed=seed)
        if verdict_grade:
            measurement = measure_verdict(target, [subject], limits=limits, seed=seed, undecided=lambda _: False, progress=progress)[subject.label]
        else:
            measurement = screen(target, [subject], percentile=percentile, limits=limits, seed=seed)[subject.label].measurement
        op_times = target.runtime.op_times(artifact, subject.inputs) if target.capabilities.op_times else ()
        return BenchResult(measurement, summarize(measurement, percentile), op_times, iospec, target.capabilities)


def summarize(measurement: Measurement, percentile: float = 50.0) -> dict[str, float]:
    """Milliseconds by name over the valid launches; empty when there is none."""
    samples = np.array([value for launch in measurement.launches for value in launch.samples_ns], dtype=np.float64) / 1e6
    if not measurement.launches or not samples.size:
        return {}
    wanted = sorted({50.0, 90.0, 99.0, percentile})
    summary = {f"p{q:g}": float(percentile_of(samples, q)) for q in wanted}
    summary["init"] = float(np.median([launch.init_ns for launch in measurement.launches])) / 1e6
    summary["first"] = float(np.median([launch.first_ns for launch in measurement.launches])) / 1e6
    return summary
