"""Activation ranges of a model on real inputs, observed on the target's runtime with a stated cap on memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgekd.artifact import StoredArtifact
from edgekd.contracts import Array, CalibrationSet, Infer, Tensors
from edgekd.errors import ConfigError, DataError
from edgekd.identity.keys import array_hash
from edgekd.quantize.histogram import STATE_BYTES, Histogram

METHODS = ("minmax", "percentile", "entropy", "mse")
"""The calibration methods, the simplest first."""

_COPIES = 2
"""Copies of a tapped tensor that are alive at once: the runtime's answer and the one being counted."""


SUBSETS = 4
"""Disjoint parts of the calibration samples whose ranges are compared: sample i belongs to part i mod 4."""

STABILITY_LIMIT = 0.1
"""How far the ends of a range may lie from the middle of what the parts give, of its width, before there is a warning: 10 % are 0.8 dB of step size."""

_NAMED = 5


@dataclass(frozen=True)
class Stability:
    """How much ranges depend on which samples calibrate. `tensors` are the least stable ones, worst first, each with its half-width.

    The half-width of an end is half the distance from its lowest to its highest value over the parts, of the width of the range by all samples.
    """

    method: str
    subsets: int
    samples: int
    worst: float
    tensors: tuple[tuple[str, float], ...]

    @property
    def stable(self) -> bool:
        """Whether the worst half-width is within the limit."""
        return self.worst <= STABILITY_LIMIT

    def text(self) -> str:
        """One line for the ledger, a warning beyond the limit."""
        named = ", ".join(f"{name} {share:.1%}" for name, share in self.tensors)
        said = f"{self.method} ranges of {self.subsets} disjoint parts of {self.samples} calibration samples differ by at most ±{self.worst:.1%}"
        if self.stable:
            return f"{said}, within {STABILITY_LIMIT:.0%}; most: {named}"
        return f"warning: {said}, beyond {STABILITY_LIMIT:.0%}: {named}; raise quantize.calibration_size, or take another method"


@dataclass(frozen=True)
class Statistics:
    """What was seen of every observed tensor; ranges by any method follow from it without running the model again.

    `parts` hold the same values, apart by subset of the samples; a tensor that does not have one row for each sample is not in them.
    """

    tensors: Mapping[str, Histogram]
    samples: int
    parts: Mapping[str, tuple[Histogram, ...]] = field(default_factory=dict)

    def ranges(self, method: str, percentile: float = 99.99, *, symmetric: bool = False) -> dict[str, tuple[float, float]]:
        """Lowest and highest value to represent, per tensor, by `minmax`, `percentile` (per cent), `entropy` or `mse`.

        `symmetric` says what the scheme makes of a range, which `mse` asks for.

        Raises:
            ConfigError: an unknown method, or a percentile outside (50, 100].
        """
        return {name: _range(seen, method, percentile, symmetric) for name, seen in self.tensors.items()}

    def stability(self, method: str, percentile: float = 99.99, *, symmetric: bool = False) -> Stability | None:
        """How far the ranges of disjoint parts of the samples lie apart; `None` with fewer than two parts.

        Raises:
            ConfigError: as `ranges`.
        """
        spread: dict[str, float] = {}
        count = 0
        for name, parts in self.parts.items():
            low, high = _range(self.tensors[name], method, percentile, symmetric)
            count = len(parts)
            if count < 2 or high <= low:
                continue
            ends = np.array([_range(part, method, percentile, symmetric) for part in parts])
            spread[name] = float(np.ptp(ends, axis=0).max()) / 2.0 / (high - low)
        if count < 2:
            return None
        worst = sorted(spread.items(), key=lambda item: (-item[1], item[0]))[:_NAMED]
        return Stability(method, count, self.samples, worst[0][1] if worst else 0.0, tuple(worst))


def _range(seen: Histogram, method: str, percentile: float, symmetric: bool) -> tuple[float, float]:
    if method == "minmax":
        return seen.minmax()
    if method == "percentile":
        if not 50.0 < percentile <= 100.0:
            raise ConfigError("the calibration percentile is out of range", found=percentile, allowed="above 50, up to 100")
        return seen.percentile(percentile)
    if method == "entropy":
        return seen.entropy()
    if method == "mse":
        return seen.mse(symmetric=symmetric)
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

    Samples run through `infer` in blocks; histograms and tapped tensors together stay under `memory_mb` (10^6 bytes). Histograms are kept apart
    for `SUBSETS` disjoint parts of the samples, so that the same pass tells how stable the ranges are.

    Raises:
        DataError: an input or an activation is not finite, or there is no sample.
        ConfigError: the memory is too small for the model.
    """
    samples = _check_inputs(inputs)
    parts = min(SUBSETS, samples)
    state = STATE_BYTES * (parts + 1) * len(sizes)
    memory = memory_mb * 1_000_000 - state
    if memory <= 0:
        raise ConfigError(
            "the calibration memory does not hold the histograms",
            found=f"{memory_mb} MB",
            allowed=f"more than {state / 1e6:.1f} MB",
            hint="raise quantize.memory_mb",
        )
    seen = {name: _Apart(parts) for name in sizes}
    known = {name: 4 * size for name, size in sizes.items() if name not in inputs and size >= 0}
    unknown = [name for name, size in sizes.items() if name not in inputs and size < 0]
    if unknown:
        first = infer(model, {name: array[:1] for name, array in inputs.items()}, unknown)
        known.update({name: first[name].nbytes for name in unknown})
    outputs = {tensor.name for tensor in model.record.iospec.outputs}
    for name in sizes:
        if name in inputs:
            seen[name].update(inputs[name], 0, samples)
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
                seen[name].update(values, start, min(chunk, samples - start))
    whole = {name: Histogram.merged(one.parts) for name, one in seen.items()}
    return Statistics(whole, samples, {name: tuple(one.parts) for name, one in seen.items() if one.by_sample})


class _Apart:
    """One tensor's values, apart by the part that their sample belongs to."""

    def __init__(self, parts: int) -> None:
        self.parts = [Histogram() for _ in range(parts)]
        self.by_sample = True

    def update(self, values: Array, start: int, count: int) -> None:
        """Count the values of `count` samples from number `start` on; samples are the slowest axis."""
        if values.size % count:
            self.by_sample = False
            self.parts[0].update(values)
            return
        rows = values.reshape(count, -1)
        for number, part in enumerate(self.parts):
            part.update(rows[(number - start) % len(self.parts) :: len(self.parts)])


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
