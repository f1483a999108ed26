"""The order of preference: its rules one by one, and what must hold for any pair and any set."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekd.errors import DataError, InputError
from edgekd.objective import Standing, best, is_faster, prefer
from edgekd.records import Precision

N = 200


def scores(wrong: int, start: int = 0) -> np.ndarray:
    out = np.ones(N)
    out[start : start + wrong] = 0
    return out


def standing(label: str = "a", wrong: int = 10, ms: float = 1.0, error: float = 0.02, size: int = 1000, **more: Any) -> Standing:
    fields: dict[str, Any] = {"scores": scores(wrong), "precision": Precision.FP32, "meets_budget": True}
    return Standing(label=label, latency_ms=ms, latency_lower_ms=ms * (1 - error), latency_upper_ms=ms * (1 + error), size_bytes=size, **(fields | more))


def test_more_accurate_is_preferred_when_both_meet_the_budget() -> None:
    slow_accurate, fast_wrong = standing("a", wrong=5, ms=2.0), standing("b", wrong=30, ms=1.0)
    found = prefer(fast_wrong, slow_accurate, binary=True)
    assert found.after_preferred
    assert "accuracy +0.1250" in found.reason
    assert not prefer(slow_accurate, fast_wrong, binary=True).after_preferred


def test_faster_is_preferred_when_accuracy_is_equal_within_noise() -> None:
    assert prefer(standing(wrong=9), standing("b", wrong=10, ms=0.9), binary=True).after_preferred
    assert not prefer(standing(wrong=9), standing("b", wrong=10, ms=0.98), binary=True).after_preferred  # intervals overlap, same size


def test_smaller_is_preferred_when_accuracy_and_latency_are_equal() -> None:
    assert prefer(standing(), standing("b", size=999), binary=True).after_preferred
    assert not prefer(standing(), standing("b", size=1000), binary=True).after_preferred
    assert not prefer(standing(), standing("b", size=1001), binary=True).after_preferred


def test_the_one_that_meets_the_budget_is_preferred() -> None:
    over = standing(wrong=0, ms=0.5, size=1, meets_budget=False)
    assert prefer(over, standing("b", wrong=40), binary=True).after_preferred
    assert not prefer(standing("b", wrong=40), over, binary=True).after_preferred


def test_faster_within_the_floor_is_preferred_while_none_meets_the_budget() -> None:
    before = standing(wrong=5, ms=2.0, meets_budget=False)
    assert prefer(before, standing("b", wrong=30, ms=1.0, meets_budget=False), binary=True).after_preferred
    assert not prefer(before, standing("b", wrong=30, ms=1.0, meets_budget=False, within_floor=False), binary=True).after_preferred


@pytest.mark.parametrize("more", [{"wrong": 0}, {"size": 1}, {"wrong": 0, "size": 1}])
@pytest.mark.parametrize("before_meets", [True, False])
def test_int8_that_is_not_faster_is_never_preferred(more: dict[str, Any], before_meets: bool) -> None:
    float_one = standing("float", wrong=30, meets_budget=before_meets)
    found = prefer(float_one, standing("int8", ms=0.97, precision=Precision.INT8, **more), binary=True)
    assert not found.after_preferred
    assert "not faster" in found.reason
    assert prefer(float_one, standing("int8", ms=0.5, precision=Precision.INT8, **more), binary=True).after_preferred


def test_int8_of_another_student_is_judged_by_accuracy() -> None:
    narrow = standing("narrow", wrong=40, ms=0.5, student="w8")
    wide = standing("wide int8", wrong=5, ms=0.8, precision=Precision.INT8, student="w32")
    assert prefer(narrow, wide, binary=True).after_preferred
    assert best([narrow, wide], True) is wide
    assert not prefer(narrow, replace(wide, student="w8"), binary=True).after_preferred


def test_standings_refuse_what_cannot_be_compared() -> None:
    for wrong in (math.nan, math.inf, 0.0, -1.0):
        with pytest.raises(InputError, match="latency"):
            standing(ms=wrong)
    with pytest.raises(DataError):
        standing(scores=np.array([1.0, math.nan]))
    with pytest.raises(DataError, match="only one was scored"):
        prefer(standing(), standing("b", scores=None), binary=True)
    with pytest.raises(DataError, match="same items"):
        prefer(standing(), standing("b", scores=np.ones(3)), binary=True)
    with pytest.raises(DataError, match="unscored"):
        best([standing(), standing("b", scores=None)], True)
    with pytest.raises(InputError):
        best([], True)


def test_unscored_candidates_are_compared_by_speed_and_size() -> None:
    assert prefer(standing(scores=None), standing("b", scores=None, ms=0.5), binary=True).after_preferred


@st.composite
def standings(draw: st.DrawFn, label: str = "s") -> Standing:
    ms = draw(st.sampled_from([0.5, 0.97, 1.0, 1.03, 2.0]))
    return standing(
        label,
        ms=ms,
        error=draw(st.sampled_from([0.0, 0.02, 0.2])),
        size=draw(st.sampled_from([10, 20, 30])),
        scores=scores(draw(st.integers(0, 40)), draw(st.integers(0, 100))),
        precision=draw(st.sampled_from([Precision.FP32, Precision.FP16, Precision.INT8])),
        meets_budget=draw(st.booleans()),
        within_floor=draw(st.booleans()),
        student=draw(st.sampled_from(["", "x", "y"])),
    )


@given(standings("a"), standings("b"), st.booleans())
@settings(max_examples=300, deadline=None)
def test_preference_is_antisymmetric(one: Standing, two: Standing, binary: bool) -> None:
    assert not (prefer(one, two, binary=binary).after_preferred and prefer(two, one, binary=binary).after_preferred)
    assert not prefer(one, one, binary=binary).after_preferred


@given(standings("a"), st.integers(0, 20), st.floats(1.0, 3.0), st.integers(0, 50))
@settings(max_examples=300, deadline=None)
def test_dominated_after_is_never_preferred(before: Standing, losses: int, slower: float, larger: int) -> None:
    assert before.scores is not None
    worse = before.scores.copy()
    worse[np.nonzero(worse)[0][:losses]] = 0
    after = replace(
        before,
        label="b",
        scores=worse,
        latency_ms=before.latency_ms * slower,
        latency_lower_ms=before.latency_lower_ms * slower,
        latency_upper_ms=before.latency_upper_ms * slower,
        size_bytes=before.size_bytes + larger,
    )
    assert not prefer(before, after, binary=True).after_preferred


@given(standings("a"), standings("b"), st.booleans())
@settings(max_examples=300, deadline=None)
def test_slow_int8_of_the_same_student_is_never_preferred_nor_chosen(one: Standing, two: Standing, binary: bool) -> None:
    before = replace(one, precision=Precision.FP32, student="x")
    after = replace(two, precision=Precision.INT8, student="x")
    if not is_faster(after, before):
        assert not prefer(before, after, binary=binary).after_preferred
        assert best([before, after], binary) is before


@given(st.lists(standings(), min_size=1, max_size=6), st.randoms(use_true_random=False), st.booleans())
@settings(max_examples=300, deadline=None)
def test_best_is_independent_of_order_and_agrees_with_prefer_on_pairs(raw: list[Standing], random: Any, binary: bool) -> None:
    pool = [replace(one, label=f"s{i}") for i, one in enumerate(raw)]
    chosen = best(pool, binary)
    shuffled = list(pool)
    random.shuffle(shuffled)
    assert best(shuffled, binary) is chosen
    for other in pool[:2]:
        if other is not chosen:
            winner = best([chosen, other], binary)
            loser = other if winner is chosen else chosen
            assert not prefer(winner, loser, binary=binary).after_preferred


@given(st.lists(standings(), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_best_meets_the_budget_when_any_admissible_one_does(raw: list[Standing]) -> None:
    pool = [replace(one, label=f"s{i}", precision=Precision.FP32) for i, one in enumerate(raw)]
    assert best(pool, True).meets_budget == any(one.meets_budget for one in pool)
