"""The first hour: one ONNX file and a folder of arrays; no training, no torch, the same stages and the same verdict."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.contracts import Array, Target, Task
from edgekd.data import Arrays
from edgekd.errors import ConfigError, DataError, ModelError, near_names
from edgekd.models.onnx_artifact import import_onnx
from edgekd.npy import load_inputs, read_array
from edgekd.options import Options
from edgekd.pipeline import compress
from edgekd.records import Budget, IOSpec
from edgekd.result import Result
from edgekd.spaces import Fixed
from edgekd.tasks import Classification, MultiTask, Regression
from edgekd.teachers import OnnxTeacher

_SHARES = (0.4, 0.2)
"""Of the samples: calibration, then validation; the rest is the test split. A seeded shuffle comes first."""

_FEWEST = 30
_TASKS = ("classification", "regression")


def quantize_only(
    model: Path | str,
    data: Path | str,
    *,
    target: Target,
    budget: Budget,
    run_dir: Path | str,
    seed: int = 0,
    options: Options | None = None,
    task: str | Task | None = None,
    progress: bool = True,
) -> Result:
    """The ONNX file made as fast as the target allows without training, judged against the file itself.

    `data` holds `NAME.npy` for each input (`inputs.npy` if there is one), `(samples, ...)`, and optionally `targets.npy` (or
    `targets.NAME.npy` per output). Without targets the file's own outputs are the truth: the classes of its only `(samples, classes)`
    output, else its values. At least 30 samples; 40 % calibrate, 20 % choose, 40 % judge.

    Raises:
        ModelError, DataError: the file or the arrays cannot be used.
        ConfigError: the task is none that this way knows.
    """
    if isinstance(task, str) and task not in _TASKS:
        raise ConfigError("unknown task", found=task, allowed=near_names(task, _TASKS))
    source = Path(model)
    with tempfile.TemporaryDirectory(prefix="edgekd-") as name:
        iospec = import_onnx(source, Path(name)).record.iospec
    if iospec.state:
        raise ModelError(
            f"the input {iospec.state_inputs[0]!r} is a state, and a model with state is not compressed here",
            found=", ".join(iospec.state_inputs),
            hint="make its int8 by `edgekd convert`, and measure it by `edgekd bench`",
            subject=iospec.state_inputs[0],
        )
    inputs = load_inputs(Path(data), iospec)
    count = len(next(iter(inputs.values())))
    if count < _FEWEST:
        raise DataError(
            "too few samples to calibrate, choose and judge", found=count, allowed=f"at least {_FEWEST}", hint="add samples to the folder", subject=str(data)
        )
    teacher = OnnxTeacher(source)
    targets, meaning = _targets(Path(data), iospec, teacher.outputs(inputs), count, task)
    order = np.random.default_rng([seed, 0x51]).permutation(count)
    first, second = int(count * _SHARES[0]), int(count * sum(_SHARES))
    parts = [_part(inputs, targets, np.sort(picks)) for picks in (order[:first], order[first:second], order[second:])]
    return compress(
        teacher,
        task=meaning,
        train=parts[0],
        validation=parts[1],
        test=parts[2],
        target=target,
        budget=budget,
        student=Fixed(source),
        run_dir=run_dir,
        seed=seed,
        options=options,
        progress=progress,
    )


def _part(inputs: Mapping[str, Array], targets: Any, picks: Array) -> Arrays:
    chosen = {name: value[picks] for name, value in targets.items()} if isinstance(targets, Mapping) else targets[picks]
    return Arrays({name: value[picks] for name, value in inputs.items()}, chosen)


def _targets(folder: Path, iospec: IOSpec, outputs: Mapping[str, Array], count: int, task: str | Task | None) -> tuple[Any, Task]:
    """The targets and what they mean: from the folder, else from the model's own outputs."""
    names = [spec.name for spec in iospec.outputs]
    given = _given(folder, [spec.name for spec in iospec.inputs], names, count)
    if task is not None and not isinstance(task, str):
        if given is None:
            raise DataError("a task was given, but the folder holds no targets", found=str(folder), allowed="targets.npy", subject=str(folder))
        return given, task
    kinds = {name: _is_classes(outputs[name], task, None if given is None else given[name] if isinstance(given, dict) else given) for name in names}
    if len(names) == 1:
        name = names[0]
        target = given if given is not None else outputs[name].argmax(axis=1) if kinds[name] else outputs[name]
        return target, _meaning(kinds[name], given is not None)
    if given is not None and not isinstance(given, dict):
        raise DataError(
            "the model has several outputs, but the folder holds one file of targets", found="targets.npy", allowed=[f"targets.{name}.npy" for name in names]
        )
    made = {name: (outputs[name].argmax(axis=1) if kinds[name] else outputs[name]) for name in names}
    parts = {name: Classification() if kinds[name] else Regression() for name in names}
    return given or made, MultiTask(parts) if given is not None else MultiTask(parts, metric="mean score against the file's own answers")


def _meaning(classes: bool, labelled: bool) -> Task:
    """The task; without labels its metric says what it is: a comparison with the file itself."""
    if labelled:
        return Classification() if classes else Regression()
    return Classification(metric="agreement with the file") if classes else Regression(metric="r2 against the file")


def _given(folder: Path, inputs: list[str], outputs: list[str], count: int) -> Any:
    """The targets in the folder: one array, one per output, or `None`. What is neither input nor target is refused: it may be misnamed labels."""
    known = [*(f"{name}.npy" for name in inputs), "inputs.npy", "targets.npy", *(f"targets.{name}.npy" for name in outputs)]
    for path in sorted(folder.glob("*.npy")):
        if path.name not in known:
            raise DataError(
                "the folder holds an array that is neither an input nor a target",
                found=path.name,
                allowed=near_names(path.name, known),
                hint="rename it or move it away",
                subject=path,
            )
    if (folder / "targets.npy").is_file():
        return _load(folder / "targets.npy", count)
    files = {name: folder / f"targets.{name}.npy" for name in outputs}
    missing = [path.name for path in files.values() if not path.is_file()]
    if len(missing) == len(files):
        return None
    if missing:
        raise DataError("some outputs have targets and some have none", found=f"{', '.join(missing)} missing", hint="give all or none", subject=str(folder))
    arrays = {name: _load(path, count) for name, path in files.items()}
    return arrays if len(arrays) > 1 else next(iter(arrays.values()))


def _is_classes(output: Array, task: str | None, targets: Array | None) -> bool:
    if task is not None:
        return task == "classification"
    if targets is not None:
        return bool(np.issubdtype(targets.dtype, np.integer)) and output.ndim == targets.ndim + 1
    return output.ndim == 2 and output.shape[1] > 1


def _load(path: Path, count: int) -> Array:
    value = read_array(path)
    if value.ndim == 0 or len(value) != count:
        raise DataError(f"{path.name} does not have one entry per sample", found=len(value) if value.ndim else "one number", allowed=count, subject=path)
    return value
