"""The verdict: each rule, each boundary, each refusal."""

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest

from edgekd.errors import BudgetError, InputError, MeasurementInvalid
from edgekd.records import Budget, Check, Clock, Fingerprint, Grade, Launch, LaunchProtocol, Limits, Measurement, MeasurePlan, Outcome, Snapshot
from edgekd.stats import min_samples, student_quantile, tolerance_factor
from edgekd.verdict import (
    EXIT_OF,
    Limit,
    check_accuracy,
    check_ceiling,
    check_floor,
    check_latency,
    combine,
    is_undecided,
    judge,
    look_confidence,
    planned_looks,
    require_samples,
    resolve_limit,
)

PLAN = MeasurePlan()


def measurement(per_launch_ms: Sequence[float], *, count: int = 200, label: str = "student", **more: Any) -> Measurement:
    launches = tuple(
        Launch(label=label, index=i, samples_ns=(round(ms * 1e6),) * count, init_ns=round(ms * 1e7), first_ns=round(ms * 2e6), peak_memory_bytes=5_000_000)
        for i, ms in enumerate(per_launch_ms)
    )
    fields: dict[str, Any] = {"launches": launches, "limits": Limits(), "protocol": LaunchProtocol(), "fingerprint": Fingerprint(fields={"isa": "x"})}
    return Measurement(label=label, grade=Grade.VERDICT, artifact="0" * 64, **(fields | more))


def noisy(n: int, mean_ms: float, sd: float, seed: int = 0) -> list[float]:
    x = np.random.default_rng(seed).normal(size=n)
    x = (x - x.mean()) / x.std(ddof=1)  # exactly this mean and standard deviation of the logarithm
    return [float(v) for v in mean_ms * np.exp(sd * x)]


def test_latency_passes_exactly_up_to_the_tolerance_bound() -> None:
    values = noisy(20, 1.0, 0.02)
    edge = math.exp(tolerance_factor(20, 0.90, 1 - 0.01 / 3) * 0.02)
    just, short = (check_latency(measurement(values), edge * f, 90, Clock.END_TO_END, PLAN) for f in (1.0001, 0.9999))
    assert (just.outcome, short.outcome) == (Outcome.PASS, Outcome.REFUSE)
    assert short.undecided
    assert not just.undecided
    assert just.upper == pytest.approx(edge, rel=1e-5)
    assert just.value == pytest.approx(1.0, rel=1e-5)


def test_latency_fails_exactly_from_the_lower_bound_of_the_mean() -> None:
    values = noisy(20, 1.0, 0.02)
    check = check_latency(measurement(values), 0.9, 90, Clock.END_TO_END, PLAN)
    assert check.outcome is Outcome.FAIL
    assert check.lower is not None
    assert check_latency(measurement(values), check.lower * 0.9999, 90, Clock.END_TO_END, PLAN).outcome is Outcome.FAIL
    assert check_latency(measurement(values), check.lower * 1.0001, 90, Clock.END_TO_END, PLAN).outcome is Outcome.REFUSE


def test_latency_stays_undecided_until_the_last_look() -> None:
    looks = [check_latency(measurement(noisy(n, 1.0, 0.02)), 1.005, 90, Clock.END_TO_END, PLAN) for n in (20, 40, 60)]
    assert [c.outcome for c in looks] == [Outcome.REFUSE] * 3
    assert [c.undecided for c in looks] == [True, True, False]


def test_looks_share_the_error_of_one_percent() -> None:
    assert planned_looks(PLAN) == 3
    assert look_confidence(PLAN) == pytest.approx(1 - 0.01 / 3)
    assert planned_looks(MeasurePlan(launches=20, step=15, max_launches=40)) == 3
    assert planned_looks(MeasurePlan(launches=20, max_launches=20)) == 1
    assert planned_looks(MeasurePlan(launches=20, max_launches=5)) == 1
    assert [round(tolerance_factor(n, 0.9, look_confidence(PLAN)), 2) for n in (20, 40, 60)] == [2.51, 2.03, 1.86]


def test_equal_latencies_pass_at_their_own_value_and_fail_below_it() -> None:
    values = [0.3] * 20
    assert check_latency(measurement(values), 0.3, 90, Clock.END_TO_END, PLAN).outcome is Outcome.PASS
    assert check_latency(measurement(values), 0.2999, 90, Clock.END_TO_END, PLAN).outcome is Outcome.FAIL


def test_latency_judges_init_and_first_by_one_value_a_launch() -> None:
    one = measurement([0.1] * 20, count=1)
    assert check_latency(one, 1.0, 90, Clock.INIT, PLAN, "initialization").value == pytest.approx(1.0)
    assert check_latency(one, 0.19, 90, Clock.FIRST, PLAN, "first inference").outcome is Outcome.FAIL
    with pytest.raises(InputError, match="no times of the clock"):
        check_latency(one, 1.0, 90, Clock.DEVICE, PLAN)


