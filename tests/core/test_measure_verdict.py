"""The verdict grade against a scripted device: what is rejected, repeated, interleaved and never cached."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekd.contracts import Runtime
from edgekd.errors import InputError, RunnerFailed
from edgekd.measuring.measure import Subject, measure_verdict, screen
from edgekd.records import Clock, Grade, Measurement, Outcome, Snapshot
from edgekd.registry import required_members
from edgekd.verdict import check_latency
from tests.core.fake_device import LIMITS, SENTINEL, SHORT, FakeRuntime, FakeTarget, Script, fake, steady


def never(_: Mapping[str, Measurement]) -> bool:
    return False


def test_fake_runtime_has_every_member_of_the_contract() -> None:
    assert all(hasattr(FakeRuntime, member) for member in required_members(Runtime))


def test_verdict_of_two_runs_in_balanced_blocks(subjects: Callable[..., list[Subject]]) -> None:
    target = fake(steady({"a": 1.0, "b": 2.0}))
    got = measure_verdict(target, subjects("a", "b"), limits=LIMITS, seed=0, undecided=never)
    assert set(target.device.jobs) == {("a", "b", "b", "a"), ("b", "a", "a", "b")}  # both orders, by seed
    assert len(target.device.jobs) == 10
    for label, one in got.items():
        assert (one.label, one.grade, one.valid, one.simulated, len(one.launches)) == (label, Grade.VERDICT, True, "fake", 20)
        assert (one.limits, one.fingerprint, one.protocol) == (LIMITS, target.fingerprint, SHORT)
        assert one.taken_at.endswith("+00:00")
    assert sorted(launch.index for one in got.values() for launch in one.launches) == list(range(40))
    again = fake(steady({"a": 1.0, "b": 2.0}))
    measure_verdict(again, subjects("a", "b"), limits=LIMITS, seed=0, undecided=never)
    assert again.device.jobs == target.device.jobs


def test_verdict_of_many_runs_each_once_a_block_in_changing_order(subjects: Callable[..., list[Subject]]) -> None:
    target = fake(steady({"a": 1.0, "b": 2.0, "c": 3.0}))
    measure_verdict(target, subjects("a", "b", "c"), limits=LIMITS, seed=1, undecided=never)
    assert len(target.device.jobs) == 20
    assert all(sorted(job) == ["a", "b", "c"] for job in target.device.jobs)
    assert len(set(target.device.jobs)) > 3


def test_verdict_repeats_rejected_launches_and_keeps_them_with_the_reason(subjects: Callable[..., list[Subject]]) -> None:
    clean = steady({"a": 1.0, "b": 2.0})

    def script(label: str, index: int, rng: np.random.Generator) -> dict[str, Any]:
        return dict(clean(label, index, rng)) | ({"cpu_share": 0.5} if index % 9 == 4 else {})

    got = measure_verdict(fake(script), subjects("a", "b"), limits=LIMITS, seed=0, undecided=never)
    rejected = [launch for one in got.values() for launch in one.rejected]
    assert rejected
    assert all(launch.index % 9 == 4 and launch.invalid.startswith("contended") for launch in rejected)
    assert all(one.valid and len(one.launches) == 20 for one in got.values())


def test_verdict_is_invalid_when_more_than_a_fifth_is_rejected(subjects: Callable[..., list[Subject]]) -> None:
    clean = steady({"a": 1.0})

    def bad(indices: Callable[[int], bool]) -> tuple[FakeTarget, Measurement]:
        target = fake(lambda label, index, rng: dict(clean(label, index, rng)) | ({"cpu_share": 0.5} if indices(index) else {}))
        return target, measure_verdict(target, subjects("a"), limits=LIMITS, seed=0, undecided=lambda _: True)["a"]

    target, one = bad(lambda index: index < 6)
    assert not one.valid
    assert "6 contended" in one.reason
    assert len(target.device.flat) < 20  # it stops as soon as the share cannot be kept
    check = check_latency(one, 5.0, 50, Clock.END_TO_END, target.profile.measure.verdict)
    assert (check.outcome, check.undecided) == (Outcome.REFUSE, False)
    assert "6 contended" in check.reason
    _, five = bad(lambda index: index < 5)
    assert five.valid
    assert (len(five.launches), len(five.rejected)) == (60, 5)


def test_verdict_of_the_others_goes_on_when_one_is_invalid(subjects: Callable[..., list[Subject]]) -> None:
    clean = steady({"a": 1.0, "b": 2.0})
    target = fake(lambda label, index, rng: dict(clean(label, index, rng)) | ({"samples_ns": (100,) * 80 + (900,) * 20} if label == "a" else {}))
    got = measure_verdict(target, subjects("a", "b"), limits=LIMITS, seed=0, undecided=never)
    assert not got["a"].valid
    assert "unsteady" in got["a"].reason
    assert got["b"].valid
    assert len(got["b"].launches) == 20


def test_verdict_adds_launches_only_while_undecided(subjects: Callable[..., list[Subject]]) -> None:
    seen: list[int] = []

    def until(n: int) -> Callable[[Mapping[str, Measurement]], bool]:
        def undecided(found: Mapping[str, Measurement]) -> bool:
            seen.append(len(found["a"].launches))
            return seen[-1] < n

        return undecided

    for wanted, looks in ((20, [20]), (40, [20, 40]), (1000, [20, 40])):
        seen.clear()
        got = measure_verdict(fake(steady({"a": 1.0})), subjects("a"), limits=LIMITS, seed=0, undecided=until(wanted))
        assert seen == looks
        assert len(got["a"].launches) == min(wanted, 60)


def test_verdict_of_a_close_call_reaches_the_last_look(subjects: Callable[..., list[Subject]]) -> None:
    target = fake(steady({"a": 1.0}, noise=0.02))
    plan = target.profile.measure.verdict

    def undecided(found: Mapping[str, Measurement]) -> bool:
        return check_latency(found["a"], 1.02, 50, Clock.END_TO_END, plan).undecided

    got = measure_verdict(target, subjects("a"), limits=LIMITS, seed=0, undecided=undecided)["a"]
    assert len(got.launches) == 60
    assert check_latency(got, 1.02, 50, Clock.END_TO_END, plan).outcome is Outcome.REFUSE


def test_measuring_refuses_no_subjects_twins_and_foreign_launches(subjects: Callable[..., list[Subject]]) -> None:
    target = fake(steady({"a": 1.0}))
    one = subjects("a")
    for wrong in ([], one * 2):
        with pytest.raises(InputError):
            measure_verdict(target, wrong, limits=LIMITS, seed=0, undecided=never)
    target.device.benchmark = lambda request: ()  # type: ignore[method-assign]  # a device that answers nothing
    with pytest.raises(RunnerFailed):
        measure_verdict(target, one, limits=LIMITS, seed=0, undecided=never)


def test_verdict_is_never_served_from_a_cache(subjects: Callable[..., list[Subject]], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    one = subjects("a")
    screen(fake(steady({"a": 1.0})), one, percentile=50, limits=LIMITS, seed=0, cache_dir=cache)
    before = sorted(cache.rglob("*"))
    for _ in range(2):
        target = fake(steady({"a": 1.0}))
        got = measure_verdict(target, one, limits=LIMITS, seed=0, undecided=never)
        assert len(target.device.flat) == 20
        assert got["a"].grade is Grade.VERDICT
    assert sorted(cache.rglob("*")) == before


def test_cooldown_is_kept_between_jobs(subjects: Callable[..., list[Subject]], monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[float] = []
    monkeypatch.setattr("time.sleep", rests.append)
    target = fake(steady({"a": 1.0, "b": 1.0}), cooldown_s=1.5)
    measure_verdict(target, subjects("a", "b"), limits=LIMITS, seed=0, undecided=never)
    assert rests == [1.5] * (len(target.device.jobs) - 1)


def slow_at(indices: range) -> Script:
    """Launches of one label; those at `indices` come from a device whose fixed kernel takes half as long again."""

    def script(label: str, index: int, rng: np.random.Generator) -> dict[str, Any]:
        state = Snapshot(sentinel_ns=SENTINEL * 3 // 2 if index in indices else SENTINEL, steal_share=0.0)
        return {**steady({label: 1.0})(label, index, rng), "before": state, "after": state}

    return script


@pytest.mark.parametrize(("patience_s", "waits"), [(0.0, 0), (20.0, 3), (2.0, 2)])
def test_a_disturbed_device_is_waited_for_while_patience_lasts(
    patience_s: float, waits: int, subjects: Callable[..., list[Subject]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is the tests' own: a wait of a second takes a second of it. The device is calm after three."""
    now = 0.0
    rests: list[float] = []

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        rests.append(seconds)

    monkeypatch.setattr("time.sleep", sleep)
    monkeypatch.setattr("time.monotonic", lambda: now)
    target = fake(slow_at(range(0, 1)), patience_s=patience_s)
    target.device.snapshot = lambda: Snapshot(sentinel_ns=SENTINEL * 3 // 2 if now < 3.0 else SENTINEL)  # type: ignore[method-assign]  # disturbed for 3 s
    got = measure_verdict(target, subjects("a"), limits=LIMITS, seed=0, undecided=never)["a"]
    assert rests == [1.0] * waits
    assert (len(got.launches), len(got.rejected), got.valid) == (20, 1, True)


def test_a_calm_device_is_not_asked_for_its_state(subjects: Callable[..., list[Subject]]) -> None:
    target = fake(steady({"a": 1.0}))

    def asked() -> Snapshot:
        raise AssertionError("the state was asked for")

    target.device.snapshot = asked  # type: ignore[method-assign]  # a device that must not be asked
    assert measure_verdict(target, subjects("a"), limits=LIMITS, seed=0, undecided=never)["a"].valid
