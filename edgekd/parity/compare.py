"""Whether a model still computes the same after a hop of the road, per output tensor, with the tolerance that was used."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec
import numpy as np

from edgekd.contracts import Array, Tensors
from edgekd.errors import DataError, ParityRejected
from edgekd.parity.measures import (
    FP16_MAX,
    NO_DISTANCE,
    Distance,
    Doubles,
    Saturation,
    distance_of,
    layout_name,
    nearest_order,
    saturation_of,
    top1_agreement,
    varies,
)
from edgekd.records import HopParity, Precision, TensorParity

_UNIT_ROUNDOFF = {Precision.FP32: 2.0**-24, Precision.FP16: 2.0**-11}
_FLOAT_FACTOR = {Precision.FP32: 128.0, Precision.FP16: 8.0}
_INT8_BASE_DB, _INT8_FLOOR_DB, _SAME_FILE_BONUS_DB = 30.0, 10.0, 10.0
BASE_DEPTH = 50
"""Operators on the longest path that a tolerance is for where nothing is known; hops of the pipeline are held to no tighter one."""

_MIN_ERROR_SHARE = 0.5
"""Saturation is named as the cause where the clipped values carry at least half of the squared error."""


@dataclass(frozen=True)
class Tolerance:
    """When two tensors count as equal.

    `kind` `relative`: the largest error is at most `value` times the largest magnitude of the reference.
    `kind` `sqnr`: signal to error is at least `value` decibel.
    """

    kind: str
    value: float


def tolerance_for(precision: Precision, depth: int = BASE_DEPTH, *, same_file: bool = False) -> Tolerance:
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


def within(distance: Distance, tolerance: Tolerance) -> bool:
    """Whether two tensors count as equal."""
    return distance.sqnr_db >= tolerance.value if tolerance.kind == "sqnr" else distance.max_rel <= tolerance.value


def compare_tensors(
    name: str,
    reference: Array,
    other: Array,
    tolerance: Tolerance,
    *,
    limits: tuple[float, float] | None = None,
    class_axis: int | None = None,
) -> TensorParity:
    """How `other` compares with `reference`, both `(samples, ...)`.

    `max_rel` is relative to the largest magnitude of the reference; `tolerance` in the result is that ratio, or decibel for int8.
    Fails on NaN or Inf, on an output that is constant over the samples while the reference varies, on another shape. A permuted
    layout (NCHW against NHWC) is named, also where the shapes happen to be equal; the numbers are then those after transposing.

    `limits` is the int8 range of a dequantized tensor, in real values (`parity_graph.Graph.ranges`): saturation is then counted against
    it, else against the ends of the grid that the values lie on. `class_axis` is that of the classes for `top1`; `None` takes the last
    one of `(samples, classes)`.
    """
    left, right = np.asarray(reference, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if left.shape != right.shape:
        found = nearest_order(left, right)
        if found is None:
            return _failed(name, tolerance, f"shape {right.shape} instead of {left.shape}")
        order, distance = found
        verdict = f"the outputs agree after {layout_name(order)}: the layout was swapped" if within(distance, tolerance) else "the content differs even then"
        reason = f"axes are permuted: shape {right.shape} instead of {left.shape}; transposed by {order}, {verdict}"
        return _result(name, tolerance, distance, layout=layout_name(order) if within(distance, tolerance) else "", reason=reason)
    row = _result(name, tolerance, distance_of(left, right))
    bad_left, bad_right = ~np.isfinite(left), ~np.isfinite(right)
    if bad_left.any() or bad_right.any():
        return msgspec.structs.replace(row, nonfinite=int((bad_right if bad_right.any() else bad_left).sum()), reason=_not_finite(left, bad_left, bad_right))
    clipped = saturation_of(left, right, limits)
    row = msgspec.structs.replace(row, top1=top1_agreement(left, right, class_axis), saturation=None if clipped is None else clipped.share)
    if varies(left) and not varies(right):
        return msgspec.structs.replace(row, constant=True, reason="the output is the same for every sample, while the reference varies" + _stuck(clipped))
    if within(distance_of(left, right), tolerance):
        return msgspec.structs.replace(row, passed=True)
    found = nearest_order(left, right)
    if found is not None and within(found[1], tolerance):
        order, distance = found
        reason = f"the outputs agree after {layout_name(order)}: the layout was swapped, behind equal shapes (transposed by {order})"
        return _result(name, tolerance, distance, layout=layout_name(order), reason=reason)
    return msgspec.structs.replace(row, reason=_excess(row, tolerance) + _clipping(clipped))


def _not_finite(left: Doubles, bad_left: Doubles, bad_right: Doubles) -> str:
    """Which values are NaN or Inf, in whom, and whether half precision cannot hold what the reference has there."""
    where, whose = (bad_right, "") if bad_right.any() else (bad_left, " in the reference")
    sample = int(np.argwhere(where)[0][0]) if where.ndim else 0
    text = f"{int(where.sum())} values are NaN or Inf{whose}, the first in sample {sample}"
    beyond = np.abs(np.where(bad_left, 0.0, left))
    if bad_right.any() and float(beyond.max()) > FP16_MAX:
        text += f"; fp16 overflow: the reference reaches {float(beyond.max()):.3g}, fp16 ends at {FP16_MAX:.0f}"
    return text


def _stuck(found: Saturation | None) -> str:
    if found is None or found.share < _MIN_ERROR_SHARE:
        return ""
    return f"; saturated int8: {found.share:.1%} of the values lie at an end of the range {found.low:.4g} to {found.high:.4g}"


def _clipping(found: Saturation | None) -> str:
    if found is None or found.clipped == 0 or found.of_error < _MIN_ERROR_SHARE:
        return ""
    return (
        f"; saturated int8: {found.clipped:.1%} of the values are clipped at an end of the range {found.low:.4g} to {found.high:.4g}"
        f" and carry {found.of_error:.0%} of the squared error: the calibration does not fit these inputs"
    )


def _excess(row: TensorParity, tolerance: Tolerance) -> str:
    if tolerance.kind == "sqnr":
        return f"signal to error is {row.sqnr_db:.1f} dB, at least {tolerance.value:.1f} dB is asked"
    return f"the largest error is {row.max_rel:.2e} of the largest value, {tolerance.value:.2e} is allowed"


def _result(name: str, tolerance: Tolerance, distance: Distance, *, reason: str = "", layout: str = "") -> TensorParity:
    return TensorParity(
        name=name,
        max_abs=distance.max_abs,
        max_rel=distance.max_rel,
        sqnr_db=distance.sqnr_db,
        cosine=distance.cosine,
        tolerance=tolerance.value,
        passed=False,
        reason=reason,
        tolerance_kind=tolerance.kind,
        layout=layout,
    )


def _failed(name: str, tolerance: Tolerance, reason: str) -> TensorParity:
    return _result(name, tolerance, NO_DISTANCE, reason=reason)


def compare_hop(
    hop: str,
    reference: Tensors,
    outputs: Tensors,
    *,
    precision: Precision,
    depth: int = BASE_DEPTH,
    same_file: bool = False,
    agreement: float | None = None,
    tolerance: Tolerance | None = None,
    limits: Mapping[str, tuple[float, float]] | None = None,
    class_axes: Mapping[str, int] | None = None,
) -> HopParity:
    """One hop compared on every output; `first_bad` names the first output that fails, in the reference's order.

    `tolerance=None` takes `tolerance_for(precision, depth, same_file=same_file)`. Missing and additional outputs fail by name; an output
    that holds what another one should is recognised. `limits` and `class_axes` are those of `compare_tensors`, by output.

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
        row = compare_tensors(name, expected, outputs[name], limit, limits=(limits or {}).get(name), class_axis=(class_axes or {}).get(name))
        twin = None if row.passed else _holder(expected, name, outputs, limit)
        rows.append(row if twin is None else msgspec.structs.replace(row, reason=f"the output {twin!r} holds what {name!r} should: the outputs are swapped"))
    rows.extend(_failed(name, limit, "an output that the reference does not have") for name in outputs if name not in reference)
    first_bad = next((row.name for row in rows if not row.passed), "")
    samples = len(np.asarray(next(iter(reference.values()))))
    return HopParity(hop=hop, passed=not first_bad, samples=samples, tensors=tuple(rows), agreement=agreement, first_bad=first_bad)


def _holder(expected: Array, name: str, outputs: Tensors, tolerance: Tolerance) -> str | None:
    for other, values in outputs.items():
        if other != name and np.shape(values) == np.shape(expected) and compare_tensors(other, expected, values, tolerance).passed:
            return other
    return None


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
            hint="`edgekd.parity.bisection.bisect` names the first tensor inside the model that differs",
            subject=bad,
        )


__all__ = ["BASE_DEPTH", "Tolerance", "compare_hop", "compare_tensors", "first_bad_hop", "require_parity", "tolerance_for", "within"]