def test_init_and_first_are_judged_by_launches_that_began_on_a_calm_device() -> None:
    one = measurement([0.1] * 20 + [0.5] * 5, limits=Limits(sentinel_ns=100))
    states = [Snapshot(sentinel_ns=100)] * 20 + [Snapshot(sentinel_ns=150)] * 5
    launches = tuple(msgspec.structs.replace(launch, before=state, sentinel_ns=100) for launch, state in zip(one.launches, states, strict=True))
    mixed = msgspec.structs.replace(one, launches=launches)
    for clock, value in ((Clock.INIT, 1.0), (Clock.FIRST, 0.2)):
        check = check_latency(mixed, 10.0, 90, clock, PLAN)
        assert check.n == 20
        assert check.value == pytest.approx(value)
    assert check_latency(mixed, 10.0, 90, Clock.END_TO_END, PLAN).n == 25
    few = check_latency(msgspec.structs.replace(mixed, launches=launches[1:]), 10.0, 90, Clock.INIT, PLAN)
    assert (few.outcome, few.undecided) == (Outcome.REFUSE, True)
    assert "19 valid launches that began on a calm device of 20" in few.reason
    half = resolve_limit(Budget(latency_share=0.5, clock=Clock.INIT), PLAN, mixed, allow_extreme=True)
    assert half.ms == pytest.approx(0.5)
    assert half.upper_ms == pytest.approx(0.5)


def test_latency_says_what_share_of_the_inferences_was_set_aside() -> None:
    one = measurement([0.1] * 20)
    aside = msgspec.structs.replace(one, launches=tuple(msgspec.structs.replace(launch, set_aside=600) for launch in one.launches))
    assert "75% of the inferences set aside" in check_latency(aside, 1.0, 90, Clock.END_TO_END, PLAN).reason
    assert "set aside" not in check_latency(one, 1.0, 90, Clock.END_TO_END, PLAN).reason


@pytest.mark.parametrize(("percentile", "needed"), [(50, 11), (90, 64), (99, 662)])
def test_latency_refuses_too_few_samples_by_naming_the_minimum(percentile: float, needed: int) -> None:
    assert min_samples(percentile) == needed
    with pytest.raises(InputError, match=f"at least {needed}"):
        check_latency(measurement([0.1] * 20, count=needed - 1), 1.0, percentile, Clock.END_TO_END, PLAN)
    assert check_latency(measurement([0.1] * 20, count=needed), 1.0, percentile, Clock.END_TO_END, PLAN).outcome is Outcome.PASS
    with pytest.raises(InputError, match=f"at least {needed}"):
        require_samples(LaunchProtocol(min_samples=needed - 1), percentile)
    require_samples(LaunchProtocol(min_samples=needed), percentile)


def test_latency_refuses_an_invalid_measurement_with_its_reason() -> None:
    bad = measurement([0.1] * 20, valid=False, reason="6 of 12 launches rejected: 6 contended")
    for limit in (1e-6, 1e6):
        check = check_latency(bad, limit, 90, Clock.END_TO_END, PLAN)
        assert check.outcome is Outcome.REFUSE
        assert "6 contended" in check.reason
        assert not check.undecided


def test_latency_refuses_too_few_launches_but_stays_open() -> None:
    for n in (0, 1, 19):
        check = check_latency(measurement([0.1] * n), 1.0, 90, Clock.END_TO_END, PLAN)
        assert check.outcome is Outcome.REFUSE
        assert check.undecided


def test_latency_of_summaries_passes_by_the_maximum_and_never_fails() -> None:
    def summaries(worst_ms: float, n: int = 20) -> Measurement:
        launches = tuple(
            Launch(label="s", index=i, summary_ns={"min": 90_000, "median": 100_000, "max": round(worst_ms * 1e6) if i == 3 else 110_000}) for i in range(n)
        )
        return measurement([], launches=launches)

    assert check_latency(summaries(0.11), 0.12, 90, Clock.END_TO_END, PLAN).outcome is Outcome.PASS
    assert check_latency(summaries(0.13), 0.12, 90, Clock.END_TO_END, PLAN).outcome is Outcome.REFUSE
    assert check_latency(summaries(0.11, 60), 0.01, 90, Clock.END_TO_END, PLAN).outcome is Outcome.REFUSE


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan, math.inf])
def test_checks_refuse_limits_that_are_no_numbers(limit: float) -> None:
    with pytest.raises(BudgetError):
        check_latency(measurement([0.1] * 20), limit, 90, Clock.END_TO_END, PLAN)
    with pytest.raises(BudgetError):
        check_ceiling("size", 1.0, limit, "MB")
    if limit != 0.0:  # no drop at all is a meaningful limit
        with pytest.raises(BudgetError):
            check_accuracy([1.0, 0.0], [1.0, 0.0], limit, True)


