"""Finalists are ranked by short trainings: all a little, the better half twice as long, until one is left."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edgekd.errors import ConfigError, Rejected
from edgekd.objective import Standing, best
from edgekd.records import Point, Precision, Record
from edgekd.records.model import Positive
from edgekd.search.model import Candidate
from edgekd.search.outcome import SearchOutcome

_NEAR = 0.02


class RungRow(Record, tag="edgekd.rung/1", frozen=True, kw_only=True):
    """One short training: `accuracy` is the mean validation score after `epochs`; `kept` says that it went on or was ranked first."""

    round: Positive
    label: str
    epochs: Positive
    accuracy: float | None
    latency_ms: float
    kept: bool
    reason: str = ""


class HalvingOutcome(Record, tag="edgekd.halving/1", frozen=True, kw_only=True):
    """`order` holds all labels that could be trained, the best first; `rejected` maps the others to their reason."""

    order: tuple[str, ...]
    rungs: tuple[RungRow, ...]
    rejected: dict[str, str] = {}


def pick_finalists(outcome: SearchOutcome, count: int) -> tuple[Candidate, ...]:
    """Up to `count` feasible candidates by rank, skipping near twins of a better one: less than 2 % apart in latency and
    different in one choice only. Twins fill the places that stay free.
    """
    latency = outcome.latency_ms()
    chosen: list[Candidate] = []
    twins: list[Candidate] = []
    for candidate in outcome.feasible:
        near = any(
            abs(math.log(latency[candidate.label] / latency[other.label])) < _NEAR and len(candidate.spec.kwargs.items() ^ other.spec.kwargs.items()) <= 2
            for other in chosen
        )
        (twins if near else chosen).append(candidate)
    picked = {candidate.label for candidate in [*chosen, *twins][:count]}
    return tuple(candidate for candidate in outcome.feasible if candidate.label in picked)


def rank_by_training(
    finalists: Sequence[Candidate],
    train: Callable[[Candidate, int], NDArray[np.float64]],
    *,
    points: Mapping[str, Point],
    rung_epochs: int,
    binary: bool,
) -> HalvingOutcome:
    """The finalists in the order of short trainings, by successive halving (Jamieson and Talwalkar, AISTATS 2016).

    `train(candidate, epochs)` gives the scores per validation item after that many epochs in all, `(items,)`, the same items each
    time. Each round ranks by `edgekd.objective.best`: the more accurate by the paired 95 % interval, if that includes 0 the faster
    where the latency intervals separate; then drops the lower half and doubles the epochs. A single finalist is not trained.
    `points` holds the screened latency per label. A training that raises `Rejected` takes its candidate out.

    Raises:
        ConfigError: there are no finalists, or one has no point.
    """
    if not finalists:
        raise ConfigError("there are no finalists to rank", hint="the search found nothing feasible; see its certificate")
    for candidate in finalists:
        if candidate.label not in points:
            raise ConfigError("a finalist was never measured", found=candidate.label, hint="pass the points of the search's outcome", subject=candidate.label)
    rungs: list[RungRow] = []
    rejected: dict[str, str] = {}
    tail: list[str] = []
    going = list(finalists)
    epochs, number = rung_epochs, 1
    while len(going) > 1:
        standings: list[Standing] = []
        for candidate in going:
            try:
                scores = np.asarray(train(candidate, epochs), dtype=np.float64)
            except Rejected as error:
                rejected[candidate.label] = str(error)
                rungs.append(_row(number, candidate.label, epochs, None, points, kept=False, reason=str(error)))
                continue
            standings.append(_standing(candidate.label, scores, points[candidate.label]))
        ordered = _in_order(standings, binary)
        keep = math.ceil(len(ordered) / 2)
        for place, standing in enumerate(ordered):
            assert standing.scores is not None
            reason = f"place {place + 1} of {len(ordered)}"
            rungs.append(_row(number, standing.label, epochs, float(standing.scores.mean()), points, kept=place < keep, reason=reason))
        tail = [standing.label for standing in ordered[keep:]] + tail
        by_label = {candidate.label: candidate for candidate in going}
        going = [by_label[standing.label] for standing in ordered[:keep]]
        epochs, number = 2 * epochs, number + 1
    return HalvingOutcome(order=(*(candidate.label for candidate in going), *tail), rungs=tuple(rungs), rejected=rejected)


def _row(number: int, label: str, epochs: int, accuracy: float | None, points: Mapping[str, Point], *, kept: bool, reason: str) -> RungRow:
    return RungRow(round=number, label=label, epochs=epochs, accuracy=accuracy, latency_ms=points[label].latency_ms, kept=kept, reason=reason)


def _standing(label: str, scores: NDArray[np.float64], point: Point) -> Standing:
    return Standing(
        label=label,
        scores=scores,
        latency_ms=point.latency_ms,
        latency_lower_ms=point.lower_ms,
        latency_upper_ms=point.upper_ms,
        size_bytes=0,  # not known before the conversion: the size decides nothing here
        precision=Precision(point.precision) if point.precision else Precision.FP32,
        meets_budget=True,
        student=label,
    )


def _in_order(standings: Sequence[Standing], binary: bool) -> list[Standing]:
    """Best first: the preferred one of all, then the preferred one of the rest, and so on."""
    rest, ordered = list(standings), []
    while rest:
        ordered.append(best(rest, binary))
        rest.remove(ordered[-1])
    return ordered
