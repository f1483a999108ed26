"""How often the latency verdict is wrong, on seeded draws: the figures in docs/verdicts.md.

    python benchmarks/verdict_rates.py

The rule of `edgekd.measuring.latency`, over many verdicts at once (the tests run the shipped functions on fewer). Launches are normal in the log
with a standard deviation of 2 %, independent or correlated with the one before.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
from numpy.typing import NDArray

from edgekd.measuring.latency import CONTENT, look_confidence
from edgekd.records import MeasurePlan
from edgekd.stats import normal_quantile, student_quantile, tolerance_factor

SD = 0.02
PLAN = MeasurePlan()
LOOKS = range(PLAN.launches, PLAN.max_launches + 1, PLAN.step)


def draws(replicates: int, correlation: float, seed: int) -> NDArray[np.float64]:
    """Standard normal launches `(replicates, max_launches)` with a lag-1 correlation."""
    x = np.random.default_rng(seed).normal(size=(replicates, PLAN.max_launches))
    for i in range(1, PLAN.max_launches):
        x[:, i] = correlation * x[:, i - 1] + math.sqrt(1.0 - correlation**2) * x[:, i]
    return x


def widening(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """What the half width of the mean grows by, per row; the row-wise form of `edgekd.stats.serial_mean_bounds`."""
    n = x.shape[1]
    centred = x - x.mean(axis=1, keepdims=True)
    r = (centred[:, :-1] * centred[:, 1:]).sum(axis=1) / (centred**2).sum(axis=1)
    r = np.clip(r + (1.0 + 4.0 * r) / n, 0.0, 0.95)
    wider: NDArray[np.float64] = np.sqrt((1.0 + r) / (1.0 - r))
    return wider


def rates(logs: NDArray[np.float64], *, widened: bool = True) -> tuple[float, float]:
    """Shares of pass and fail of the whole procedure; the limit is log 1 = 0."""
    confidence = look_confidence(PLAN)
    open_yet = np.ones(len(logs), dtype=bool)
    passed = failed = 0
    for n in LOOKS:
        x = logs[:, :n]
        mean, sd = x.mean(axis=1), x.std(axis=1, ddof=1)
        half = student_quantile(confidence, n - 1) * sd / math.sqrt(n) * (widening(x) if widened else 1.0)
        within = open_yet & (mean + tolerance_factor(n, CONTENT, confidence) * sd <= 0.0)
        above = open_yet & ~within & (mean - half > 0.0)
        passed, failed = passed + int(within.sum()), failed + int(above.sum())
        open_yet &= ~(within | above)
    return passed / len(logs), failed / len(logs)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=40000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print("| launches | k at a single look | k over all looks |\n|---|---|---|")
    for n in LOOKS:
        print(f"| {n} | {tolerance_factor(n):.2f} | {tolerance_factor(n, CONTENT, look_confidence(PLAN)):.2f} |")
    print(f"\n{given.replicates} verdicts per cell, seed {given.seed}\n")
    print("| lag-1 correlation | wrong fail | wrong fail, not widened | wrong pass | pass with the mean at the limit |\n|---|---|---|---|---|")
    for correlation in (0.0, 0.3, 0.6):
        x = SD * draws(given.replicates, correlation, given.seed)
        at_mean = rates(x)
        wrong_pass = rates(x - normal_quantile(CONTENT) * SD)[0]
        print(f"| {correlation} | {at_mean[1]:.2%} | {rates(x, widened=False)[1]:.2%} | {wrong_pass:.2%} | {at_mean[0]:.3%} |")


if __name__ == "__main__":
    main()