def test_floor_and_ceiling_decide() -> None:
    scores = np.r_[np.ones(950), np.zeros(50)]
    assert [check_floor(scores, f, True).outcome for f in (0.9, 0.95, 0.99)] == [Outcome.PASS, Outcome.REFUSE, Outcome.FAIL]
    graded = np.random.default_rng(0).normal(0.8, 0.1, size=500)
    assert [check_floor(graded, f, False).outcome for f in (0.75, float(graded.mean()), 0.85)] == [Outcome.PASS, Outcome.REFUSE, Outcome.FAIL]
    assert [check_ceiling("size", v, 1.0, "MB").outcome for v in (1.0, 1.001, None)] == [Outcome.PASS, Outcome.FAIL, Outcome.REFUSE]


def made(outcome: Outcome, undecided: bool = False) -> Check:
    return Check(name=outcome.value, outcome=outcome, value=1.0, limit=1.0, unit="ms", reason="0.1 ms", undecided=undecided)


P, F, R = (made(outcome) for outcome in (Outcome.PASS, Outcome.FAIL, Outcome.REFUSE))


@pytest.mark.parametrize(
    ("checks", "simulated", "accept", "expected"),
    [
        ([P, P], "", False, Outcome.PASS),
        ([P, R], "", False, Outcome.REFUSE),
        ([R, F, P], "", False, Outcome.FAIL),
        ([P], "null", False, Outcome.REFUSE),
        ([P], "null", True, Outcome.PASS),
        ([F], "null", False, Outcome.REFUSE),
        ([R, F], "null", False, Outcome.REFUSE),
        ([R], "null", False, Outcome.REFUSE),
        ([F], "null", True, Outcome.FAIL),
        ([R], "null", True, Outcome.REFUSE),
    ],
)
def test_combine_orders_fail_before_refuse_before_pass(checks: list[Check], simulated: str, accept: bool, expected: Outcome) -> None:
    verdict = combine(checks, simulated, accept)
    assert verdict.outcome is expected
    assert "\n" not in verdict.reason
    assert verdict.accepted_simulated == (bool(simulated) and accept)
    assert ("simulated (null)" in verdict.reason) == (simulated == "null")
    assert verdict.checks == tuple(checks)
    by_itself = Outcome.FAIL if F in checks else Outcome.REFUSE if R in checks else Outcome.PASS
    assert (f"accepted it would be a {by_itself.value}" in verdict.reason) == (expected is not by_itself)


def test_exit_codes_tell_the_three_outcomes() -> None:
    assert [EXIT_OF[o] for o in (Outcome.PASS, Outcome.FAIL, Outcome.REFUSE)] == [0, 1, 2]


def test_undecided_waits_for_launches_only_while_nothing_failed() -> None:
    waiting = made(Outcome.REFUSE, True)
    assert is_undecided(combine([P, waiting]))
    assert not is_undecided(combine([F, waiting]))
    assert not is_undecided(combine([P, R]))


def test_judge_checks_every_line_of_the_budget() -> None:
    budget = Budget(latency_ms=0.3, percentile=90, max_drop=0.03, accuracy_floor=0.9, size_mb=1.0, memory_mb=6.0, first_inference_ms=1.0, init_ms=5.0)
    student, teacher = np.ones(719), np.ones(719)
    teacher[:7] = student[7:14] = 0  # seven items only the one has right, seven only the other
    args: dict[str, Any] = {"budget": budget, "limit_ms": 0.3, "plan": PLAN, "binary": True, "student_scores": student, "teacher_scores": teacher}
    verdict = judge(measurement=measurement(noisy(20, 0.2, 0.01)), size_bytes=900_000, **args)
    assert verdict.outcome is Outcome.PASS
    names = ["latency", "first inference", "initialization", "size", "memory", "accuracy drop", "accuracy floor"]
    assert [check.name for check in verdict.checks] == names
    big = judge(measurement=measurement(noisy(20, 0.2, 0.01)), size_bytes=1_100_000, **args)
    assert big.outcome is Outcome.FAIL
    assert big.reason.startswith("size: 1.1 MB")
    assert judge(measurement=measurement(noisy(20, 0.2, 0.01), simulated="null"), size_bytes=1, **args).outcome is Outcome.REFUSE
    with pytest.raises(InputError, match="size"):
        judge(measurement=measurement([0.2] * 20), **args)
    with pytest.raises(InputError, match="scores"):
        judge(measurement=measurement([0.2] * 20), size_bytes=1, **(args | {"student_scores": None}))


