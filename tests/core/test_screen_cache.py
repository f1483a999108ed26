"""Screens from the cache: what was measured together is served together, or not at all."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from edgekd.artifact import StoredArtifact
from edgekd.measuring.measure import Screened, Subject, screen
from edgekd.records import Fingerprint, Limits
from tests.core.fake_device import LIMITS, fake, steady


def test_screen_is_served_whole_or_measured_whole(subjects: Callable[..., list[Subject]], tmp_path: Path) -> None:
    """The device takes half as long again from one call to the next: only latencies of one call have the right ratio."""
    cache, calls = tmp_path / "cache", 0

    def taken(*labels: str, limits: Limits = LIMITS, machine: str = "fake") -> tuple[dict[str, Screened], list[str]]:
        nonlocal calls
        target = fake(steady({"a": 1.5**calls, "b": 2.0 * 1.5**calls, "c": 3.0 * 1.5**calls}))
        target.fingerprint = Fingerprint(fields={"machine": machine})
        calls += 1
        return screen(target, subjects(*labels), percentile=50, limits=limits, seed=0, cache_dir=cache), target.device.flat

    taken("a")
    pair, run = taken("a", "b")
    assert set(run) == {"a", "b"}
    assert pair["b"].latency_ms / pair["a"].latency_ms == pytest.approx(2.0, rel=0.05)
    three, run = taken("a", "b", "c")
    assert set(run) == {"a", "b", "c"}
    assert three["c"].latency_ms / three["a"].latency_ms == pytest.approx(3.0, rel=0.05)
    again, run = taken("b", "a")
    assert run == []
    assert (again["a"].measurement, again["b"].measurement) == (pair["a"].measurement, pair["b"].measurement)
    assert list(again) == ["b", "a"]
    assert set(taken("b", "a", machine="another")[1]) == {"a", "b"}
    assert set(taken("a", limits=msgspec.structs.replace(LIMITS, cpu_share_min=0.999))[1]) == {"a"}


def test_screen_cache_follows_every_byte_whatever_the_metadata_say(subjects: Callable[..., list[Subject]], tmp_path: Path) -> None:
    ms = {"seed0": 1.0, "seed1": 1.0, "again": 1.0}
    cache = tmp_path / "cache"

    def alike(label: str) -> Subject:
        (one,) = subjects(label)
        record = msgspec.structs.replace(one.artifact.record, metadata={"structure": "one net"})
        return Subject(label, StoredArtifact(record, one.artifact.folder), one.inputs)

    first = alike("seed0")
    screen(fake(steady(ms)), [first], percentile=50, limits=LIMITS, seed=0, cache_dir=cache)
    other = fake(steady(ms))
    screen(other, [alike("seed1")], percentile=50, limits=LIMITS, seed=0, cache_dir=cache)
    assert other.device.jobs, "the same net with other weights may take another time"
    same = fake(steady(ms))
    got = screen(same, [Subject("again", first.artifact, first.inputs)], percentile=50, limits=LIMITS, seed=0, cache_dir=cache)
    assert same.device.jobs == []
    assert {launch.label for launch in got["again"].measurement.launches} == {"again"}


def test_screen_measures_anew_when_a_cache_file_is_unreadable(subjects: Callable[..., list[Subject]], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    screen(fake(steady({"a": 1.0})), subjects("a"), percentile=50, limits=LIMITS, seed=0, cache_dir=cache)
    (path,) = (cache / "screen").iterdir()
    path.write_bytes(path.read_bytes()[:-20])
    target = fake(steady({"a": 1.0}))
    screen(target, subjects("a"), percentile=50, limits=LIMITS, seed=0, cache_dir=cache)
    assert target.device.jobs
    again = fake(steady({"a": 1.0}))
    screen(again, subjects("a"), percentile=50, limits=LIMITS, seed=0, cache_dir=cache)
    assert again.device.jobs == []


def test_screen_does_not_store_an_invalid_measurement(subjects: Callable[..., list[Subject]], tmp_path: Path) -> None:
    clean = steady({"a": 1.0})
    target = fake(lambda label, index, rng: dict(clean(label, index, rng)) | {"cpu_share": 0.1})
    screen(target, subjects("a"), percentile=50, limits=LIMITS, seed=0, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache" / "screen").exists()
