"""What the search reasons about: a candidate, and what one measurement of it said."""

from __future__ import annotations

import math

from edgekd.errors import ConfigError
from edgekd.records import Record, StudentSpec


class Candidate(Record, tag="edgekd.candidate/1", frozen=True, kw_only=True):
    """A member of a space with what is known before it is measured.

    `capacity` is a positive proxy of its accuracy at equal training (for example its number of multiply-accumulates);
    only its order counts. `features` are the numbers that the latency predictor sees (`edgekd.search.choice_features`);
    all candidates of one search have the same ones.
    """

    spec: StudentSpec
    capacity: float
    features: dict[str, float]

    def __post_init__(self) -> None:
        if not (math.isfinite(self.capacity) and self.capacity > 0):
            raise ConfigError("a candidate's capacity must be a positive number", found=self.capacity, subject=self.spec.label())
        bad = [name for name, value in self.features.items() if not math.isfinite(value)]
        if bad:
            raise ConfigError("a candidate's features must be finite", found=f"{bad[0]}={self.features[bad[0]]}", subject=self.spec.label())

    @property
    def label(self) -> str:
        """The short name of the spec, unique in a space."""
        return self.spec.label()


class Seen(Record, tag="edgekd.seen/1", frozen=True, kw_only=True):
    """One measurement of one candidate, in milliseconds, with its limits (one-sided 99 % at each end).

    `valid=False`: the device was disturbed, nothing is known, it may be measured again. `rejected` holds the reason why this
    candidate cannot be deployed at all. `precision` is the one that was measured.
    """

    latency_ms: float = 0.0
    lower_ms: float = 0.0
    upper_ms: float = 0.0
    valid: bool = True
    rejected: str = ""
    precision: str = ""

    def __post_init__(self) -> None:
        usable = self.valid and not self.rejected
        if usable and not (0.0 < self.lower_ms <= self.latency_ms <= self.upper_ms and math.isfinite(self.upper_ms)):
            raise ConfigError(
                "a valid measurement has a positive latency inside its limits",
                found=f"{self.latency_ms} ms in [{self.lower_ms}, {self.upper_ms}] ms",
                hint="mark it valid=False, or give the reason in rejected=",
            )


_Z = 2.326
"""The standard normal quantile at 0.99: limits on a logarithmic scale are read as mean -+ 2.326 standard errors."""


def standard_error(seen: Seen) -> float:
    """The standard error of log latency behind the limits, at least 0.0005 (0.05 %)."""
    return max(math.log(seen.upper_ms / seen.lower_ms) / (2 * _Z), 5e-4)


def merge(seen: list[Seen]) -> Seen:
    """One estimate from repeated valid measurements of a candidate, at its last measured precision.

    Interference only adds time, so repeats that are surely slower than the fastest one are dropped. The rest: mean of log
    latency weighted by inverse variance, its error widened by the Birge ratio where they disagree by more than their errors
    (R. T. Birge, Phys. Rev. 40:207, 1932). A repeat that is equal to the last digit comes from a cache and tells nothing new.
    """
    precision = seen[-1].precision
    distinct = list({(item.latency_ms, item.lower_ms, item.upper_ms): item for item in seen if item.precision == precision}.values())
    ceiling = min(item.upper_ms for item in distinct)
    kept = [item for item in distinct if item.lower_ms <= ceiling]
    if len(kept) == 1:
        return kept[0]
    weights = [standard_error(item) ** -2 for item in kept]
    logs = [math.log(item.latency_ms) for item in kept]
    total = sum(weights)
    mean = sum(weight * value for weight, value in zip(weights, logs, strict=True)) / total
    chi2 = sum(weight * (value - mean) ** 2 for weight, value in zip(weights, logs, strict=True))
    error = math.sqrt(max(1.0, chi2 / (len(kept) - 1)) / total)
    value = math.exp(mean)
    return Seen(latency_ms=value, lower_ms=value * math.exp(-_Z * error), upper_ms=value * math.exp(_Z * error), precision=precision)
