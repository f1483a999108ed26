"""Which named fault explains that two ways of running a model disagree: tried on the inputs, seen in the outputs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import msgspec
import numpy as np

from edgekd.contracts import Array, Tensors
from edgekd.errors import ConfigError, DataError
from edgekd.parity.compare import Tolerance, compare_hop, tolerance_for
from edgekd.parity.measures import FP16_MAX, permutations, saturation_of
from edgekd.records import HopParity, Precision, TensorParity, TensorSpec

Run = Callable[[Tensors], Mapping[str, Array]]
"""Named inputs `(samples, ...)` to named outputs."""

_MAX_ORDER_SAMPLES = 512
_SATURATED_SHARE = 0.5
_NAMED = re.compile(r"(mean|std)\s*[=:]\s*\[?\(?([-+.\deE,\s]+?)\)?\]?\s*(?=;|std|mean|$)")


class Fault(str, Enum):
    """Faults by name, in the order in which `diagnose` looks for them."""

    NOT_FINITE = "not finite"
    OVERFLOW = "fp16 overflow"
    CONSTANT = "constant output"
    SATURATED = "saturated int8"
    LAYOUT = "layout swapped"
    TWICE = "normalised twice"
    MISSING = "normalisation missing"
    SCALE = "input scale 255"
    CHANNELS = "channel order RGB/BGR"
    BATCH = "batch order"


@dataclass(frozen=True)
class Finding:
    """One fault that was found: `tensor` is the input or output it concerns, `text` says what agrees with what."""

    fault: Fault
    tensor: str
    text: str

    def __str__(self) -> str:
        return f"{self.fault.value}: {self.text}"


@dataclass(frozen=True)
class Diagnosis:
    """The comparison itself, and what explains it if it failed; a failed one without findings has a cause that is none of `Fault`."""

    parity: HopParity
    findings: tuple[Finding, ...]

    def faults(self) -> tuple[Fault, ...]:
        """The names of what was found, in order, each once."""
        return tuple(dict.fromkeys(finding.fault for finding in self.findings))

    def annotated(self) -> HopParity:
        """The comparison with the findings as texts, as the report shows it."""
        return msgspec.structs.replace(self.parity, findings=tuple(map(str, self.findings)))


@dataclass(frozen=True)
class Normalization:
    """`(x - mean) / std`, one value for all channels or one for each."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


_KNOWN = {
    "imagenet": Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "half": Normalization((0.5,), (0.5,)),
}
"""Means and deviations of pixels in 0..1 as torchvision's references and the usual CIFAR-10 recipes state them; `half` is -1..1."""


