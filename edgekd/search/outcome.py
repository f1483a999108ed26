"""What a search found, as it is stored and shown."""

from __future__ import annotations

from edgekd.records import Point, Record
from edgekd.records.model import NonNegative
from edgekd.search.certificate import Infeasible
from edgekd.search.model import Candidate


class RoundRow(Record, tag="edgekd.search_round/1", frozen=True, kw_only=True):
    """One round: which labels were measured and why (`probe`, `confirm`, `improve`, `boundary`, `repeat`), and where it led.

    `disturbed`: the whole round came out slower than predicted; those that matter are measured again.
    """

    measured: dict[str, str]
    feasible: NonNegative
    best: str = ""
    best_latency_ms: float | None = None
    disturbed: bool = False


class SearchOutcome(Record, tag="edgekd.search_outcome/1", frozen=True, kw_only=True):
    """What a search found. `feasible` is ranked: quality first (the higher), then latency (the lower).

    A candidate is feasible as screened if its latency leaves the headroom, latency <= limit * (1 - headroom), and its upper 99 %
    bound is within the limit. This ranks; it promises nothing: only a verdict on the final artifact does.
    `proposed` counts the candidates sent to the device, `measured` those with a valid measurement, `measurements` every single
    one taken, repeats and invalid ones included. `predictor_error` is the median share by which the latency of a measured
    candidate is missed when predicted from the others. `certificate` is set exactly when nothing is feasible.
    """

    limit_ms: float
    headroom: float
    candidates: NonNegative
    points: tuple[Point, ...]
    feasible: tuple[Candidate, ...]
    rejected: dict[str, str]
    proposed: NonNegative
    measured: NonNegative
    measurements: NonNegative
    predictor_error: float | None
    rounds: tuple[RoundRow, ...]
    stopped: str
    certificate: Infeasible | None

    def latency_ms(self) -> dict[str, float]:
        """The screened latency per label, in milliseconds."""
        return {point.label: point.latency_ms for point in self.points}

    def summary(self) -> str:
        """One line for people: candidates proposed, measured, rejected."""
        error = "not known" if self.predictor_error is None else f"{100 * self.predictor_error:.1f} % (median, held out)"
        return (
            f"candidates: {self.candidates} in the space, {self.proposed} proposed, {self.measured} measured ({self.measurements} measurements in "
            f"{len(self.rounds)} rounds), {len(self.rejected)} rejected; {len(self.feasible)} feasible under {self.limit_ms:.4g} ms "
            f"with {100 * self.headroom:.3g} % headroom; error of the latency predictor {error}; stopped: {self.stopped}"
        )
