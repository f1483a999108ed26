"""Whether a model with its processing inside computes what the model gives on processed inputs, behind the same processing in plain numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.contracts import Array, Tensors
from edgekd.errors import ConversionRejected
from edgekd.models.onnx_file import depth_of, first_line, require_onnx, write_model
from edgekd.models.onnx_processing import Step
from edgekd.parity.compare import BASE_DEPTH, Tolerance, compare_hop, compare_tensors, tolerance_for
from edgekd.records import HopParity, InputProcessing, OutputProcessing, Precision

_EXACT = Tolerance("relative", 0.0)
"""What whole numbers, and boxes that are only chosen, are held to: both sides choose by the same values."""


@dataclass(frozen=True)
class BuiltIn:
    """What was built into a file: the inputs that it normalises, each with its axis of channels; the tensor in it that each output of the
    network is; the steps behind them."""

    inputs: Mapping[str, tuple[InputProcessing, int]]
    origins: Mapping[str, str]
    steps: tuple[Step, ...]


def compare_processed(hop: str, source: Path, made: Any, built: BuiltIn, inputs: Tensors, precision: Precision, folder: Path) -> HopParity:
    """The hop from the ONNX file `source` to the `onnx.ModelProto` `made`, which holds its processing, on raw inputs `(samples, ...)`.

    Two things are compared: each output of the network with the same tensor in `made`, where the source is given inputs that numpy normalised;
    and what each step makes in `made` with what numpy makes of the tensors that the step reads there. Classes and boxes that are chosen must
    be the same, everything else within the tolerance of `precision`. Both files run with ONNX Runtime in this process; `folder` is for files.

    Raises:
        ConversionRejected: one of them does not run. DataError: there is nothing to compare. MissingDependency: onnxruntime is not installed.
    """
    onnx = require_onnx("comparing an ONNX model")
    tapped = onnx.ModelProto()
    tapped.CopyFrom(made)
    present = {item.name for item in tapped.graph.output}
    wanted = dict.fromkeys((*built.origins.values(), *(name for step in built.steps for name in (*step.reads, step.made))))
    tapped.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in present)
    write_model(tapped, folder, "tapped.onnx")
    before = _outputs(source, {name: normalised(array, *built.inputs[name]) if name in built.inputs else array for name, array in inputs.items()})
    after = _outputs(folder / "tapped.onnx", inputs)
    half = any(inputs[name].dtype == np.float16 for name in built.inputs)
    held_to = Precision.FP16 if half and precision is Precision.FP32 else precision
    raw = compare_hop(
        hop,
        {made_name: _stacked(before[name]) for name, made_name in built.origins.items()},
        {name: _stacked(after[name]) for name in built.origins.values()},
        precision=held_to,
        depth=max(depth_of(made), BASE_DEPTH),
        same_file=True,
    )
    rows = list(raw.tensors)
    for step in built.steps:
        expected = [processed_output(step.part, read) for read in zip(*(after[name] for name in step.reads), strict=True)]
        found = _stacked(after[step.made])
        chosen = step.part.kind in ("argmax", "nms")
        tolerance = _EXACT if chosen else tolerance_for(Precision.FP16 if found.dtype == np.float16 else Precision.FP32)
        rows.append(compare_tensors(step.made, _stacked(expected), found, tolerance))
    first_bad = next((row.name for row in rows if not row.passed), "")
    return HopParity(hop=hop, passed=not first_bad, samples=len(next(iter(inputs.values()))), tensors=tuple(rows), first_bad=first_bad)


def normalised(array: Array, part: InputProcessing, axis: int) -> Array:
    """`(x * scale - mean) / std`, channels along `axis`, in the type of the raw values."""
    shape = [1] * array.ndim
    shape[axis] = len(part.mean)
    mean, std = (np.asarray(values, dtype=np.float64).reshape(shape) for values in (part.mean, part.std))
    made: Array = ((array.astype(np.float64) * part.scale - mean) / std).astype(array.dtype)
    return made


def processed_output(part: OutputProcessing, read: Sequence[Array]) -> Array:
    """What a step makes of the tensors that it reads, those of one inference."""
    if part.kind == "nms":
        return suppressed(read[0], read[1], part)
    values = read[0]
    if part.kind == "argmax":
        return np.asarray(values.argmax(part.axis))
    wide = values.astype(np.float64)
    if part.kind == "sigmoid":
        return np.asarray(0.5 * (1.0 + np.tanh(0.5 * wide)))
    raised = np.exp(wide - wide.max(part.axis, keepdims=True))
    return np.asarray(raised / raised.sum(part.axis, keepdims=True))


def suppressed(boxes: Array, scores: Array, part: OutputProcessing) -> Array:
    """The best boxes `(1, max_detections, 6)` of boxes `(1, n, 4)` and scores `(1, n, c)` or `(1, c, n)`: greedy, class by class.

    In float32 and in the order of NonMaxSuppression of the ONNX operator set, so that the same boxes are chosen at the thresholds too.
    """
    most = part.max_detections
    by_class = scores[0].T if scores.shape[1] == boxes.shape[1] else scores[0]
    low, high = _corners(boxes[0], part.centered)
    area = np.prod(high - low, axis=1, dtype=np.float32)
    rows = []
    for kind, values in enumerate(by_class):
        kept: list[int] = []
        for index in np.argsort(-values, kind="stable"):
            if values[index] <= np.float32(part.score_threshold) or len(kept) == most:
                break
            if not kept or not np.any(_overlaps(low, high, area, int(index), kept) > np.float32(part.iou_threshold)):
                kept.append(int(index))
        rows += [[*boxes[0, index], values[index], kind] for index in kept]
    rows.sort(key=lambda row: -row[4])
    rows += [[0, 0, 0, 0, 0, -1]] * (most - len(rows))
    return np.asarray(rows[:most], dtype=np.float32)[None]


def _corners(boxes: Array, centered: bool) -> tuple[Array, Array]:
    if centered:
        half = boxes[:, 2:] / np.float32(2)
        return boxes[:, :2] - half, boxes[:, :2] + half
    return np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])


def _overlaps(low: Array, high: Array, area: Array, index: int, others: Sequence[int]) -> Array:
    """Intersection over union of one box with others, 0 where one of them is empty."""
    sides = np.maximum(np.minimum(high[index], high[others]) - np.maximum(low[index], low[others]), np.float32(0))
    common = sides[:, 0] * sides[:, 1]
    union = area[index] + area[others] - common
    usable = (area[index] > 0) & (area[others] > 0) & (union > 0) & (common > 0)
    return np.where(usable, common / np.where(usable, union, np.float32(1)), np.float32(0))


def _outputs(path: Path, inputs: Tensors) -> dict[str, list[Array]]:
    """What a file gives, inference by inference; a fixed batch of more than one is filled up with the last sample."""
    from edgekd.teachers import ort_errors, ort_session

    found: dict[str, list[Array]] = {}
    try:
        session = ort_session(path, purpose="comparing a file that holds its processing", log_level=4)
        wanted = session.get_inputs()
        step = max((item.shape[0] for item in wanted if item.shape and isinstance(item.shape[0], int)), default=1)
        count = len(next(iter(inputs.values())))
        for start in range(0, count, step):
            rows = np.minimum(np.arange(start, start + step), count - 1)
            for item, value in zip(session.get_outputs(), session.run(None, {item.name: inputs[item.name][rows] for item in wanted}), strict=True):
                found.setdefault(item.name, []).append(np.asarray(value))
    except ort_errors() as error:
        raise ConversionRejected(
            "a model with processing inside is compared with the model without, and one of the two does not run",
            found=first_line(error),
            hint='write where = "outside", or export the model anew',
            subject=path.name,
        ) from error
    return found


def _stacked(parts: Sequence[Array]) -> Array:
    """The outputs of all inferences, `(inferences, ...)`; those whose size differs one behind the other."""
    same = len({part.shape for part in parts}) == 1
    return np.stack(parts) if same else np.concatenate([part.reshape(-1) for part in parts])
