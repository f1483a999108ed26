"""Activation ranges of a model on real inputs, observed on the target's runtime with a stated cap on memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgekd.artifact import StoredArtifact
from edgekd.contracts import CalibrationSet, Infer, Tensors
from edgekd.errors import ConfigError, DataError
from edgekd.identity.keys import array_hash
from edgekd.quantize.histogram import STATE_BYTES, Histogram

METHODS = ("minmax", "percentile", "entropy")
"""The calibration methods, the simplest first."""

_COPIES = 2
"""Copies of a tapped tensor that are alive at once: the runtime's answer and the one being counted."""


@dataclass(frozen=True)
class Statistics:
    """What was seen of every observed tensor; ranges by any method follow from it without running the model again."""

    tensors: Mapping[str, Histogram]
    samples: int

    def ranges(self, method: str, percentile: float = 99.99) -> dict[str, tuple[float, float]]:
        """Lowest and highest value to represent, per tensor, by `minmax`, `percentile` (per cent) or `entropy`.

        Raises:
            ConfigError: an unknown method, or a percentile outside (50, 100].
        """
        if method == "minmax":
            return {name: seen.minmax() for name, seen in self.tensors.items()}
        if method == "percentile":
            if not 50.0 < percentile <= 100.0:
                raise ConfigError("the calibration percentile is out of range", found=percentile, allowed="above 50, up to 100")
            return {name: seen.percentile(percentile) for name, seen in self.tensors.items()}
        if method == "entropy":
            return {name: seen.entropy() for name, seen in self.tensors.items()}
        raise ConfigError(f"there is no calibration method {method!r}", allowed=", ".join(METHODS))


def plan_taps(sizes: Mapping[str, int], samples: int, memory_bytes: int) -> tuple[tuple[tuple[str, ...], int], ...]:
    """Groups of tensors with the number of samples to run at once, so that what is held stays under `memory_bytes`.

    `sizes` are bytes per sample.

    Raises:
        ConfigError: one tensor of one sample is larger than the memory.
    """
    room = memory_bytes // _COPIES
    groups: list[tuple[tuple[str, ...], int]] = []
    group: list[str] = []
    held = 0
    for name, size in sizes.items():
        if size > room:
            raise ConfigError(
                f"the tensor {name!r} alone exceeds the calibration memory",
                found=f"{size * _COPIES / 1e6:.1f} MB",
                allowed=f"{memory_bytes / 1e6:.1f} MB",
                hint="raise quantize.memory_mb",
                subject=name,
            )
        if group and held + size > room:
            groups.append((tuple(group), max(1, min(samples, room // max(held, 1)))))
            group, held = [], 0
        group.append(name)
        held += size
    if group:
        groups.append((tuple(group), max(1, min(samples, room // max(held, 1)))))
    return tuple(groups)


def observe(infer: Infer, model: StoredArtifact, inputs: Tensors, sizes: Mapping[str, int], *, memory_mb: int = 512) -> Statistics:
    """Statistics of the tensors in `sizes` (elements per sample; -1: unknown, found out with one sample) over all `inputs`.

    Samples run through `infer` in blocks; histograms and tapped tensors together stay under `memory_mb` (10^6 bytes).

    Raises:
        DataError: an input or an activation is not finite, or there is no sample.
        ConfigError: the memory is too small for the model.
    """
    samples = _check_inputs(inputs)
    memory = memory_mb * 1_000_000 - STATE_BYTES * len(sizes)
    if memory <= 0:
        raise ConfigError(
            "the calibration memory does not hold the histograms",
            found=f"{memory_mb} MB",
            allowed=f"more than {STATE_BYTES * len(sizes) / 1e6:.1f} MB",
            hint="raise quantize.memory_mb",
        )
    seen = {name: Histogram() for name in sizes}
    known = {name: 4 * size for name, size in sizes.items() if name not in inputs and size >= 0}
    unknown = [name for name, size in sizes.items() if name not in inputs and size < 0]
    if unknown:
        first = infer(model, {name: array[:1] for name, array in inputs.items()}, unknown)
        known.update({name: first[name].nbytes for name in unknown})
    outputs = {tensor.name for tensor in model.record.iospec.outputs}
    for name in sizes:
        if name in inputs:
            seen[name].update(inputs[name])
    for group, chunk in plan_taps(known, samples, memory):
        taps = [name for name in group if name not in outputs]
        for start in range(0, samples, chunk):
            answer = infer(model, {name: array[start : start + chunk] for name, array in inputs.items()}, taps)
            for name in group:
                values = answer.pop(name)
                if not np.isfinite(values).all():
                    raise DataError(
                        f"the model's tensor {name!r} is not finite on calibration inputs {start} to {min(start + chunk, samples) - 1}",
                        hint="look at these inputs, and at the weights before this tensor",
                        subject=name,
                    )
                seen[name].update(values)
    return Statistics(seen, samples)


def _check_inputs(inputs: Tensors) -> int:
    counts = {name: len(array) for name, array in inputs.items()}
    if not counts or min(counts.values()) == 0:
        raise DataError("there is nothing to calibrate with", found=counts or "no input", hint="give at least one sample")
    if len(set(counts.values())) != 1:
        raise DataError("the inputs hold different numbers of samples", found=counts)
    for name, array in inputs.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            bad = int(np.argwhere(~np.isfinite(array))[0][0])
            raise DataError(f"the calibration input {name!r} is not finite", found=f"sample {bad}", hint="remove NaN and Inf from the data", subject=name)
    return next(iter(counts.values()))


def calibration_set(inputs: Tensors, *, split: str, indices: Sequence[int] = ()) -> CalibrationSet:
    """Inputs as a calibration set with the hash of their content.

    Raises:
        DataError: no sample, unequal counts, or values that are not finite.
    """
    _check_inputs(inputs)
    return CalibrationSet(inputs=dict(inputs), split=split, data_hash=array_hash(inputs), indices=tuple(int(index) for index in indices))
