"""A cached measurement belongs to the state that the device was set to: its governor and its power mode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgekd.measuring.aa import aa_run
from edgekd.measuring.measure import Subject, screen
from edgekd.records import Snapshot
from tests.core.fake_device import LIMITS, SENTINEL, FakeRuntime, FakeTarget, fake, steady


class SetDevice(FakeRuntime):
    """The scripted device, with a governor and a power mode."""

    state = Snapshot(sentinel_ns=SENTINEL, governor="performance", power_mode="15W", frequency_mhz=2400.0, temperature_c=40.0)

    def snapshot(self) -> Snapshot:
        return self.state


def device(**state: str | float) -> FakeTarget:
    made = fake(steady({"a": 1.0, "A": 1.0, "B": 1.0}))
    runtime = SetDevice(made.device.script)
    fields = {name: getattr(SetDevice.state, name) for name in SetDevice.state.__struct_fields__}
    runtime.state = Snapshot(**(fields | state))
    return FakeTarget(runtime, made.profile)


CASES = [
    pytest.param({}, False, id="as it was"),
    pytest.param({"temperature_c": 55.0, "frequency_mhz": 2300.0}, False, id="readings"),
    pytest.param({"governor": "powersave"}, True, id="governor"),
    pytest.param({"power_mode": "30W"}, True, id="power mode"),
]


@pytest.mark.parametrize(("state", "anew"), CASES)
def test_screen_is_taken_anew_when_the_device_is_set_otherwise(
    subjects: Callable[..., list[Subject]], tmp_path: Path, state: dict[str, str], anew: bool
) -> None:
    for target, measured in ((device(), True), (device(**state), anew), (device(), False)):
        screen(target, subjects("a"), percentile=50, limits=LIMITS, seed=0, cache_dir=tmp_path / "cache")
        assert bool(target.device.jobs) == measured


@pytest.mark.parametrize(("state", "anew"), CASES)
def test_aa_run_is_taken_anew_when_the_device_is_set_otherwise(
    subjects: Callable[..., list[Subject]], tmp_path: Path, state: dict[str, str], anew: bool
) -> None:
    for target, measured in ((device(), True), (device(**state), anew), (device(), False)):
        record = aa_run(target, subjects("a")[0], cache_dir=tmp_path / "cache", seed=0)
        assert not record.contended
        assert bool(target.device.jobs) == measured
