"""A launch is valid or not by its own facts, each with a number in the reason."""

from typing import Any

import msgspec
import pytest

from edgekd.measuring.validity import causes, unchecked, validity_reason
from edgekd.records import Launch, Limits, Snapshot

LIMITS = Limits(temperature_max_c=80.0, sentinel_ns=1_000_000)
STATE = Snapshot(frequency_mhz=2000.0, temperature_c=50.0, steal_share=0.0, sentinel_ns=1_010_000)
GOOD = Launch(label="a", index=0, samples_ns=(100,) * 100, cpu_share=0.99, before=STATE, after=STATE)


def changed(**more: Any) -> Launch:
    return msgspec.structs.replace(GOOD, **more)


def after(**more: Any) -> Launch:
    return changed(after=msgspec.structs.replace(STATE, **more))


@pytest.mark.parametrize(
    ("launch", "cause", "number"),
    [
        (changed(cpu_share=0.94), "contended", "94.0%"),
        (after(steal_share=0.03), "contended", "3.0%"),
        (after(sentinel_ns=1_120_000), "slowed", "12.0%"),
        (changed(before=msgspec.structs.replace(STATE, sentinel_ns=1_120_000)), "slowed", "12.0%"),
        (after(frequency_mhz=1700.0), "throttled", "15.0%"),
        (after(temperature_c=56.0), "heating", "6.0 K"),
        (changed(before=msgspec.structs.replace(STATE, temperature_c=81.0), after=msgspec.structs.replace(STATE, temperature_c=81.0)), "hot", "81.0"),
        (changed(samples_ns=(100,) * 85 + (160,) * 15), "unsteady", "1.600"),
        (after(temperature_c=None), "sensor lost", "temperature_c"),
        (after(sentinel_ns=None), "sensor lost", "sentinel_ns"),
        (after(frequency_mhz=float("nan")), "sensor", "frequency"),
        (changed(cpu_share=float("nan")), "contended", "nan"),
        (changed(invalid="died: signal 9"), "died", "signal 9"),
    ],
)
def test_invalid_launch_is_named_with_its_number(launch: Launch, cause: str, number: str) -> None:
    reason = validity_reason(launch, LIMITS)
    assert reason.startswith(cause)
    assert number in reason


@pytest.mark.parametrize("launch", [GOOD, changed(cpu_share=0.95), after(sentinel_ns=1_100_000), after(frequency_mhz=2100.0, temperature_c=40.0)])
def test_launch_at_or_inside_the_limits_is_valid(launch: Launch) -> None:
    assert validity_reason(launch, LIMITS) == ""


def test_validity_looks_at_neither_label_nor_size_of_the_latency() -> None:
    for label, factor in (("a", 1), ("b", 1000)):
        launch = changed(label=label, index=7, samples_ns=tuple(v * factor for v in GOOD.samples_ns))
        assert validity_reason(launch, LIMITS) == ""


def test_what_is_not_reported_is_not_checked_but_listed() -> None:
    bare = Launch(label="a", index=0, samples_ns=(100,) * 100)
    assert validity_reason(bare, LIMITS) == ""
    assert unchecked([GOOD, bare], LIMITS) == ("cpu share", "frequency", "sentinel", "steal", "temperature", "temperature rise")
    assert unchecked([GOOD], LIMITS) == ()
    assert unchecked([GOOD], msgspec.structs.replace(LIMITS, spread_max=None, sentinel_ns=None)) == ("sentinel", "spread")


def test_sentinel_baseline_can_be_given_or_lie_in_the_limits() -> None:
    slow = after(sentinel_ns=1_300_000)
    assert validity_reason(slow, Limits()) == ""
    assert validity_reason(slow, Limits(), sentinel_ns=1_000_000).startswith("slowed")
    assert validity_reason(slow, LIMITS, sentinel_ns=1_290_000) == ""


def test_sentinel_beside_the_inferences_takes_the_place_of_that_around_the_launch() -> None:
    before = msgspec.structs.replace(STATE, sentinel_ns=1_500_000)
    assert validity_reason(changed(before=before, sentinel_ns=1_090_000, set_aside=40), LIMITS) == ""
    assert validity_reason(changed(sentinel_ns=1_110_000), LIMITS).startswith("slowed")
    assert unchecked([changed(sentinel_ns=1_090_000)], LIMITS) == ()


def test_causes_are_counted_with_the_most_frequent_first() -> None:
    rejected = [changed(invalid="throttled: x"), changed(invalid="contended: y"), changed(invalid="contended: z")]
    assert causes(rejected) == "2 contended, 1 throttled"
    assert causes([]) == ""
