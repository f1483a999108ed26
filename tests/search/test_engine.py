"""The search on made-up devices: cliffs, noise, disturbances, rejections, budgets out of reach."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from edgekd.errors import BudgetError, ConfigError
from edgekd.options import SearchOptions
from edgekd.records import StudentSpec
from edgekd.search import Candidate, MeasureBatch, SearchOutcome, Seen, choice_features, search
from edgekd.search.model import merge

WIDTHS, DEPTHS = [4, 6, 8, 10, 12, 16, 18, 20, 24, 28, 32], [1, 2, 3, 4, 6]


def space() -> list[Candidate]:
    specs = [StudentSpec(kind="family", kwargs={"width": width, "depth": depth}) for width, depth in itertools.product(WIDTHS, DEPTHS)]
    macs = [64.0 * depth * width * width for width, depth in itertools.product(WIDTHS, DEPTHS)]
    rows = choice_features(specs, {"macs": macs})
    return [Candidate(spec=spec, capacity=cost, features=row) for spec, cost, row in zip(specs, macs, rows, strict=True)]


def true_ms(candidate: Candidate) -> float:
    """Kernels work in steps of 16 channels; a width that is no multiple pays 15 % more than the next full one."""
    width, depth = int(candidate.spec.kwargs["width"]), int(candidate.spec.kwargs["depth"])
    full = math.ceil(width / 16) * 16
    return 0.02 + depth * (0.01 + 2e-5 * full * full * (1.0 if width == full else 1.15))


def device(seed: int, noise: float = 0.01, wrap: Callable[[Candidate, float], Seen | float] | None = None) -> MeasureBatch:
    generator = np.random.default_rng(seed)

    def measure(batch: Sequence[Candidate]) -> dict[str, Seen]:
        answers = {}
        for candidate in batch:
            drawn = true_ms(candidate) * math.exp(noise * generator.standard_normal())
            value = wrap(candidate, drawn) if wrap is not None else drawn
            answers[candidate.label] = (
                value
                if isinstance(value, Seen)
                else Seen(latency_ms=value, lower_ms=value * math.exp(-2.33 * noise), upper_ms=value * math.exp(2.33 * noise), precision="fp32")
            )
        return answers

    return measure


def run(limit: float, seed: int = 0, measure: MeasureBatch | None = None, **options: float) -> SearchOutcome:
    chosen = SearchOptions(**{"measurements": 30, **options})  # type: ignore[arg-type]
    return search(space(), measure=measure or device(seed), limit_ms=limit, options=chosen, seed=seed)


@pytest.mark.parametrize("limit", [0.045, 0.06, 0.1, 0.15, 0.3])
def test_search_finds_a_candidate_near_the_best_feasible_one_with_half_the_measurements(limit: float) -> None:
    best = max(candidate.capacity for candidate in space() if true_ms(candidate) <= 0.95 * limit)
    reached = []
    for seed in range(5):
        outcome = run(limit, seed)
        assert outcome.measurements <= 30
        assert outcome.certificate is None
        reached.append(outcome.feasible[0].capacity / best)
    assert np.median(reached) > 0.97


def test_ranking_is_by_quality_then_latency_and_leaves_the_headroom() -> None:
    outcome = run(0.1)
    capacities = [candidate.capacity for candidate in outcome.feasible]
    assert capacities == sorted(capacities, reverse=True)
    points = {point.label: point for point in outcome.points}
    for candidate in outcome.feasible:
        point = points[candidate.label]
        assert point.latency_ms <= 0.95 * 0.1
        assert point.upper_ms <= 0.1
        assert point.role == "feasible"
    by_depth = search(
        space(), measure=device(0), limit_ms=0.1, options=SearchOptions(), seed=0, quality=lambda candidate: float(candidate.spec.kwargs["depth"])
    )
    depths = [candidate.spec.kwargs["depth"] for candidate in by_depth.feasible]
    assert depths == sorted(depths, reverse=True)
    latencies = [by_depth.latency_ms()[candidate.label] for candidate in by_depth.feasible if candidate.spec.kwargs["depth"] == depths[0]]
    assert latencies == sorted(latencies)


def test_search_is_equal_to_the_byte_for_one_seed_and_differs_for_another() -> None:
    assert run(0.1, 3).to_json() == run(0.1, 3).to_json()
    first, other = run(0.1, 3), run(0.1, 4)
    assert first.rounds[0].measured != other.rounds[0].measured
    assert SearchOutcome.from_json(first.to_json()) == first


def test_counts_add_up_and_are_shown() -> None:
    lines: list[str] = []
    refused = {"depth=1 width=4", "depth=6 width=32"}
    measure = device(0, wrap=lambda candidate, value: Seen(rejected="operator Foo is missing") if candidate.label in refused else value)
    outcome = search(space(), measure=measure, limit_ms=0.5, options=SearchOptions(), seed=0, progress=lines.append)
    assert outcome.rejected == dict.fromkeys(sorted(refused), "operator Foo is missing")
    assert outcome.proposed == outcome.measured + len(outcome.rejected)
    assert outcome.measurements == sum(len(row.measured) for row in outcome.rounds)
    assert len(lines) == len(outcome.rounds)
    assert not refused & {candidate.label for candidate in outcome.feasible}
    for words in (f"{outcome.proposed} proposed", f"{outcome.measured} measured", "2 rejected", "0.5 ms", "%"):
        assert words in outcome.summary()


@pytest.mark.parametrize("limit", [0.005, 0.02])
def test_limit_out_of_reach_gives_a_certificate_with_what_would_fit(limit: float) -> None:
    outcome = run(limit)
    certificate = outcome.certificate
    assert certificate is not None
    assert certificate.proven
    assert outcome.feasible == ()
    assert certificate.latency_ms is not None
    assert certificate.would_fit_ms is not None
    assert certificate.latency_ms == pytest.approx(min(true_ms(candidate) for candidate in space()), rel=0.05)
    assert outcome.measurements <= 16
    assert f"{certificate.would_fit_ms:.4g} ms" in certificate.text()
    assert run(certificate.would_fit_ms * 1.01, 1).feasible


def test_infeasible_is_not_claimed_when_the_smallest_is_not_the_fastest() -> None:
    """Padding of narrow nets is made so dear that the smallest candidate is the slowest of its depth."""

    def odd(candidate: Candidate, value: float) -> float:
        return value * (3.0 if int(candidate.spec.kwargs["width"]) < 16 else 1.0)

    outcome = run(0.05, measure=device(0, wrap=odd))
    assert outcome.certificate is None
    assert outcome.feasible[0].label == "depth=1 width=16"


def test_near_miss_is_not_called_proven() -> None:
    fastest = min(true_ms(candidate) for candidate in space())
    outcome = run(fastest * 1.01)
    assert outcome.certificate is not None
    assert not outcome.certificate.proven
    assert "Nothing surely feasible" in outcome.certificate.text()


def test_disturbed_round_is_noticed_and_measured_again() -> None:
    """One round comes out 70 % slower, with narrow intervals: the best candidates must not be lost to it."""
    calls = 0
    inner = device(0)

    def measure(batch: Sequence[Candidate]) -> dict[str, Seen]:
        nonlocal calls
        calls += 1
        seen = dict(inner(batch))
        if calls == 2:
            seen = {
                label: Seen(latency_ms=1.7 * one.latency_ms, lower_ms=1.7 * one.lower_ms, upper_ms=1.7 * one.upper_ms, precision="fp32")
                for label, one in seen.items()
            }
        return seen

    outcome = run(0.1, measure=measure, measurements=40)
    assert [row.disturbed for row in outcome.rounds].index(True) == 1
    assert not all(row.disturbed for row in outcome.rounds)
    assert any(why == "repeat" for row in outcome.rounds for why in row.measured.values())
    best = max(candidate.capacity for candidate in space() if true_ms(candidate) <= 0.095)
    assert outcome.feasible[0].capacity >= 0.97 * best


def test_invalid_measurements_are_repeated_once_and_then_given_up() -> None:
    asked: list[str] = []

    def broken(candidate: Candidate, value: float) -> Seen | float:
        asked.append(candidate.label)
        return Seen(valid=False) if candidate.spec.kwargs["depth"] == 4 else value

    outcome = run(0.2, measure=device(0, wrap=broken))
    given_up = [label for label in outcome.rejected if label.startswith("depth=4")]
    assert given_up
    assert all(asked.count(label) == 2 for label in given_up)
    assert all("disturbed" in outcome.rejected[label] for label in given_up)


def test_device_that_never_answers_validly_ends_in_an_unproven_certificate() -> None:
    outcome = run(0.2, measure=device(0, wrap=lambda candidate, value: Seen(valid=False)))
    assert outcome.certificate is not None
    assert not outcome.certificate.proven
    assert outcome.certificate.latency_ms is None
    assert "disturbed" in outcome.certificate.text()
    assert outcome.measurements == 30


def test_doubtful_candidates_are_measured_again() -> None:
    outcome = run(0.1, measure=device(0, noise=0.1), measurements=40)
    repeats = [label for row in outcome.rounds for label, why in row.measured.items() if why == "repeat"]
    assert repeats


def test_search_of_one_candidate_measures_it() -> None:
    (only,) = [candidate for candidate in space() if candidate.label == "depth=2 width=8"]
    outcome = search([only], measure=device(0), limit_ms=1.0, options=SearchOptions(), seed=0)
    assert outcome.feasible == (only,)
    assert outcome.measurements == 1
    assert outcome.predictor_error is None


def test_measurements_are_bounded_even_below_the_number_of_probes() -> None:
    assert run(0.1, measurements=4).measurements == 4


def test_bad_calls_are_refused() -> None:
    members = space()
    for limit in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(BudgetError, match="milliseconds"):
            run(limit)
    with pytest.raises(ConfigError, match="no candidates"):
        search([], measure=device(0), limit_ms=1.0, options=SearchOptions(), seed=0)
    with pytest.raises(ConfigError, match="same label"):
        search([members[0], members[0]], measure=device(0), limit_ms=1.0, options=SearchOptions(), seed=0)
    with pytest.raises(ConfigError, match="left out"):
        search(members, measure=lambda batch: {}, limit_ms=1.0, options=SearchOptions(), seed=0)
    with pytest.raises(ConfigError, match="limits"):
        Seen(latency_ms=1.0, lower_ms=1.1, upper_ms=1.2)
    with pytest.raises(ConfigError, match="capacity"):
        Candidate(spec=members[0].spec, capacity=0.0, features={})


def seen(value: float, half: float = 0.02) -> Seen:
    return Seen(latency_ms=value, lower_ms=value * (1 - half), upper_ms=value * (1 + half), precision="fp32")


def test_merge_narrows_agreeing_repeats_drops_surely_slower_ones_and_ignores_copies() -> None:
    one = seen(1.0)
    assert merge([one, one]) == one
    both = merge([one, seen(1.005)])
    assert 1.0 < both.latency_ms < 1.005
    assert both.upper_ms - both.lower_ms < one.upper_ms - one.lower_ms
    assert merge([seen(1.7), one]) == one
    apart = merge([one, seen(1.035)])
    assert apart.upper_ms - apart.lower_ms > both.upper_ms - both.lower_ms