def test_judge_refuses_a_share_of_an_invalid_teacher() -> None:
    teacher = measurement([1.0] * 20, label="teacher", valid=False, reason="9 of 20 launches rejected: 9 contended")
    verdict = judge(budget=Budget(latency_share=0.5), limit_ms=0.5, measurement=measurement([0.1] * 20), plan=PLAN, teacher_measurement=teacher)
    assert verdict.outcome is Outcome.REFUSE
    assert "9 contended" in verdict.reason
    slow = judge(budget=Budget(latency_share=0.5), limit_ms=0.5, measurement=measurement([0.9] * 20), plan=PLAN, teacher_measurement=teacher)
    assert slow.outcome is Outcome.REFUSE, "a limit that was not measured is not exceeded either"
    assert not is_undecided(slow)


def test_limit_of_a_share_has_the_two_ends_of_the_teachers_mean() -> None:
    limit = resolve_limit(Budget(latency_share=0.5), PLAN, measurement(noisy(20, 2.0, 0.05)))
    assert limit.upper_ms is not None
    assert math.sqrt(limit.ms * limit.upper_ms) == pytest.approx(1.0, rel=1e-5)
    assert look_confidence(PLAN, share=True) == pytest.approx(1 - 0.01 / 6)
    half = student_quantile(1 - 0.01 / 6, 19) * 0.05 / math.sqrt(20)
    assert math.log(limit.upper_ms / limit.ms) / 2 >= half * (1 - 1e-5)
    equal = resolve_limit(Budget(latency_share=0.5), PLAN, measurement([2.0] * 20))
    assert equal.ms == pytest.approx(1.0)
    assert equal.upper_ms == pytest.approx(1.0)
    assert resolve_limit(Budget(latency_ms=0.3), PLAN) == Limit(0.3)


@pytest.mark.parametrize(("student_ms", "expected"), [(0.90, Outcome.PASS), (0.97, Outcome.REFUSE), (1.03, Outcome.REFUSE), (1.10, Outcome.FAIL)])
def test_latency_against_a_share_decides_only_outside_the_teachers_uncertainty(student_ms: float, expected: Outcome) -> None:
    limit = resolve_limit(Budget(latency_share=0.5), PLAN, measurement(noisy(20, 2.0, 0.05)))
    check = check_latency(measurement(noisy(20, student_ms, 0.005, seed=1)), limit, 90, Clock.END_TO_END, PLAN)
    assert check.outcome is expected
    assert check.limit == limit.ms
    assert "the teacher included" in check.reason


def test_share_of_the_demo_passes_with_a_teacher_that_spreads() -> None:
    """A teacher of 1.7 ms with 5 %, a student of 0.12 ms: half the teacher's latency is far away."""
    limit = resolve_limit(Budget(latency_share=0.5), PLAN, measurement(noisy(20, 1.7, 0.05)))
    assert check_latency(measurement(noisy(20, 0.12, 0.05)), limit, 50, Clock.END_TO_END, PLAN).outcome is Outcome.PASS


def test_limit_needs_a_teacher_that_was_measured() -> None:
    with pytest.raises(BudgetError, match="teacher"):
        resolve_limit(Budget(latency_share=0.5), PLAN)
    nothing = measurement([], valid=False, reason="6 of 6 launches rejected: 6 contended")
    with pytest.raises(MeasurementInvalid, match="6 contended") as caught:
        resolve_limit(Budget(latency_share=0.5), PLAN, nothing)
    assert caught.value.exit_code == 2
    with pytest.raises(MeasurementInvalid):
        resolve_limit(Budget(latency_share=0.5), PLAN, measurement([1.0]))


@pytest.mark.parametrize("wrong", [300.0, 2.1, 0.019, 0.0003])
def test_limit_in_the_wrong_unit_stops_unless_allowed(wrong: float) -> None:
    teacher = measurement([2.0] * 3)
    with pytest.raises(BudgetError, match="milliseconds"):
        resolve_limit(Budget(latency_ms=wrong), PLAN, teacher)
    assert resolve_limit(Budget(latency_ms=wrong), PLAN, teacher, allow_extreme=True) == Limit(wrong)


def test_limit_takes_a_short_screen_but_no_short_verdict() -> None:
    short = measurement([2.0] * 3, count=50)
    screened = Measurement.from_json(short.to_json().replace(b'"grade":"verdict"', b'"grade":"screen"'))
    assert resolve_limit(Budget(latency_share=0.5, percentile=90), PLAN, screened).ms == pytest.approx(1.0)
    with pytest.raises(InputError, match="at least 64"):
        resolve_limit(Budget(latency_share=0.5, percentile=90), PLAN, short)
