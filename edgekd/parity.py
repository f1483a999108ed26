"""Whether a model still computes the same after a hop of the road, per output tensor, with the tolerance that was used."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekd.contracts import Array, Tensors
from edgekd.errors import DataError, ParityRejected
from edgekd.records import HopParity, Precision, TensorParity

Doubles = NDArray[np.float64]

_SQNR_CAP_DB = 200.0
"""Stands for an error of zero; JSON has no infinity."""

_SCALE_FLOOR = 1e-6
"""A reference that is nearly zero everywhere is compared absolutely, with this scale."""

_UNIT_ROUNDOFF = {Precision.FP32: 2.0**-24, Precision.FP16: 2.0**-11}
_FLOAT_FACTOR = {Precision.FP32: 128.0, Precision.FP16: 8.0}
_INT8_BASE_DB, _INT8_FLOOR_DB, _SAME_FILE_BONUS_DB = 30.0, 10.0, 10.0
_MAX_PERMUTED_RANK = 5


@dataclass(frozen=True)
class Tolerance:
    """When two tensors count as equal.

    `kind` `relative`: the largest error is at most `value` times the largest magnitude of the reference.
    `kind` `sqnr`: signal to error is at least `value` decibel.
    """

    kind: str
    value: float


def tolerance_for(precision: Precision, depth: int = 50, *, same_file: bool = False) -> Tolerance:
    """The tolerance for a model of `depth` computing operators on its longest path.

    Float: factor * unit roundoff * sqrt(depth), of the reference's largest magnitude; the factor is 128 for fp32 (5e-5 at depth 50;
    six exported architectures showed at most 6e-6) and 8 for fp16. Rounding errors of independent operators add in quadrature.
    int8: SQNR of at least 30 dB - 5 log10(depth), never below 10 dB (21.5 dB at depth 50; static QDQ of six architectures showed
    31 to 44 dB). `same_file`: the same int8 file on two machines must agree 10 dB better, since only roundings differ.
    """
    depth = max(depth, 1)
    if precision is Precision.INT8:
        return Tolerance("sqnr", max(_INT8_FLOOR_DB, _INT8_BASE_DB - 5.0 * math.log10(depth)) + (_SAME_FILE_BONUS_DB if same_file else 0.0))
    return Tolerance("relative", _FLOAT_FACTOR[precision] * _UNIT_ROUNDOFF[precision] * math.sqrt(depth))


@dataclass(frozen=True)
class _Distance:
    max_abs: float
    max_rel: float
    sqnr_db: float
    cosine: float

    def within(self, tolerance: Tolerance) -> bool:
        return self.sqnr_db >= tolerance.value if tolerance.kind == "sqnr" else self.max_rel <= tolerance.value


def _distance(reference: Doubles, other: Doubles) -> _Distance:
    """The distance over the elements that are finite in both; `max_rel` is relative to the reference's largest magnitude."""
    usable = np.isfinite(reference) & np.isfinite(other)
    left, right = reference[usable], other[usable]
    if left.size == 0:
        return _Distance(0.0, 0.0, -_SQNR_CAP_DB, 0.0)
    error = right - left
    max_abs = float(np.abs(error).max())
    scale = max(float(np.abs(left).max()), _SCALE_FLOOR)
    signal, noise, power = float(left @ left), float(error @ error), float(right @ right)
    if noise == 0:
        sqnr = _SQNR_CAP_DB
    elif signal == 0:
        sqnr = -_SQNR_CAP_DB
    else:
        sqnr = float(np.clip(10 * math.log10(signal / noise), -_SQNR_CAP_DB, _SQNR_CAP_DB))
    if signal == 0 or power == 0:
        cosine = 1.0 if signal == power else 0.0
    else:
        cosine = float(left @ right) / math.sqrt(signal) / math.sqrt(power)
    return _Distance(max_abs, max_abs / scale, sqnr, cosine)


