"""The numbers that compare one tensor with its reference: distance, layout, variation, top-1 agreement and saturation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]

SQNR_CAP_DB = 200.0
"""Stands for an error of zero; JSON has no infinity."""

FP16_MAX = 65504.0
"""The largest finite half-precision value (IEEE 754-2019, binary16)."""

_SCALE_FLOOR = 1e-6
"""A reference that is nearly zero everywhere is compared absolutely, with this scale."""

_MAX_PERMUTED_RANK = 5
_LEVELS = 255
_MAX_DISTINCT = 256
_MIN_DISTINCT = 3
_GRID_TOLERANCE = 0.02

_LAYOUT_NAMES = {
    (0, 2, 1): "NWC -> NCW",
    (0, 3, 1, 2): "NHWC -> NCHW",
    (0, 2, 3, 1): "NCHW -> NHWC",
    (0, 1, 3, 2): "NCWH -> NCHW",
    (0, 2, 1, 3): "NWHC -> NHWC",
    (0, 3, 2, 1): "NWHC -> NCHW",
    (0, 4, 1, 2, 3): "NDHWC -> NCDHW",
    (0, 2, 3, 4, 1): "NCDHW -> NDHWC",
}


@dataclass(frozen=True)
class Distance:
    """How far a tensor is from its reference: `max_rel` is a share of the reference's largest magnitude, `sqnr_db` decibel."""

    max_abs: float
    max_rel: float
    sqnr_db: float
    cosine: float


NO_DISTANCE = Distance(0.0, 0.0, -SQNR_CAP_DB, 0.0)
"""Stands for tensors that have no common elements."""


def distance_of(reference: Doubles, other: Doubles) -> Distance:
    """The distance over the elements that are finite in both; `max_rel` is relative to the reference's largest magnitude."""
    usable = np.isfinite(reference) & np.isfinite(other)
    left, right = reference[usable], other[usable]
    if left.size == 0:
        return NO_DISTANCE
    error = right - left
    max_abs = float(np.abs(error).max())
    scale = max(float(np.abs(left).max()), _SCALE_FLOOR)
    signal, noise, power = float(left @ left), float(error @ error), float(right @ right)
    if noise == 0:
        sqnr = SQNR_CAP_DB
    elif signal == 0:
        sqnr = -SQNR_CAP_DB
    else:
        sqnr = float(np.clip(10 * math.log10(signal / noise), -SQNR_CAP_DB, SQNR_CAP_DB))
    if signal == 0 or power == 0:
        cosine = 1.0 if signal == power else 0.0
    else:
        cosine = float(left @ right) / math.sqrt(signal) / math.sqrt(power)
    return Distance(max_abs, max_abs / scale, sqnr, cosine)


def varies(values: Doubles) -> bool:
    """Whether the samples (first axis) differ by more than rounding."""
    if values.ndim == 0 or len(values) < 2 or not np.isfinite(values).all():
        return False
    scale = max(float(np.abs(values).max()), _SCALE_FLOOR)
    return float(np.ptp(values, axis=0).max()) > 1e-6 * scale


def permutations(shape: tuple[int, ...], wanted: tuple[int, ...]) -> Iterable[tuple[int, ...]]:
    """Orders of the axes behind the first one that turn `shape` into `wanted`, the identity left out; up to rank 5."""
    if not 3 <= len(shape) <= _MAX_PERMUTED_RANK or len(shape) != len(wanted) or shape[0] != wanted[0]:
        return
    identity = tuple(range(1, len(shape)))
    for rest in itertools.permutations(identity):
        if rest != identity and tuple(shape[axis] for axis in rest) == wanted[1:]:
            yield (0, *rest)


def layout_name(order: tuple[int, ...]) -> str:
    """What transposing by `order` does, in names: `(0, 3, 1, 2)` is `NHWC -> NCHW`; an order without a name is told as it is."""
    return _LAYOUT_NAMES.get(order, f"axes {order}")


def nearest_order(reference: Doubles, other: Doubles) -> tuple[tuple[int, ...], Distance] | None:
    """The order of the axes of `other` that comes nearest to the reference, and the distance then; `None` where none fits its shape."""
    best: tuple[tuple[int, ...], Distance] | None = None
    for order in permutations(other.shape, reference.shape):
        distance = distance_of(reference, np.transpose(other, order))
        if best is None or distance.sqnr_db > best[1].sqnr_db:
            best = (order, distance)
    return best


def top1_agreement(reference: Doubles, other: Doubles, axis: int | None = None) -> float | None:
    """The share of samples whose largest value lies at the same index.

    `axis=None` takes the last axis of a tensor `(samples, classes)` with two classes or more, and gives `None` for any other shape: the
    largest value of an image or a single number is no class.
    """
    if reference.shape != other.shape or reference.size == 0:
        return None
    if axis is None:
        if reference.ndim != 2 or reference.shape[1] < 2:
            return None
        axis = -1
    return float((np.argmax(reference, axis=axis) == np.argmax(other, axis=axis)).mean())


@dataclass(frozen=True)
class Saturation:
    """`share` of the values at an end of the int8 range `low` to `high`; `clipped` of them all where the reference goes beyond it.

    `of_error`: the share of the squared error that the clipped values carry, 0 to 1.
    """

    share: float
    clipped: float
    of_error: float
    low: float
    high: float


def _grid(values: Doubles) -> tuple[float, float, float] | None:
    """Lowest value, highest value and step of values that lie on an int8 grid of at least three levels; `None` for others."""
    distinct = np.unique(values)
    if not _MIN_DISTINCT <= distinct.size <= _MAX_DISTINCT:
        return None
    low, high, step = float(distinct[0]), float(distinct[-1]), float(np.diff(distinct).min())
    places = (distinct - low) / step
    if high - low > (_LEVELS + 0.5) * step or np.abs(places - np.round(places)).max() > _GRID_TOLERANCE:
        return None
    return low, high, step


def saturation_of(reference: Doubles, other: Doubles, limits: tuple[float, float] | None = None) -> Saturation | None:
    """How much of `other` lies at the ends of its int8 range, `limits` in real values.

    `limits=None`: values that lie on a grid of at most 256 levels are taken as dequantized, their lowest and highest as the range; other
    values give `None`, as do tensors of different shapes. A value is clipped if it lies at an end and its reference is more than one
    step beyond.
    """
    if reference.shape != other.shape or other.size == 0 or not np.isfinite(other).all():
        return None
    if limits is None:
        found = _grid(other)
        if found is None:
            return None
        low, high, step = found
    else:
        low, high = limits
        step = (high - low) / _LEVELS
    if not step > 0:
        return None
    at_low, at_high = other <= low + 0.01 * step, other >= high - 0.01 * step
    clipped = (at_low & (reference < low - step)) | (at_high & (reference > high + step))
    error = np.where(np.isfinite(reference), other - reference, 0.0) ** 2
    total = float(error.sum())
    return Saturation(float((at_low | at_high).mean()), float(clipped.mean()), float(error[clipped].sum()) / total if total else 0.0, low, high)
