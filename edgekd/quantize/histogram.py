"""A histogram that grows with its data and gives the same counts however the data are cut into blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 2048
"""Bins on each side of zero."""

STATE_BYTES = 2 * BINS * 8
"""Memory that one histogram holds."""

_BLOCK = 1 << 16
_LEVELS_HALF, _LEVELS_FULL = 128, 256
_STRIDE = 16
_ROUNDS, _SETTLED = 3, 1e-3
_GRID, _REFINED = 2.0**0.125, 16


class Histogram:
    """Extremes and counts of one tensor's values.

    The bins divide (-2^e, 2^e) evenly, with e the smallest integer that holds all values. When e grows, bins are merged in groups of a
    power of two, which is exact; so the counts do not depend on the order or size of the updates.
    """

    def __init__(self) -> None:
        self.low = math.inf
        self.high = -math.inf
        self.size = 0
        self.zeros = 0
        self._exponent: int | None = None
        self._counts: NDArray[np.int64] = np.zeros(2 * BINS, dtype=np.int64)

    def update(self, values: NDArray[Any]) -> None:
        """Count `values`, which must be finite."""
        flat = values.reshape(-1)
        if flat.size == 0:
            return
        low, high = float(flat.min()), float(flat.max())
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.size += flat.size
        bound = max(abs(low), abs(high))
        if bound > 0:
            self._grow(math.frexp(bound)[1])
        for start in range(0, flat.size, _BLOCK):
            block = flat[start : start + _BLOCK]
            nonzero = block[block != 0]
            self.zeros += block.size - nonzero.size
            if nonzero.size and self._exponent is not None:
                scaled = np.floor(np.ldexp(nonzero.astype(np.float64), -self._exponent) * BINS).astype(np.int64) + BINS
                self._counts += np.bincount(scaled, minlength=2 * BINS)

    def _grow(self, exponent: int) -> None:
        if self._exponent is None:
            self._exponent = exponent
        elif exponent > self._exponent:
            shift = min(exponent - self._exponent, 31)
            merged = np.zeros_like(self._counts)
            np.add.at(merged, (np.arange(-BINS, BINS) >> shift) + BINS, self._counts)
            self._counts, self._exponent = merged, exponent

    def _width(self) -> float:
        return math.ldexp(1.0, self._exponent or 0) / BINS

    @classmethod
    def merged(cls, parts: Iterable[Histogram]) -> Histogram:
        """What one histogram of all values would be: the bins of every part are widened to the widest, which is exact."""
        made = cls()
        for part in parts:
            made.low, made.high = min(made.low, part.low), max(made.high, part.high)
            made.size += part.size
            made.zeros += part.zeros
            if part._exponent is None:
                continue
            made._grow(part._exponent)
            shift = min((made._exponent or 0) - part._exponent, 31)
            np.add.at(made._counts, (np.arange(-BINS, BINS) >> shift) + BINS, part._counts)
        return made

    def minmax(self) -> tuple[float, float]:
        """The smallest and the largest value."""
        return self.low, self.high

    def percentile(self, percentile: float) -> tuple[float, float]:
        """The range that holds `percentile` per cent of the values, the same share cut from both sides (from one if all have one sign).

        Rounded outwards to a bin's edge, never beyond the extremes.
        """
        cut = (1.0 - percentile / 100.0) * self.size
        low_cut, high_cut = (0.0, cut) if self.low >= 0 else (cut, 0.0) if self.high <= 0 else (cut / 2, cut / 2)
        counts = self._counts.copy()
        counts[BINS] += self.zeros
        below = np.cumsum(counts)
        above = np.cumsum(counts[::-1])
        first = int(np.searchsorted(below, low_cut, side="right"))
        last = 2 * BINS - 1 - int(np.searchsorted(above, high_cut, side="right"))
        width = self._width()
        return max(self.low, (first - BINS) * width), min(self.high, (last + 1 - BINS) * width)

    def mse(self, *, symmetric: bool) -> tuple[float, float]:
        """The range whose 8-bit version has the least expected squared error, rounding and clipping together.

        `symmetric`: zero point 0 and the same bound on both sides, 127 steps each; else 255 steps between two ends of their own. Source: M. Nagel
        et al., "A White Paper on Neural Network Quantization", arXiv:2106.08295, section 3.1. Values are taken to lie evenly within their bin,
        so that the error is exact for the histogram. Both ends shrink together first, then each by itself, until neither moves the error by a thousandth.
        """
        used = np.flatnonzero(self._counts)
        if not used.size:
            return self.minmax()
        widest = (max(0, BINS - int(used[0])), max(0, int(used[-1]) + 1 - BINS))
        error = _SquaredError(self._counts, self._width())
        if symmetric:
            bins, _ = _least(max(widest), lambda bins: error.symmetric(min(bins * self._width(), max(-self.low, self.high))))
            return self._ends((bins, bins))

        def cost(ends: tuple[int, int]) -> float:
            return error.asymmetric(*self._ends(ends))

        best, least = widest, cost(widest)
        if all(widest):
            part, least = _least(max(widest), lambda part: cost(_shrunk(widest, part)))
            best = _shrunk(widest, part)
        for _ in range(_ROUNDS):
            before = least
            for side in (0, 1):
                if widest[side]:
                    best, least = _moved(best, side, widest[side], cost)
            if least >= before * (1.0 - _SETTLED):
                break
        return self._ends(best)

    def _ends(self, ends: tuple[int, int]) -> tuple[float, float]:
        """The range of so many bins below and above zero, never beyond the extremes."""
        return max(self.low, -ends[0] * self._width()), min(self.high, ends[1] * self._width())

    def entropy(self) -> tuple[float, float]:
        """The range whose 8-bit version diverges least (Kullback-Leibler) from the values' distribution.

        Source: S. Migacz, "8-bit inference with TensorRT", GTC 2017: thresholds on |x|, what lies beyond counts in the last bin. Exact
        zeros, which every scheme represents exactly, are left out. One-sided tensors have 256 levels, others 128 for each sign.
        """
        positive = self._counts[BINS:]
        one_sided = self.low >= 0 or self.high <= 0
        magnitudes = positive if self.low >= 0 else self._counts[:BINS][::-1] if self.high <= 0 else positive + self._counts[:BINS][::-1]
        levels = _LEVELS_FULL if one_sided else _LEVELS_HALF
        used = int(np.flatnonzero(magnitudes)[-1]) + 1 if magnitudes.any() else 0
        if used <= levels:
            return self.minmax()
        best, threshold = math.inf, used
        for stop in [*range(levels, used, _STRIDE), used]:
            divergence = _divergence(magnitudes, stop, levels)
            if divergence < best:
                best, threshold = divergence, stop
        bound = threshold * self._width()
        return max(self.low, -bound), min(self.high, bound)


def _divergence(magnitudes: NDArray[np.int64], stop: int, levels: int) -> float:
    """KL(P || Q) in nats: P is the clipped distribution of the first `stop` bins, Q its version with `levels` levels."""
    inside = magnitudes[:stop].astype(np.float64)
    reference = inside.copy()
    reference[-1] += float(magnitudes[stop:].sum())
    edges = np.linspace(0, stop, levels + 1).astype(np.int64)[:-1]
    occupied = (inside > 0).astype(np.float64)
    totals, members = np.add.reduceat(inside, edges), np.add.reduceat(occupied, edges)
    mean = np.divide(totals, members, out=np.zeros_like(totals), where=members > 0)
    quantized = np.repeat(mean, np.diff(np.append(edges, stop))) * occupied
    if not reference.sum() or not quantized.sum():
        return math.inf
    p, q = reference / reference.sum(), quantized / quantized.sum()
    seen = p > 0
    q = np.where(seen & (q == 0), 1e-12, q)
    return float(np.sum(p[seen] * np.log(p[seen] / q[seen])))


class _SquaredError:
    """The sum of squared errors that 8 bits make of a histogram whose values lie evenly within their bins."""

    def __init__(self, counts: NDArray[np.int64], width: float) -> None:
        held = np.flatnonzero(counts)
        first, last = int(held[0]), int(held[-1]) + 1
        self._edges = (np.arange(first, last + 1) - BINS) * width
        self._density = counts[first:last] / width

    def symmetric(self, bound: float) -> float:
        """With the range -bound to bound and the zero point 0."""
        return self._total(bound / 127.0, -127, 127)

    def asymmetric(self, low: float, high: float) -> float:
        """With 255 steps from low to high, or to zero if that lies outside, moved so that zero is a step."""
        low, high = min(low, 0.0), max(high, 0.0)
        step = (high - low) / 255.0
        zero = round(-low / step)
        return self._total(step, -zero, 255 - zero)

    def _total(self, step: float, least: int, most: int) -> float:
        """The error's integral over each bin: from zero on, a whole step gives a twelfth of its cube, the rest a third of the offset's cube."""
        places = self._edges / step
        nearest = np.clip(np.rint(places), least, most)
        integral = nearest / 12.0 + (places - nearest) ** 3 / 3.0
        return float(np.dot(self._density, np.diff(integral))) * step**3


def _shrunk(ends: tuple[int, int], part: int) -> tuple[int, int]:
    """Both ends by the same share, to `part` bins of the longer one; at least one bin each."""
    return max(1, ends[0] * part // max(ends)), max(1, ends[1] * part // max(ends))


def _moved(ends: tuple[int, int], side: int, widest: int, cost: Callable[[tuple[int, int]], float]) -> tuple[tuple[int, int], float]:
    """The best ends that differ on one side at most, and their cost; that of `ends` if none is better."""

    def at(bins: int) -> tuple[int, int]:
        return (bins, ends[1]) if side == 0 else (ends[0], bins)

    bins, found = _least(widest, lambda bins: cost(at(bins)))
    before = cost(ends)
    return (at(bins), found) if found < before else (ends, before)


def _least(widest: int, cost: Callable[[int], float]) -> tuple[int, float]:
    """The number of bins up to `widest` of least cost, and that cost; the larger one of equals.

    A grid of constant ratio covers every magnitude, then 16 steps the neighbourhood of the best.
    """
    grid = sorted({max(1, round(widest / _GRID**power)) for power in range(math.ceil(math.log(widest, _GRID)) + 1)}, reverse=True)
    costs = {bins: cost(bins) for bins in grid}
    at = grid.index(min(grid, key=lambda bins: costs[bins]))
    lower, upper = grid[min(at + 1, len(grid) - 1)], grid[max(at - 1, 0)]
    near = {lower + (upper - lower) * number // _REFINED for number in range(_REFINED + 1)}
    costs |= {bins: cost(bins) for bins in near - costs.keys()}
    best = min(sorted(costs, reverse=True), key=lambda bins: costs[bins])
    return best, costs[best]