def _varies(values: Doubles) -> bool:
    """Whether the samples (first axis) differ by more than rounding."""
    if values.ndim == 0 or len(values) < 2 or not np.isfinite(values).all():
        return False
    scale = max(float(np.abs(values).max()), _SCALE_FLOOR)
    return float(np.ptp(values, axis=0).max()) > 1e-6 * scale


def _permutations(shape: tuple[int, ...], wanted: tuple[int, ...]) -> Iterable[tuple[int, ...]]:
    """Orders of the axes behind the first one that turn `shape` into `wanted`, the identity left out."""
    if not 3 <= len(shape) <= _MAX_PERMUTED_RANK or len(shape) != len(wanted) or shape[0] != wanted[0]:
        return
    identity = tuple(range(1, len(shape)))
    for rest in itertools.permutations(identity):
        if rest != identity and tuple(shape[axis] for axis in rest) == wanted[1:]:
            yield (0, *rest)


def _fits_transposed(reference: Doubles, other: Doubles, tolerance: Tolerance) -> tuple[tuple[int, ...], bool, _Distance] | None:
    """The axis order of `other` that comes nearest to the reference: order, whether it is equal then, distance."""
    best: tuple[tuple[int, ...], bool, _Distance] | None = None
    for order in _permutations(other.shape, reference.shape):
        distance = _distance(reference, np.transpose(other, order))
        if best is None or distance.sqnr_db > best[2].sqnr_db:
            best = (order, distance.within(tolerance), distance)
    return best


