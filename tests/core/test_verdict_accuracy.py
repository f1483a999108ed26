"""The verdict on accuracy: paired bounds, bounded scores, items that would decide, scores that are refused."""

import math

import numpy as np
import pytest

from edgekd.errors import DataError
from edgekd.records import Outcome
from edgekd.verdict import check_accuracy, check_floor, check_scores, same_outputs


def pairs(n: int, only_student: int, only_teacher: int) -> tuple[np.ndarray, np.ndarray]:
    student, teacher = np.ones(n), np.ones(n)
    teacher[:only_student] = 0
    student[only_student : only_student + only_teacher] = 0
    return student, teacher


def test_accuracy_passes_fails_and_refuses_by_the_paired_bounds() -> None:
    assert check_accuracy(*pairs(719, 7, 7), 0.03, True).outcome is Outcome.PASS
    assert check_accuracy(*pairs(719, 0, 60), 0.03, True).outcome is Outcome.FAIL
    check = check_accuracy(*pairs(719, 5, 20), 0.03, True)
    assert check.outcome is Outcome.REFUSE
    assert "5 only the student has right, 20 only the teacher" in check.reason
    assert "items would decide" in check.reason
    assert not check.undecided


def test_accuracy_of_identical_answers_needs_enough_items() -> None:
    assert check_accuracy(*pairs(719, 0, 0), 0.03, True).outcome is Outcome.PASS
    few = check_accuracy(*pairs(50, 0, 0), 0.03, True)
    assert few.outcome is Outcome.REFUSE
    assert "about 175 items" in few.reason  # z^2 (1 - d) / d at d = 0.03
    assert check_accuracy(*pairs(176, 0, 0), 0.03, True).outcome is Outcome.PASS
    assert check_accuracy(*pairs(174, 0, 0), 0.03, True).outcome is Outcome.REFUSE


def test_accuracy_of_graded_scores_is_judged_by_the_paired_bounds() -> None:
    rng = np.random.default_rng(3)
    teacher = rng.normal(size=400)
    assert check_accuracy(teacher - 0.01 + 0.01 * rng.normal(size=400), teacher, 0.03, False).outcome is Outcome.PASS
    assert check_accuracy(teacher - 0.05 + 0.01 * rng.normal(size=400), teacher, 0.03, False).outcome is Outcome.FAIL
    assert check_accuracy(teacher - 0.03 + 0.01 * rng.normal(size=400), teacher, 0.03, False).outcome is Outcome.REFUSE


@pytest.mark.parametrize("n", [50, 174, 176, 719])
def test_accuracy_of_bounded_scores_claims_no_more_than_binary_ones_when_nothing_differs(n: int) -> None:
    scores = np.linspace(0.0, 1.0, n)
    graded, binary = check_accuracy(scores, scores, 0.03, False, bounded=True), check_accuracy(*pairs(n, 0, 0), 0.03, True)
    assert graded.lower is not None
    assert binary.lower is not None
    assert graded.lower <= binary.lower < 0.0
    assert graded.outcome is (Outcome.PASS if n == 719 else Outcome.REFUSE)
    if n == 50:
        assert "about 181 items would decide" in graded.reason  # z^2 / d at d = 0.03


def test_accuracy_of_bounded_scores_passes_with_the_number_of_items_that_its_refuse_names() -> None:
    rng = np.random.default_rng(8)
    diff = rng.normal(-0.01, 0.05, size=4000)
    few = check_accuracy(0.5 + diff[:150], np.full(150, 0.5), 0.03, False, bounded=True)
    assert few.outcome is Outcome.REFUSE
    assert few.value is not None
    needed = int(few.reason.split("about ")[1].split(" items")[0])
    passed = [
        check_accuracy(0.5 + some, np.full(needed, 0.5), 0.03, False, bounded=True).outcome is Outcome.PASS
        for some in (rng.normal(few.value, diff[:150].std(ddof=1), size=needed) for _ in range(200))
    ]
    assert np.mean(passed) > 0.9


def test_accuracy_of_unknown_range_refuses_equal_differences_unless_the_outputs_are_the_same() -> None:
    scores = np.linspace(-3.0, 1.0, 500)
    for shift in (0.0, 0.01, -0.2):
        check = check_accuracy(scores + shift, scores, 0.03, False)
        assert check.outcome is Outcome.REFUSE
        assert "all 500 differences are equal and the metric's range is not known" in check.reason
    same = check_accuracy(scores, scores, 0.03, False, identical=True)
    assert same.outcome is Outcome.PASS
    assert "the outputs are the same values" in same.reason
    assert check_accuracy(scores, scores - 1e-6 * np.sin(np.arange(500)), 0.03, False).outcome is Outcome.PASS
    assert check_floor(np.full(500, 0.9), 0.5, False).outcome is Outcome.REFUSE
    assert check_floor(np.full(500, 0.9), 0.5, False, bounded=True).outcome is Outcome.PASS
    assert check_floor(np.full(50, 1.0), 0.95, False, bounded=True).outcome is Outcome.REFUSE


def test_bounded_scores_outside_their_range_are_refused() -> None:
    with pytest.raises(DataError, match="leave the range"):
        check_accuracy([0.5, 1.5], [0.5, 0.5], 0.1, False, bounded=True)
    with pytest.raises(DataError, match="leave the range"):
        check_floor([0.5, -0.1], 0.1, False, bounded=True)


def test_bounded_scores_outside_by_rounding_count_as_the_bound() -> None:
    exact = np.r_[np.ones(250), np.zeros(250)]
    rounded = exact + np.r_[np.full(250, 1e-7), np.full(250, -1e-9)]
    assert check_accuracy(rounded, exact, 0.03, False, bounded=True) == check_accuracy(exact, exact, 0.03, False, bounded=True)
    assert check_floor(rounded, 0.4, False, bounded=True) == check_floor(exact, 0.4, False, bounded=True)
    assert check_scores(rounded, False, bounded=True, items=500).tolist() == exact.tolist()


@pytest.mark.parametrize(
    ("scores", "binary", "bounded", "says"),
    [
        ([0.5, 1.00001], False, True, "0 to 1, within 1e-6"),
        ([-0.00001, 1.0], False, True, "0 to 1, within 1e-6"),
        ([0.5, 1.0], True, True, "binary = False"),
        ([0.5, float("nan")], False, False, "NaN"),
        ([0.5], False, False, "2 items"),
        ([[0.5], [0.5]], False, False, "one-dimensional"),
    ],
)
def test_scores_that_are_not_what_the_task_says_are_refused(scores: list[float], binary: bool, bounded: bool, says: str) -> None:
    with pytest.raises(DataError, match=says):
        check_scores(scores, binary, bounded=bounded, items=2)


def test_outputs_are_the_same_only_to_the_last_bit_and_by_name() -> None:
    one = {"y": np.array([1.0, 2.0], dtype=np.float32)}
    assert same_outputs(one, {"y": one["y"].copy()})
    assert not same_outputs(one, {"y": np.nextafter(one["y"], np.float32(9))})
    assert not same_outputs(one, {"z": one["y"]})


@pytest.mark.parametrize(
    ("student", "teacher"), [([1.0, math.nan], [1.0, 1.0]), ([1.0, 0.0], [1.0, math.inf]), ([1.0], [1.0, 1.0]), ([0.5, 1.0], [1.0, 1.0]), ([], [])]
)
def test_accuracy_refuses_scores_that_cannot_be_paired(student: list[float], teacher: list[float]) -> None:
    with pytest.raises(DataError):
        check_accuracy(student, teacher, 0.03, True)
