"""What the runtimes refuse alike, with the same words: models of other formats, inputs that do not fit, schedules and taps of unknown names."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from edgekd.artifact import StoredArtifact
from edgekd.contracts import Array, BenchmarkRequest, Tensors
from edgekd.errors import ConfigError, DataError, ModelError, near_names
from edgekd.records import Artifact, Format, SupportReport

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
    fitting = {}
    for item in model.record.iospec.inputs:
        if item.name not in inputs:
            raise DataError(f"input {item.name!r} is missing", found=sorted(inputs), hint="name the inputs as in the artifact's IOSpec", subject=item.name)
        if item.dtype not in _DTYPES:
            raise DataError(f"input {item.name!r} holds no numbers", found=item.dtype, hint=_NO_TEXTS, subject=item.name)
        value = np.asarray(inputs[item.name])
        if not np.can_cast(value.dtype, np.dtype(item.dtype), casting="same_kind"):
            raise DataError(f"input {item.name!r} has another kind of numbers", found=value.dtype, allowed=item.dtype, subject=item.name)
        fitting[item.name] = np.ascontiguousarray(value, dtype=item.dtype)
    counts = {name: len(value) if value.ndim else 0 for name, value in fitting.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise DataError("inputs must hold the same number of samples, at least one", found=counts)
    return fitting


def fitting_request(request: BenchmarkRequest) -> dict[str, dict[str, Array]]:
    """The fitting inputs of every label in the schedule.

    Raises:
        ConfigError: the schedule is empty or names a label without a model or inputs.
        DataError: see `fitting`.
    """
    known = set(request.models) & set(request.inputs)
    unknown = sorted(set(request.schedule) - known)
    if unknown or not request.schedule:
        raise ConfigError("a schedule names labels that have a model and inputs", found=unknown or "an empty schedule", allowed=sorted(known))
    return {label: fitting(request.models[label], request.inputs[label]) for label in dict.fromkeys(request.schedule)}


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
