"""Learned ranges under the names of a file's tensors, found by comparing values: so a converter quantizes with what was trained."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from edgekd.artifact import StoredArtifact
from edgekd.contracts import Array, Infer, Tensors
from edgekd.errors import DataError, ModelError
from edgekd.quantize.calibrate import observe
from edgekd.quantize.qat.prepare import QatModule, point_values

_SAMPLES = 2
_TOLERANCE = 1e-3
"""Largest difference between a tensor of the file and one of the network, of its largest value: below a step of 8 bits, above float rounding."""


@dataclass(frozen=True)
class LearnedRanges:
    """Ranges for every tensor that the quantizer asks for: `ranges` goes into `ConvertRequest.ranges`.

    `learned` maps tensors of the file to the fake-quantized tensors whose range they took; `observed` are the others, which the trained network
    rounds nowhere, with the extremes that the inputs show.
    """

    ranges: dict[str, tuple[float, float]]
    learned: dict[str, str]
    observed: tuple[str, ...]


def learned_ranges(prepared: QatModule, artifact: StoredArtifact, infer: Infer, inputs: Tensors, *, memory_mb: int = 512) -> LearnedRanges:
    """The trained ranges for a float file that was made from `prepared.without_rounding()`: by `prepare-onnx`, or by `tflite-from-torch`.

    A tensor of the file takes the range of the fake-quantized tensor that has the same values on two inputs, channels first or last.
    `inputs` are real ones, in the order of the network's arguments, laid out as the file takes them (channels first).

    Raises:
        ModelError: the file does not say what to calibrate, or none of its tensors is one of the network's.
        DataError: there is no input, or a value is not finite.
    """
    if "tensors" not in artifact.record.metadata:
        raise ModelError("the file does not say what its quantizer asks for", found="no metadata `tensors`", hint="prepare an ONNX file with prepare-onnx")
    sizes: dict[str, int] = json.loads(artifact.record.metadata["tensors"])
    if not inputs or not all(len(array) for array in inputs.values()):
        raise DataError("finding the learned ranges needs real inputs", found=sorted(inputs), hint="give the calibration inputs")
    found = observe(infer, artifact, inputs, sizes, memory_mb=memory_mb).ranges("minmax")
    few = {name: array[:_SAMPLES] for name, array in inputs.items()}
    outputs = {tensor.name for tensor in artifact.record.iospec.outputs}
    computed = infer(artifact, few, [name for name in sizes if name not in few and name not in outputs])
    tensors = {**few, **computed}
    wanted = {name: [one.numpy() for one in values] for name, values in point_values(prepared, tuple(torch.as_tensor(few[name]) for name in few)).items()}
    ends, learned = prepared.ranges(), {}
    for name in sizes:
        point = next((point for point, values in wanted.items() if any(_same(tensors[name], value) for value in values)), None)
        if point is not None:
            learned[name] = point
    if not learned:
        raise ModelError(
            "no tensor of the file has the values of one of the network's",
            found=f"{len(sizes)} tensors in the file, {len(wanted)} in the network",
            hint="make the file from without_rounding() of this very network",
        )
    ranges = {name: ends[learned[name]] if name in learned else found[name] for name in sizes}
    return LearnedRanges(ranges, learned, tuple(name for name in sizes if name not in learned))


def _same(here: Array, there: Array) -> bool:
    bound = _TOLERANCE * max(float(np.abs(there).max()), 1e-6)
    return any(here.shape == view.shape and float(np.abs(here - view).max()) <= bound for view in _views(there))


def _views(array: Array) -> Iterator[Array]:
    yield array
    if array.ndim >= 3:
        yield np.moveaxis(array, 1, -1)
