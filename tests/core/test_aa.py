"""The A/A run against a scripted device: it narrows the limits, or says that the device is contended."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edgekd.contracts import BenchmarkRequest
from edgekd.measuring.measure import Subject, aa_run, calibrate_limits
from edgekd.records import Launch, Snapshot
from tests.core.fake_device import SENTINEL, FakeTarget, fake, steady


def test_aa_run_interleaves_two_labels_and_narrows_the_limits(subjects: Callable[..., list[Subject]], tmp_path: Path) -> None:
    target = fake(steady({"A": 1.0, "B": 1.0}))
    ceiling = target.profile.measure.limits
    limits = calibrate_limits(target, subjects("a")[0], cache_dir=tmp_path, seed=0)
    assert [sorted(job) for job in target.device.jobs] == [["A", "A", "B", "B"]] * 2
    assert all(job[0] == job[3] for job in target.device.jobs)
    assert limits.sentinel_ns == SENTINEL
    assert limits.spread_max == ceiling.spread_max  # depends on the artifact: never narrowed
    assert limits.steal_max == 0.01
    assert limits.sentinel_drift_max == 0.05
    assert limits.temperature_rise_max_c == ceiling.temperature_rise_max_c  # not reported: the profile's limit stays
    record = aa_run(target, subjects("a")[0], cache_dir=tmp_path, seed=0)
    assert len(target.device.jobs) == 2  # stored
    assert record.contended == ""
    assert 0.0 < record.block_sd < 0.05
    assert len(record.launches) == 8
    assert record.limits == limits


def test_aa_run_that_is_contended_keeps_the_profiles_limits_and_is_taken_again(subjects: Callable[..., list[Subject]], tmp_path: Path) -> None:
    clean = steady({"A": 1.0, "B": 1.0})
    busy = Snapshot(sentinel_ns=3 * SENTINEL, steal_share=0.4)

    def script(label: str, index: int, rng: np.random.Generator) -> dict[str, Any]:
        return dict(clean(label, index, rng)) | ({"cpu_share": 0.4, "before": busy, "after": busy} if index % 2 else {})

    target = fake(script)
    record = aa_run(target, subjects("a")[0], cache_dir=tmp_path, seed=0)
    assert "4 of 8 launches rejected: 4 contended" in record.contended
    assert record.limits == msgspec.structs.replace(target.profile.measure.limits, sentinel_ns=SENTINEL)
    assert list(tmp_path.glob("aa/*")) == []
    aa_run(target, subjects("a")[0], cache_dir=tmp_path, seed=0)
    assert len(target.device.jobs) == 4


def test_aa_run_is_contended_when_one_artifact_differs_from_itself(subjects: Callable[..., list[Subject]], tmp_path: Path) -> None:
    record = aa_run(fake(steady({"A": 1.0, "B": 1.0}, noise=0.4)), subjects("a")[0], cache_dir=tmp_path, seed=0)
    assert record.block_sd > 0.10
    assert "per pair" in record.contended
    assert list(tmp_path.glob("aa/*")) == []


@pytest.mark.parametrize("share", [0.96, 0.999])
def test_aa_run_never_widens_a_limit(subjects: Callable[..., list[Subject]], share: float) -> None:
    clean = steady({"A": 1.0, "B": 1.0})
    hot = Snapshot(sentinel_ns=SENTINEL, steal_share=0.019, temperature_c=54.0, frequency_mhz=1900.0)
    cool = Snapshot(sentinel_ns=round(1.09 * SENTINEL), steal_share=0.0, temperature_c=50.0, frequency_mhz=2000.0)
    target = fake(lambda label, index, rng: dict(clean(label, index, rng)) | {"cpu_share": share, "before": cool, "after": hot})
    ceiling = target.profile.measure.limits
    limits = calibrate_limits(target, subjects("a")[0], cache_dir=None, seed=0)
    assert limits.cpu_share_min is not None
    assert ceiling.cpu_share_min is not None
    assert limits.cpu_share_min >= ceiling.cpu_share_min
    for name in ("steal_max", "sentinel_drift_max", "spread_max", "frequency_drop_max", "temperature_rise_max_c"):
        assert getattr(limits, name) <= getattr(ceiling, name)


def looking_target(states: list[int]) -> FakeTarget:
    """A target whose launches look at the sentinel, and whose states before them are these, the last one for ever."""
    target = fake(steady({"A": 1.0, "B": 1.0}))
    profile = target.profile
    launch = msgspec.structs.replace(profile.measure.screen.launch, look_s=0.01)
    screen = msgspec.structs.replace(profile.measure.screen, launch=launch)
    target.profile = msgspec.structs.replace(profile, measure=msgspec.structs.replace(profile.measure, screen=screen))
    seen = iter(states)
    target.device.snapshot = lambda: Snapshot(sentinel_ns=next(seen, states[-1]))  # type: ignore[method-assign]
    return target


def test_sentinel_is_calibrated_before_launches_that_look_at_it(subjects: Callable[..., list[Subject]], monkeypatch: pytest.MonkeyPatch) -> None:
    target = looking_target([900, 700, 500, 600, 505, 400])
    asked: list[int | None] = []
    run = target.device.benchmark

    def benchmark(request: BenchmarkRequest) -> tuple[Launch, ...]:
        asked.append(request.sentinel_max_ns)
        return run(request)

    monkeypatch.setattr(target.device, "benchmark", benchmark)
    record = aa_run(target, subjects("a")[0], cache_dir=None, seed=0)
    assert asked == [550, 550]  # 10 % over the smallest of five states, two of which agree
    assert record.limits.sentinel_ns == 500


def test_sentinel_that_never_agrees_with_itself_is_calibrated_by_its_shortest(subjects: Callable[..., list[Subject]]) -> None:
    record = aa_run(looking_target([1000 - 30 * index for index in range(25)]), subjects("a")[0], cache_dir=None, seed=0)
    assert record.limits.sentinel_ns == 1000 - 30 * 19