def parse_normalization(text: str) -> Normalization | None:
    """The mean and deviation that `TensorSpec.normalization` states; `None` for an empty text.

    Forms: a name (`imagenet`, `cifar10`, `half`), `mean=0.485,0.456,0.406 std=0.229,0.224,0.225`, or JSON `{"mean": [...], "std": [...]}`.

    Raises:
        ConfigError: it is none of these, or a deviation is not above zero.
    """
    if not text.strip():
        return None
    if text.strip().lower() in _KNOWN:
        return _KNOWN[text.strip().lower()]
    allowed = f"{', '.join(_KNOWN)}, mean=0.5,0.5,0.5 std=0.5,0.5,0.5, or JSON with mean and std"
    try:
        if text.lstrip().startswith("{"):
            fields = json.loads(text)
            mean, std = (tuple(float(value) for value in np.atleast_1d(fields[key])) for key in ("mean", "std"))
        else:
            found = {name: tuple(float(value) for value in re.split(r"[,\s]+", values.strip(" ,"))) for name, values in _NAMED.findall(text)}
            mean, std = found["mean"], found["std"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError("the normalization of an input cannot be read", found=text, allowed=allowed, hint="write mean and std per channel") from error
    if len(mean) != len(std) or not all(value > 0 for value in std):
        raise ConfigError("a normalization needs as many deviations as means, all above zero", found=text, allowed=allowed)
    return Normalization(mean, std)


def _channel_axis(array: Array, spec: TensorSpec | None, channels: int) -> int | None:
    """Where the channels lie: as the layout says, else the axis 1 or the last one, whichever has that many."""
    if spec is not None and "C" in spec.layout and len(spec.layout) == array.ndim:
        axis = spec.layout.index("C")
        return axis if array.shape[axis] == channels else None
    return next((axis for axis in (1, array.ndim - 1) if array.ndim > 1 and array.shape[axis] == channels), None)


def _spread(values: Sequence[float], array: Array, axis: int) -> Array:
    shape = [1] * array.ndim
    shape[axis] = len(values)
    return np.asarray(values, dtype=np.float64).reshape(shape)


def _normalizations(array: Array, spec: TensorSpec | None) -> Iterator[tuple[str, Array, Array]]:
    """What may have been applied: the recorded normalization, or the usual ones where none is recorded; name, mean, deviation."""
    recorded = parse_normalization(spec.normalization) if spec is not None else None
    choices = {"the recorded mean and deviation": recorded} if recorded is not None else {f"mean and deviation of {name!r}": _KNOWN[name] for name in _KNOWN}
    for name, norm in choices.items():
        axis = 0 if len(norm.mean) == 1 else _channel_axis(array, spec, len(norm.mean))
        if axis is None and recorded is not None:
            raise ConfigError("the normalization of an input has another number of channels", found=f"{len(norm.mean)} for shape {array.shape}")
        if axis is not None:
            yield name, _spread(norm.mean, array, axis), _spread(norm.std, array, axis)


def _altered(array: Array, spec: TensorSpec | None) -> Iterator[tuple[Fault, str, Array]]:
    """Every fault of one input that can be tried: the fault, what then agrees, and the input with the fault."""
    values = np.asarray(array, dtype=np.float64)
    for order in permutations(values.shape, values.shape):
        yield Fault.LAYOUT, f"the input transposed by {order}", np.transpose(values, order)
    if values.ndim >= 3:
        last = np.moveaxis(values, 1, -1)
        yield Fault.LAYOUT, "the input written channels last and read channels first", np.ascontiguousarray(last).reshape(values.shape)
        first = np.moveaxis(values, -1, 1)
        yield Fault.LAYOUT, "the input written channels first and read channels last", np.ascontiguousarray(first).reshape(values.shape)
    if np.issubdtype(array.dtype, np.floating):
        for name, mean, std in _normalizations(array, spec):
            yield Fault.TWICE, f"the input normalised once more, by {name}", (values - mean) / std
            yield Fault.MISSING, f"the input without its normalisation by {name}", values * std + mean
            yield Fault.MISSING, f"the input without its normalisation by {name}, as pixels of 0 to 255", (values * std + mean) * 255
        yield Fault.SCALE, "the input 255 times as large", values * 255
        yield Fault.SCALE, "the input 255 times as small", values / 255
    axis = _channel_axis(array, spec, 3)
    if axis is not None and values.ndim >= 3:
        yield Fault.CHANNELS, f"the input with its channels (axis {axis}) in reverse", np.flip(values, axis)


def _order(reference: Tensors, outputs: Mapping[str, Array]) -> Array | None:
    """The order of the reference's samples that the outputs come in, if it is another one; found on the first output that tells them apart."""
    for name, expected in reference.items():
        left = np.asarray(expected, dtype=np.float64).reshape(len(expected), -1)
        right = np.asarray(outputs[name], dtype=np.float64).reshape(len(left), -1)
        if not 2 <= len(left) <= _MAX_ORDER_SAMPLES or not np.isfinite(left).all() or not np.isfinite(right).all():
            continue
        far = (right**2).sum(1)[:, None] - 2 * right @ left.T + (left**2).sum(1)[None, :]
        order = far.argmin(1)
        if len(set(order.tolist())) == len(left) and not np.array_equal(order, np.arange(len(left))):
            return np.asarray(order)
    return None


def _seen(parity: HopParity, reference: Tensors, outputs: Mapping[str, Array], ranges: Mapping[str, tuple[float, float]], half: bool) -> Iterator[Finding]:
    """What the outputs themselves show."""
    for row in parity.tensors:
        if row.nonfinite:
            right = np.asarray(outputs[row.name], dtype=np.float64)
            overflow = "fp16 overflow" in row.reason or (half and bool(np.isinf(right).any()))
            yield Finding(Fault.OVERFLOW if overflow else Fault.NOT_FINITE, row.name, _overflowing(row, half) if overflow else row.reason)
    for row in parity.tensors:
        if row.constant:
            yield Finding(Fault.CONSTANT, row.name, row.reason)
    for row in parity.tensors:
        if not row.passed and row.name in reference and row.name in outputs:
            left, right = (np.asarray(values[row.name], dtype=np.float64) for values in (reference, outputs))
            found = saturation_of(left, right, ranges.get(row.name))
            if found is not None and found.clipped > 0 and found.of_error >= _SATURATED_SHARE:
                text = f"{found.clipped:.1%} of the values are clipped at an end of the range {found.low:.4g} to {found.high:.4g}"
                yield Finding(Fault.SATURATED, row.name, f"{text}: the calibration does not fit these inputs")
    for row in parity.tensors:
        if row.layout:
            yield Finding(Fault.LAYOUT, row.name, f"the outputs agree after {row.layout}")


def _overflowing(row: TensorParity, half: bool) -> str:
    return row.reason if "fp16 overflow" in row.reason or not half else f"{row.reason}; the model computes in fp16, whose values end at {FP16_MAX:.0f}"


def diagnose(
    reference_infer: Run,
    infer: Run,
    inputs: Tensors,
    *,
    specs: Sequence[TensorSpec] = (),
    precision: Precision = Precision.FP32,
    depth: int = 50,
    tolerance: Tolerance | None = None,
    limits: Mapping[str, tuple[float, float]] | None = None,
    hop: str = "reference -> deviant",
) -> Diagnosis:
    """The comparison of two ways of running one model on `inputs`, and the faults that explain it, in the order of `Fault`.

    A fault of an input is named if the deviant's outputs equal the reference's on inputs with that fault, within the tolerance
    (`tolerance_for(precision, depth)` unless given): alone, or on all inputs at once. The reference runs about ten times for each input.
    `specs` tell layout and normalization of the inputs by name; where none is recorded the usual ones are tried and named.
    `limits` are the int8 ranges of outputs, as in `compare_tensors`.

    Raises:
        DataError: there is no input, or nothing to compare.
        ConfigError: a recorded normalization cannot be read, or does not fit its input.
    """
    if not inputs:
        raise DataError("there is no input to diagnose with", hint="hand in a few real samples", subject=hop)
    limit = tolerance or tolerance_for(precision, depth)
    reference, outputs = reference_infer(inputs), infer(inputs)
    parity = compare_hop(hop, reference, outputs, precision=precision, tolerance=limit, limits=limits)
    if parity.passed:
        return Diagnosis(parity, ())
    findings = list(_seen(parity, reference, outputs, limits or {}, precision is Precision.FP16))
    comparable = all(name in outputs and np.shape(outputs[name]) == np.shape(value) for name, value in reference.items())
    if comparable and not any(row.nonfinite or row.constant for row in parity.tensors):
        findings += _tried(reference_infer, outputs, inputs, {spec.name: spec for spec in specs}, limit)
        order = _order(reference, outputs)
        if order is not None and _same({name: np.asarray(value)[order] for name, value in reference.items()}, outputs, limit):
            findings.append(Finding(Fault.BATCH, next(iter(reference)), f"the outputs agree in the order {_order_text(order)} of the samples"))
    ranks = list(Fault)
    return Diagnosis(parity, tuple(sorted(findings, key=lambda finding: ranks.index(finding.fault))))


def _tried(run: Run, outputs: Mapping[str, Array], inputs: Tensors, specs: Mapping[str, TensorSpec], limit: Tolerance) -> Iterator[Finding]:
    """The faults of inputs under which the reference gives the deviant's outputs: of one input, then of all."""
    made = {name: [(fault, text, other.astype(array.dtype)) for fault, text, other in _altered(array, specs.get(name))] for name, array in inputs.items()}
    for name, faults in made.items():
        for fault, text, other in faults:
            if not np.array_equal(other, inputs[name]) and _same(run({**inputs, name: other}), outputs, limit):
                yield Finding(fault, name, f"the outputs agree with those of {text}")
    if len(inputs) > 1:
        common = set.intersection(*({(fault, text) for fault, text, _ in faults} for faults in made.values()))
        for fault, text in sorted(common, key=lambda pair: (list(Fault).index(pair[0]), pair[1])):
            together = {name: next(other for *key, other in faults if tuple(key) == (fault, text)) for name, faults in made.items()}
            if _same(run(together), outputs, limit):
                yield Finding(fault, ", ".join(inputs), f"the outputs agree with those of {text}, at all inputs")


def _same(reference: Mapping[str, Array], outputs: Mapping[str, Array], limit: Tolerance) -> bool:
    finite = all(np.isfinite(np.asarray(value, dtype=np.float64)).all() for value in reference.values())
    return finite and compare_hop("tried", reference, outputs, precision=Precision.FP32, tolerance=limit).passed


def _order_text(order: Array) -> str:
    shown = ", ".join(map(str, order[:8].tolist()))
    if np.array_equal(order, np.arange(len(order))[::-1]):
        return "last to first"
    return f"{shown}{' ...' if len(order) > 8 else ''}"


__all__ = ["Diagnosis", "Fault", "Finding", "Normalization", "diagnose", "parse_normalization"]
