"""What the measured candidates say about the latency of the others, and how wrong that is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edgekd.records import StudentSpec

Floats = NDArray[np.float64]

_LINEAR = (0.3, 3.0)
_BENDS = (0.02, 0.2, 1.0)
_SCALES = (0.5, 1.0, 2.0)
_NUGGETS = (0.005, 0.02, 0.06, 0.15)
"""The grid of the fit: weight of the straight and of the bent part (shares of the prior variance), length of the bends (in
standard deviations of the features), and standard deviation of what no feature explains (in log latency)."""

_STEPS = (8, 16)
"""Widths at which kernels are full on most CPUs; a choice's distance from them is a feature."""


def choice_features(specs: Sequence[StudentSpec], costs: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    """One dictionary of numbers per spec, all with the same names.

    Positive numeric choices enter as logarithms, integers of 4 and above also with how far they miss the next multiple of 8
    and 16 (share of the padded width); texts and booleans as 0 or 1 per value. `costs` adds positive quantities, for example
    `{"macs": [...], "params": [...]}`, in the order of the specs, as logarithms.
    """
    rows: list[dict[str, float]] = [{} for _ in specs]
    for name in sorted({key for spec in specs for key in spec.kwargs}):
        values = [spec.kwargs[name] for spec in specs]
        if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
            numbers = [float(value) for value in values]
            positive = min(numbers) > 0
            aligned = positive and max(numbers) >= 4 and all(isinstance(value, int) for value in values)
            for row, number in zip(rows, numbers, strict=True):
                row[name] = math.log(number) if positive else number
                for step in _STEPS if aligned else ():
                    row[f"{name}%{step}"] = 1.0 - number / (math.ceil(number / step) * step)
        else:
            for option in sorted({str(value) for value in values}):
                for row, value in zip(rows, values, strict=True):
                    row[f"{name}={option}"] = float(str(value) == option)
    for name, cost in costs.items():
        for row, value in zip(rows, cost, strict=True):
            row[f"log {name}"] = math.log(max(value, 1.0))
    return rows


class LatencyPredictor:
    """A Gaussian process on log latency: a straight line in the features, smooth bends, and a part that no feature explains.

    Rasmussen and Williams, Gaussian Processes for Machine Learning (2006): algorithm 2.1 for the fit, equation 5.12 for the
    predictions with one point left out. The kernel's settings are the best of a small grid by marginal likelihood. Matern
    3/2 bends (equation 4.17) follow steps better than the squared exponential. If the left-out errors are wider than
    predicted, all standard deviations are scaled up to match.
    """

    def __init__(self, features: Floats) -> None:
        spread = features.std(axis=0)
        used = spread > 1e-12
        self._x = (features[:, used] - features[:, used].mean(axis=0)) / spread[used]
        self._rows: list[int] = []
        self._left_out: Floats = np.empty(0)
        self._y: Floats = np.empty(0)

    def _kernels(self) -> tuple[Floats, Floats]:
        width = max(1, self._x.shape[1])
        line = self._x @ self._x.T / width
        squared = np.maximum(np.diag(line)[:, None] + np.diag(line)[None, :] - 2 * line, 0.0)
        return line, np.sqrt(squared)

    def fit(self, rows: Sequence[int], latency_ms: Sequence[float], errors: Sequence[float]) -> None:
        """Learn from the candidates at positions `rows`; `errors` are standard errors of log latency."""
        y = np.log(np.asarray(latency_ms, dtype=np.float64))
        self._rows, self._y, self._mean = list(rows), y, float(y.mean())
        centred = y - self._mean
        prior = max(float(centred.var()), 0.25)
        line, distance = self._kernels()
        picked = np.ix_(self._rows, self._rows)
        noise = np.asarray(errors, dtype=np.float64) ** 2
        best = -math.inf
        for weight in _LINEAR:
            for bend in _BENDS:
                for scale in _SCALES:
                    reach = math.sqrt(3) * distance / scale
                    whole = prior * (weight * line + bend * (1 + reach) * np.exp(-reach) + 0.1)
                    for nugget in _NUGGETS:
                        covariance = whole[picked] + np.diag(noise + nugget**2)
                        factor = np.linalg.cholesky(covariance)
                        solved = np.linalg.solve(factor.T, np.linalg.solve(factor, centred))
                        likelihood = -0.5 * float(centred @ solved) - float(np.log(np.diag(factor)).sum())
                        if likelihood > best:
                            best = likelihood
                            self._whole, self._nugget, self._factor, self._solved = whole, nugget, factor, solved
        inverse = np.linalg.solve(self._factor.T, np.linalg.solve(self._factor, np.eye(len(self._rows))))
        self._left_out = y - self._solved / np.diag(inverse)
        surprise = self._solved / np.sqrt(np.diag(inverse))
        self._inflation = max(1.0, float(np.sqrt(np.mean(surprise**2)))) if len(self._rows) >= 4 else 1.0

    def predict(self) -> tuple[Floats, Floats]:
        """Mean and standard deviation of the log latency (ms) of every candidate, measured or not; shapes `(candidates,)`."""
        cross = self._whole[:, self._rows]
        mean = self._mean + cross @ self._solved
        reduced = np.linalg.solve(self._factor, cross.T)
        variance = np.diag(self._whole) - (reduced**2).sum(axis=0) + self._nugget**2
        return mean, self._inflation * np.sqrt(np.maximum(variance, 1e-10))

    def held_out_error(self) -> float | None:
        """The median of |predicted / measured - 1|, each measured candidate predicted from the others; `None` below four."""
        if len(self._rows) < 4:
            return None
        return float(np.median(np.abs(np.exp(self._left_out - self._y) - 1.0)))
