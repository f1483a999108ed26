"""What the runtimes refuse alike, with the same words: models of other formats, inputs that do not fit, schedules and taps of unknown names."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from edgekd.artifact import StoredArtifact
from edgekd.contracts import Array, BenchmarkRequest, Tensors
from edgekd.errors import ConfigError, DataError, ModelError, UnsupportedModel, near_names
from edgekd.records import Artifact, Format, SupportReport, TensorSpec

_DTYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool")
_NO_TEXTS = "keep texts and objects outside the model"


def refused_record(record: Artifact, wanted: Format = Format.ONNX) -> SupportReport | None:
    """The refusal of a model of another format than `wanted`, or whose tensors hold no numbers; `None` if its record is all right."""
    if record.format is not wanted:
        return SupportReport(supported=False, missing={"format": f"{record.format.value}, this runtime takes {wanted.value}"})
    strange = {item.name: f"dtype {item.dtype}" for item in (*record.iospec.inputs, *record.iospec.outputs) if item.dtype not in _DTYPES}
    return SupportReport(supported=False, missing=strange, note=_NO_TEXTS) if strange else None


def compared_names(record: Artifact, inputs: Collection[str], outputs: Collection[str]) -> SupportReport:
    """Whether the inputs and outputs of the session are those of the IOSpec."""
    missing = {item.name: "no such input in the file" for item in record.iospec.inputs if item.name not in inputs}
    missing |= dict.fromkeys(sorted(set(inputs) - {item.name for item in record.iospec.inputs}), "an input that the IOSpec lacks")
    missing |= {item.name: "no such output in the file" for item in record.iospec.outputs if item.name not in outputs}
    return SupportReport(supported=not missing, missing=missing)


def fitting(model: StoredArtifact, inputs: Tensors) -> dict[str, Array]:
    """The inputs in the IOSpec's order and dtypes; only casts within a kind (float64 to float32) are made.

    Raises:
        DataError: an input is missing, holds no numbers or another kind of them, or the numbers of samples differ or are zero.
    """
    return _counted({item.name: _fitted(item, inputs) for item in model.record.iospec.inputs})


def _counted(arrays: dict[str, Array]) -> dict[str, Array]:
    counts = {name: len(value) if value.ndim else 0 for name, value in arrays.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise DataError("inputs must hold the same number of samples, at least one", found=counts)
    return arrays


def _fitted(item: TensorSpec, inputs: Tensors) -> Array:
    if item.name not in inputs:
        raise DataError(f"input {item.name!r} is missing", found=sorted(inputs), hint="name the inputs as in the artifact's IOSpec", subject=item.name)
    if item.dtype not in _DTYPES:
        raise DataError(f"input {item.name!r} holds no numbers", found=item.dtype, hint=_NO_TEXTS, subject=item.name)
    value = np.asarray(inputs[item.name])
    if not np.can_cast(value.dtype, np.dtype(item.dtype), casting="same_kind"):
        raise DataError(f"input {item.name!r} has another kind of numbers", found=value.dtype, allowed=item.dtype, subject=item.name)
    return np.ascontiguousarray(value, dtype=item.dtype)


def with_state(model: StoredArtifact, inputs: Tensors) -> dict[str, Array]:
    """The fitting inputs of a benchmark: a state that is left out starts at zero."""
    iospec = model.record.iospec
    given = dict(inputs)
    left_out = [name for name in iospec.state_inputs if name not in given]
    samples = max((len(value) for value in given.values() if np.ndim(value)), default=0)
    return fitting(model, given | {name: np.repeat(_zero_state(model, name), samples, axis=0) for name in left_out})


def in_sequence(model: StoredArtifact, inputs: Tensors) -> tuple[dict[str, Array], int]:
    """The inputs that `infer` runs, and the number of steps of a sequence; 0 where every sample stands alone.

    A model with state whose states are all left out takes sequences `(samples, steps, ...)`: they come back as `(samples * steps, ...)`, the steps of
    a sample in a row, with each state as one sample of zeros.

    Raises:
        DataError: see `fitting`; some states are given and others are not; an input has no axis of steps.
        UnsupportedModel: the model's batch is fixed to more than 1.
    """
    iospec = model.record.iospec
    given = [name for name in iospec.state_inputs if name in inputs]
    if not iospec.state or len(given) == len(iospec.state_inputs):
        return fitting(model, inputs), 0
    if given:
        missing = next(name for name in iospec.state_inputs if name not in inputs)
        raise DataError(
            f"the state {missing!r} is missing, while others are given",
            found=", ".join(given),
            allowed="all states, for one step; or none, for sequences that start at zero",
            subject=missing,
        )
    fitted = _counted({item.name: _fitted(item, inputs) for item in iospec.inputs if item.name in iospec.step_inputs})
    steps = {name: value.shape[1] if value.ndim > 1 else 0 for name, value in fitted.items()}
    for item in iospec.inputs:
        if item.shape and isinstance(item.shape[0], int) and item.shape[0] != 1:
            raise UnsupportedModel(
                f"sequences run with a batch of 1, and the input {item.name!r} has another", found=item.shape, allowed="1 or a symbol", subject=item.name
            )
        if item.name in fitted and fitted[item.name].ndim != len(item.shape) + 1:
            raise DataError(
                f"the input {item.name!r} of a model with state has no axis of steps",
                found=fitted[item.name].shape,
                allowed=("samples", "steps", *item.shape[1:]),
                hint=f"give sequences, or one step with every state: {', '.join(iospec.state_inputs)}",
                subject=item.name,
            )
    if len(set(steps.values())) != 1 or 0 in steps.values():
        raise DataError("inputs must hold the same number of steps, at least one", found=steps)
    flat = {name: value.reshape(-1, *value.shape[2:]) for name, value in fitted.items()}
    arrays = {item.name: flat[item.name] if item.name in flat else _zero_state(model, item.name) for item in iospec.inputs}
    return arrays, next(iter(steps.values()))


def out_of_sequence(outputs: dict[str, Array], steps: int) -> dict[str, Array]:
    """The answers to `in_sequence`, `(samples, steps, ...)`."""
    return {name: value.reshape(-1, steps, *value.shape[1:]) for name, value in outputs.items()} if steps else outputs


def _zero_state(model: StoredArtifact, name: str) -> Array:
    """One sample of zeros for an input."""
    item = next(item for item in model.record.iospec.inputs if item.name == name)
    if item.dtype not in _DTYPES:
        raise DataError(f"input {name!r} holds no numbers", found=item.dtype, hint=_NO_TEXTS, subject=name)
    return np.zeros((1, *item.sizes({**model.record.iospec.static_binding, str(item.shape[0]): 1})[1:]), dtype=item.dtype)


def fitting_request(request: BenchmarkRequest) -> dict[str, dict[str, Array]]:
    """The fitting inputs of every label in the schedule; a state that is left out starts at zero.

    Raises:
        ConfigError: the schedule is empty or names a label without a model or inputs.
        DataError: see `fitting`.
    """
    known = set(request.models) & set(request.inputs)
    unknown = sorted(set(request.schedule) - known)
    if unknown or not request.schedule:
        raise ConfigError("a schedule names labels that have a model and inputs", found=unknown or "an empty schedule", allowed=sorted(known))
    return {label: with_state(request.models[label], request.inputs[label]) for label in dict.fromkeys(request.schedule)}


def output_names(model: StoredArtifact, taps: Sequence[str]) -> list[str]:
    """What `infer` answers: the IOSpec's outputs, then the taps that are none."""
    outputs = [item.name for item in model.record.iospec.outputs]
    return [*outputs, *(tap for tap in taps if tap not in outputs)]


def tap(proto: Any, taps: Sequence[str]) -> None:
    """Make the tensors `taps` outputs of the ONNX model too.

    Raises:
        ModelError: a tap is not computed by any node of the graph.
    """
    import onnx

    computed = {name for node in proto.graph.node for name in node.output if name}
    present = {value.name for value in proto.graph.output}
    for name in taps:
        if name not in computed:
            raise ModelError(f"no node of the model computes a tensor called {name!r}", found=name, allowed=near_names(name, computed), subject=name)
        if name not in present:
            proto.graph.output.append(onnx.ValueInfoProto(name=name))
