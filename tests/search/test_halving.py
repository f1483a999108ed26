"""Short trainings rank the finalists; diverse ones are picked; one shared order decides ties."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edgekd.errors import ConfigError, TrainingDiverged
from edgekd.records import Point, StudentSpec
from edgekd.search import Candidate, HalvingOutcome, SearchOutcome, pick_finalists, rank_by_training


def candidate(width: int, depth: int = 1) -> Candidate:
    return Candidate(spec=StudentSpec(kind="family", kwargs={"width": width, "depth": depth}), capacity=float(width * depth), features={})


def point(one: Candidate, latency: float) -> Point:
    return Point(label=one.label, precision="int8", latency_ms=latency, lower_ms=0.99 * latency, upper_ms=1.01 * latency)


def scores(right: int, items: int = 400) -> NDArray[np.float64]:
    return (np.arange(items) < right).astype(np.float64)


def ranked(accuracy: dict[int, int], latency: dict[int, float], epochs: list[tuple[int, int]] | None = None) -> HalvingOutcome:
    members = [candidate(width) for width in accuracy]

    def train(one: Candidate, count: int) -> NDArray[np.float64]:
        width = int(one.spec.kwargs["width"])
        if epochs is not None:
            epochs.append((width, count))
        if accuracy[width] < 0:
            raise TrainingDiverged("the loss is not finite")
        return scores(accuracy[width])

    points = {one.label: point(one, latency[int(one.spec.kwargs["width"])]) for one in members}
    return rank_by_training(members, train, points=points, rung_epochs=2, binary=True)


def test_halving_drops_the_lower_half_and_doubles_the_epochs() -> None:
    epochs: list[tuple[int, int]] = []
    outcome = ranked({8: 200, 16: 320, 24: 380, 32: 260}, {8: 0.1, 16: 0.2, 24: 0.3, 32: 0.4}, epochs)
    assert epochs == [(8, 2), (16, 2), (24, 2), (32, 2), (24, 4), (16, 4)]
    assert outcome.order == ("depth=1 width=24", "depth=1 width=16", "depth=1 width=32", "depth=1 width=8")
    first = [row for row in outcome.rungs if row.round == 1]
    assert [row.kept for row in first] == [True, True, False, False]
    assert first[0].accuracy == pytest.approx(0.95)
    assert HalvingOutcome.from_json(outcome.to_json()) == outcome


def test_faster_is_preferred_when_the_paired_interval_includes_zero() -> None:
    outcome = ranked({8: 378, 32: 380}, {8: 0.1, 32: 0.4})
    assert outcome.order == ("depth=1 width=8", "depth=1 width=32")
    assert ranked({8: 300, 32: 380}, {8: 0.1, 32: 0.4}).order[0] == "depth=1 width=32"


def test_diverged_training_takes_its_candidate_out_with_the_reason() -> None:
    outcome = ranked({8: 200, 16: -1, 32: 300}, {8: 0.1, 16: 0.2, 32: 0.3})
    assert outcome.order == ("depth=1 width=32", "depth=1 width=8")
    assert "not finite" in outcome.rejected["depth=1 width=16"]
    assert ranked({8: -1, 16: -1}, {8: 0.1, 16: 0.2}).order == ()


def test_single_finalist_is_not_trained() -> None:
    epochs: list[tuple[int, int]] = []
    assert ranked({8: 1}, {8: 0.1}, epochs).order == ("depth=1 width=8",)
    assert epochs == []


def test_ranking_refuses_nothing_and_unmeasured_finalists() -> None:
    with pytest.raises(ConfigError, match="no finalists"):
        ranked({}, {})
    with pytest.raises(ConfigError, match="never measured"):
        rank_by_training([candidate(8)], lambda one, epochs: scores(1), points={}, rung_epochs=1, binary=True)


def outcome_of(latencies: list[tuple[Candidate, float]]) -> SearchOutcome:
    return SearchOutcome(
        limit_ms=1.0,
        headroom=0.05,
        candidates=len(latencies),
        points=tuple(point(one, latency) for one, latency in latencies),
        feasible=tuple(one for one, _ in latencies),
        rejected={},
        proposed=len(latencies),
        measured=len(latencies),
        measurements=len(latencies),
        predictor_error=None,
        rounds=(),
        stopped="",
        certificate=None,
    )


def test_finalists_are_the_best_but_not_near_twins() -> None:
    best, twin, sibling, other = candidate(32, 2), candidate(30, 2), candidate(24, 2), candidate(16, 3)
    outcome = outcome_of([(best, 0.90), (twin, 0.895), (sibling, 0.8), (other, 0.895)])
    assert pick_finalists(outcome, 3) == (best, sibling, other)
    assert pick_finalists(outcome, 4) == (best, twin, sibling, other)
    assert pick_finalists(outcome, 1) == (best,)
    assert pick_finalists(outcome_of([]), 3) == ()
