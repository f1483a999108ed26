"""What a search says when nothing meets the limit: the fastest that was found, and what would fit."""

from __future__ import annotations

from edgekd.records import Record
from edgekd.records.measure import NonNegativeFloat
from edgekd.records.model import NonNegative


class Infeasible(Record, tag="edgekd.infeasible/1", frozen=True, kw_only=True):
    """The certificate that a latency limit is out of reach, as far as it was measured.

    `proven`: the lower 99 % bound of the fastest measured candidate is above `limit_ms`. Otherwise candidates came near the
    limit but none stayed surely below it, or nothing could be measured (`fastest` is empty); `reason` tells which.
    `would_fit_ms` is the nearest limit that the fastest one meets with the search's headroom.
    """

    limit_ms: float
    proven: bool
    fastest: str = ""
    precision: str = ""
    latency_ms: NonNegativeFloat | None = None
    lower_ms: NonNegativeFloat | None = None
    upper_ms: NonNegativeFloat | None = None
    would_fit_ms: NonNegativeFloat | None = None
    measured: NonNegative = 0
    reason: str = ""

    def text(self) -> str:
        """One or two sentences for people, latencies in milliseconds."""
        if self.latency_ms is None or self.would_fit_ms is None:
            return f"No student was found under {self.limit_ms:.4g} ms: {self.reason}."
        head = "Not feasible" if self.proven else "Nothing surely feasible"
        shown = f"{self.fastest} {self.precision}".strip()
        return (
            f"{head} under {self.limit_ms:.4g} ms: the fastest of {self.measured} measured candidates is {shown} with {self.latency_ms:.4g} ms "
            f"({self.lower_ms:.4g} to {self.upper_ms:.4g} ms, 99 % at each end). A budget of {self.would_fit_ms:.4g} ms would fit it."
        )
