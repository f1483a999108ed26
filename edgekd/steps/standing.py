"""Where an artifact stands against the budget on screen-grade evidence: the input of the one objective."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgekd.artifact import StoredArtifact
from edgekd.measuring.measure import Screened
from edgekd.objective import Standing
from edgekd.records import Budget


def standing(
    model: StoredArtifact,
    screened: Screened,
    scores: NDArray[np.float64],
    teacher_scores: NDArray[np.float64],
    budget: Budget,
    limit_ms: float,
    *,
    student: str = "student",
) -> Standing:
    """The artifact's standing: it meets the budget when the upper limit of its screened latency, its size and its mean score do.

    `scores` and `teacher_scores` are per validation item, in the same order; `student` names the network, whatever its precision.
    """
    floor = -np.inf
    if budget.max_drop is not None:
        floor = max(floor, float(teacher_scores.mean()) - budget.max_drop)
    if budget.accuracy_floor is not None:
        floor = max(floor, budget.accuracy_floor)
    within_floor = bool(scores.mean() >= floor)
    fits = screened.measurement.valid and screened.upper_ms <= limit_ms
    small = budget.size_mb is None or model.record.size_bytes <= budget.size_mb * 1e6
    return Standing(
        label=screened.label,
        student=student,
        scores=scores,
        latency_ms=screened.latency_ms,
        latency_lower_ms=screened.lower_ms,
        latency_upper_ms=screened.upper_ms,
        size_bytes=model.record.size_bytes,
        precision=model.record.precision,
        meets_budget=fits and small and within_floor,
        within_floor=within_floor,
    )
