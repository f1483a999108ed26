"""A histogram that grows with its data and gives the same counts however the data are cut into blocks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 2048
"""Bins on each side of zero."""

STATE_BYTES = 2 * BINS * 8
"""Memory that one histogram holds."""

_BLOCK = 1 << 18
_LEVELS_HALF, _LEVELS_FULL = 128, 256
_STRIDE = 16


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