def compare_tensors(name: str, reference: Array, other: Array, tolerance: Tolerance) -> TensorParity:
    """How `other` compares with `reference`, both `(samples, ...)`.

    `max_rel` is relative to the largest magnitude of the reference; `tolerance` in the result is that ratio, or decibel for int8.
    Fails on NaN or Inf, on an output that is constant over the samples while the reference varies, on another shape. A permuted
    layout (NCHW against NHWC) is named, also where the shapes happen to be equal; the numbers are then those after transposing.
    """
    left, right = np.asarray(reference, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if left.shape != right.shape:
        found = _fits_transposed(left, right, tolerance)
        if found is None:
            return _failed(name, tolerance, f"shape {right.shape} instead of {left.shape}")
        order, equal, distance = found
        verdict = "the content is the same" if equal else "the content differs even then"
        return _result(name, tolerance, distance, reason=f"axes are permuted: shape {right.shape} instead of {left.shape}; transposed by {order}, {verdict}")
    distance = _distance(left, right)
    bad_left, bad_right = ~np.isfinite(left), ~np.isfinite(right)
    if bad_left.any() or bad_right.any():
        where = bad_right if bad_right.any() else bad_left
        whose = "" if bad_right.any() else " in the reference"
        sample = int(np.argwhere(where)[0][0]) if where.ndim else 0
        count = int(where.sum())
        return _result(name, tolerance, distance, nonfinite=count, reason=f"{count} values are NaN or Inf{whose}, the first in sample {sample}")
    constant = _varies(left) and not _varies(right)
    if constant:
        return _result(name, tolerance, distance, constant=True, reason="the output is the same for every sample, while the reference varies")
    if distance.within(tolerance):
        return _result(name, tolerance, distance, passed=True)
    found = _fits_transposed(left, right, tolerance)
    if found is not None and found[1]:
        return _result(name, tolerance, found[2], reason=f"the layout differs: transposed by {found[0]}, the content is the same")
    return _result(name, tolerance, distance, reason=_excess(distance, tolerance))


def _excess(distance: _Distance, tolerance: Tolerance) -> str:
    if tolerance.kind == "sqnr":
        return f"signal to error is {distance.sqnr_db:.1f} dB, at least {tolerance.value:.1f} dB is asked"
    return f"the largest error is {distance.max_rel:.2e} of the largest value, {tolerance.value:.2e} is allowed"


def _result(
    name: str, tolerance: Tolerance, distance: _Distance, *, passed: bool = False, nonfinite: int = 0, constant: bool = False, reason: str = ""
) -> TensorParity:
    return TensorParity(
        name=name,
        max_abs=distance.max_abs,
        max_rel=distance.max_rel,
        sqnr_db=distance.sqnr_db,
        cosine=distance.cosine,
        tolerance=tolerance.value,
        passed=passed,
        nonfinite=nonfinite,
        constant=constant,
        reason=reason,
        tolerance_kind=tolerance.kind,
    )


def _failed(name: str, tolerance: Tolerance, reason: str) -> TensorParity:
    return _result(name, tolerance, _Distance(0.0, 0.0, -_SQNR_CAP_DB, 0.0), reason=reason)


def compare_hop(
    hop: str,
    reference: Tensors,
    outputs: Tensors,
    *,
    precision: Precision,
    depth: int = 50,
    same_file: bool = False,
    agreement: float | None = None,
    tolerance: Tolerance | None = None,
) -> HopParity:
    """One hop compared on every output; `first_bad` names the first output that fails, in the reference's order.

    `tolerance=None` takes `tolerance_for(precision, depth, same_file=same_file)`. Missing and additional outputs fail by name; an output
    that holds what another one should is recognised.

    Raises:
        DataError: the reference is empty.
    """
    if not reference or any(np.asarray(array).size == 0 for array in reference.values()):
        raise DataError("there is nothing to compare", found={name: np.asarray(array).shape for name, array in reference.items()}, subject=hop)
    limit = tolerance or tolerance_for(precision, depth, same_file=same_file)
    rows = []
    for name, expected in reference.items():
        if name not in outputs:
            rows.append(_failed(name, limit, f"the output is missing; there are {', '.join(sorted(outputs)) or 'none'}"))
            continue
        row = compare_tensors(name, expected, outputs[name], limit)
        twin = None if row.passed else _holder(expected, name, outputs, limit)
        rows.append(row if twin is None else _with_reason(row, f"the output {twin!r} holds what {name!r} should: the outputs are swapped"))
    rows.extend(_failed(name, limit, "an output that the reference does not have") for name in outputs if name not in reference)
    first_bad = next((row.name for row in rows if not row.passed), "")
    samples = len(np.asarray(next(iter(reference.values()))))
    return HopParity(hop=hop, passed=not first_bad, samples=samples, tensors=tuple(rows), agreement=agreement, first_bad=first_bad)


def _holder(expected: Array, name: str, outputs: Tensors, tolerance: Tolerance) -> str | None:
    for other, values in outputs.items():
        if other != name and np.shape(values) == np.shape(expected) and compare_tensors(other, expected, values, tolerance).passed:
            return other
    return None


def _with_reason(row: TensorParity, reason: str) -> TensorParity:
    import msgspec

    return msgspec.structs.replace(row, reason=reason)


def first_bad_hop(hops: Iterable[HopParity]) -> HopParity | None:
    """The first hop that fails, in the order of the road; `None` if all pass."""
    return next((hop for hop in hops if not hop.passed), None)


def require_parity(hops: Iterable[HopParity]) -> None:
    """Raise for the first hop that fails.

    Raises:
        ParityRejected: names the hop, its first bad tensor and the reason; the subject is the `HopParity`.
    """
    bad = first_bad_hop(hops)
    if bad is not None:
        reason = next((row.reason for row in bad.tensors if row.name == bad.first_bad), "")
        raise ParityRejected(
            f"the model computes something else after {bad.hop}",
            found=f"{bad.first_bad}: {reason}",
            hint="`edgekd.parity_bisect.bisect` names the first tensor inside the model that differs",
            subject=bad,
        )


__all__ = ["Tolerance", "compare_hop", "compare_tensors", "first_bad_hop", "require_parity", "tolerance_for"]
