"""On a table of real latencies and accuracies the search beats random choice at the same number of measurements."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekd.options import SearchOptions
from edgekd.records import StudentSpec
from edgekd.search import Candidate, Seen, Size, make_candidates, search

TABLE = json.loads((Path(__file__).parent.parent / "data" / "recorded_table.json").read_text())
ROWS: list[dict[str, Any]] = TABLE["rows"]
CANDIDATES = make_candidates(
    [StudentSpec(kind="family", kwargs=row["choices"]) for row in ROWS], [Size(parameters=row["parameters"], macs=row["macs"]) for row in ROWS]
)
ACCURACY = {candidate.label: row["accuracy"] for candidate, row in zip(CANDIDATES, ROWS, strict=True)}
QUANTILES = (0.15, 0.3, 0.5, 0.7)
MEASUREMENTS = 14
REPEATS = 5
HEADROOM = 0.05


def latencies(precision: str) -> dict[str, float]:
    return {candidate.label: row[f"latency_ms_{precision}"] for candidate, row in zip(CANDIDATES, ROWS, strict=True)}


def measuring(table: Mapping[str, float], seed: int) -> Any:
    """The recorded latency with 1 % of scatter, as a quiet machine shows it."""
    generator = np.random.default_rng(seed)

    def measure(batch: Sequence[Candidate]) -> dict[str, Seen]:
        values = {one.label: table[one.label] * float(np.exp(0.01 * generator.standard_normal())) for one in batch}
        return {label: Seen(latency_ms=value, lower_ms=0.977 * value, upper_ms=1.0235 * value) for label, value in values.items()}

    return measure


def by_search(table: Mapping[str, float], limit: float, seed: int) -> float:
    options = SearchOptions(measurements=MEASUREMENTS, headroom=HEADROOM)
    outcome = search(CANDIDATES, measure=measuring(table, seed), limit_ms=limit, options=options, seed=seed)
    assert outcome.measurements <= MEASUREMENTS
    return _accuracy(outcome.feasible, table, limit)


def by_chance(table: Mapping[str, float], limit: float, seed: int) -> float:
    """As many candidates, drawn at random, measured the same way; the same rule ranks what is feasible."""
    measured = random.Random(seed).sample(CANDIDATES, MEASUREMENTS)
    seen = measuring(table, seed)(measured)
    good = [one for one in measured if seen[one.label].latency_ms <= (1 - HEADROOM) * limit and seen[one.label].upper_ms <= limit]
    return _accuracy(sorted(good, key=lambda one: -one.capacity), table, limit)


def _accuracy(ranked: Sequence[Candidate], table: Mapping[str, float], limit: float) -> float:
    """The recorded accuracy of the first; chance level (one class in ten) where nothing feasible was found."""
    if not ranked:
        return 0.1
    assert table[ranked[0].label] <= limit
    return float(ACCURACY[ranked[0].label])


def test_table_is_real_and_not_monotone() -> None:
    assert len(ROWS) == 42
    assert {"device", "runtime", "latency", "accuracy", "date"} <= set(TABLE["conditions"])
    for precision in ("fp32", "int8"):
        by_choice = {tuple(row["choices"].values()): row[f"latency_ms_{precision}"] for row in ROWS}
        assert any(
            by_choice[wide, depth, kernel] < by_choice[narrow, depth, kernel]
            for narrow, wide in ((12, 16), (20, 24), (24, 32))
            for depth in (1, 2, 3)
            for kernel in (3, 5)
        )


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_search_beats_random_choice_at_the_same_number_of_measurements(precision: str, seed: int) -> None:
    table = latencies(precision)
    gains = []
    for quantile in QUANTILES:
        limit = float(np.quantile(list(table.values()), quantile))
        runs = range(100 * seed, 100 * seed + REPEATS)
        found = np.mean([by_search(table, limit, number) for number in runs])
        drawn = np.mean([np.mean([by_chance(table, limit, 1000 * number + draw) for draw in range(10)]) for number in runs])
        gains.append(found - drawn)
    assert min(gains) >= 0.0, gains
    assert np.mean(gains) > 0.003, gains
