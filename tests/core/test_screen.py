"""The screen grade against a scripted device: interleaved, ranked by a low quantile, with bounds that hold."""

import math
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from edgekd.measuring.measure import Subject, rank, screen
from edgekd.measuring.screening import _SD_OF_MINIMUM, launches_each
from edgekd.records import Fingerprint, Grade, Launch, Measurement, MeasurePlan
from tests.core.fake_device import LIMITS, SHORT, fake, steady


def test_screen_runs_every_candidate_once_a_round_in_rotating_order(subjects: Callable[..., list[Subject]]) -> None:
    labels = [f"c{i}" for i in range(6)]
    target = fake(steady(dict.fromkeys(labels, 1.0)))
    calls: list[tuple[str, int, int]] = []
    got = screen(target, subjects(*labels), percentile=90, limits=LIMITS, seed=0, progress=lambda *call: calls.append(call))
    assert list(got) == labels
    jobs = target.device.jobs
    assert len(jobs) == 3
    assert all(sorted(job) == labels for job in jobs)
    assert len({job[0] for job in jobs}) == 3
    assert jobs[1] == jobs[0][2:] + jobs[0][:2]
    assert calls[-1] == ("screen", 18, 18)
    assert all(one.measurement.grade is Grade.SCREEN and one.measurement.valid for one in got.values())


def test_screen_scales_to_the_percentile_and_bounds_hold(subjects: Callable[..., list[Subject]]) -> None:
    ms = {f"c{i}": 1.0 + 0.1 * i for i in range(8)}
    factor = math.exp(0.02 * 1.6449)  # 90 % of |normal| lies below 1.645
    got = screen(fake(steady(ms, noise=0.01)), subjects(*ms), percentile=90, limits=LIMITS, seed=0)
    for label, one in got.items():
        assert one.latency_ms == pytest.approx(ms[label] * factor, rel=0.03)
        assert one.lower_ms < ms[label] * factor < one.upper_ms
        assert one.lower_ms < one.latency_ms < one.upper_ms


def test_screen_recovers_the_ranking_when_three_launches_in_ten_are_contaminated(subjects: Callable[..., list[Subject]]) -> None:
    """Half of the contaminated launches show it in their CPU share and are rejected; the other half are slow in nine of ten inferences
    and look clean. The spread limit is lifted, so that only the low quantile stands against them."""
    ms = {f"c{i}": 1.05**i for i in range(12)}
    clean = steady(ms, noise=0.005)
    lifted = msgspec.structs.replace(LIMITS, spread_max=None)

    def script(label: str, index: int, rng: np.random.Generator) -> dict[str, Any]:
        facts = dict(clean(label, index, rng))
        draw = rng.random()
        if draw < 0.30:
            factor = rng.uniform(1.3, 3.0)
            slow = tuple(int(v * factor) if i % 100 >= 11 else v for i, v in enumerate(facts["samples_ns"]))
            facts |= {"samples_ns": slow} | ({"cpu_share": 0.6} if draw < 0.15 else {})
        return facts

    for seed in range(5):
        target = fake(script)
        target.device.rng = np.random.default_rng(seed)
        got = screen(target, subjects(*ms), percentile=50, limits=lifted, seed=seed)
        assert sorted(got, key=lambda label: got[label].latency_ms) == list(ms)
        assert any(one.measurement.rejected for one in got.values())


def test_screen_retries_and_returns_a_candidate_that_was_never_valid(subjects: Callable[..., list[Subject]]) -> None:
    labels = [f"c{i}" for i in range(5)]
    clean = steady(dict.fromkeys(labels, 1.0))
    target = fake(lambda label, index, rng: dict(clean(label, index, rng)) | ({"cpu_share": 0.3} if label == "c2" else {}))
    got = screen(target, subjects(*labels), percentile=50, limits=LIMITS, seed=0)
    assert target.device.flat.count("c2") == 7
    bad = got["c2"].measurement
    assert not bad.valid
    assert "all 7 launches rejected: 7 contended" in bad.reason
    assert got["c2"].lower_ms <= got["c2"].latency_ms <= got["c2"].upper_ms
    assert all(got[label].measurement.valid for label in labels if label != "c2")


def test_screen_is_invalid_as_a_whole_when_the_device_is_too_busy(subjects: Callable[..., list[Subject]]) -> None:
    clean = steady({"a": 1.0, "b": 2.0})
    target = fake(lambda label, index, rng: dict(clean(label, index, rng)) | ({"cpu_share": 0.3} if index % 4 else {}))
    got = screen(target, subjects("a", "b"), percentile=50, limits=LIMITS, seed=0)
    assert not any(one.measurement.valid for one in got.values())
    assert all("rejected" in one.measurement.reason for one in got.values())


def test_screen_bounds_hold_the_true_latency_in_simulation(subjects: Callable[..., list[Subject]]) -> None:
    """Each bound is one-sided at 99 %; the truth here is the median over launches of the percentile."""
    ms = {f"c{i}": 1.0 + 0.2 * i for i in range(6)}
    factor, outside, total = math.exp(0.02 * 0.6745), 0, 0
    several = subjects(*ms)
    for seed in range(60):
        target = fake(steady(ms, noise=0.015))
        target.device.rng = np.random.default_rng(seed)
        for label, one in screen(target, several, percentile=50, limits=LIMITS, seed=seed).items():
            total += 1
            outside += not one.lower_ms <= ms[label] * factor <= one.upper_ms
    assert outside / total <= 0.02 + 4 * math.sqrt(0.02 * 0.98 / total)


def test_standard_deviation_of_a_minimum_matches_simulation() -> None:
    x = np.random.default_rng(0).normal(size=(40000, 7))
    for n, sd in enumerate(_SD_OF_MINIMUM, start=1):
        assert float(x[:, :n].min(axis=1).std()) == pytest.approx(sd, rel=0.02)


def test_screen_of_few_subjects_takes_more_launches(subjects: Callable[..., list[Subject]]) -> None:
    labels = "abcde"
    for count, each in ((1, 7), (2, 5), (3, 4), (4, 3), (5, 3)):
        target = fake(steady(dict.fromkeys(labels, 1.0)))
        got = screen(target, subjects(*labels[:count]), percentile=50, limits=LIMITS, seed=0)
        assert {label: len(one.measurement.launches) for label, one in got.items()} == dict.fromkeys(labels[:count], each)
    assert launches_each(MeasurePlan(launches=5, max_launches=5), 1) == 5
    assert launches_each(MeasurePlan(launches=9, max_launches=12), 30) == 9


def _made(logs: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Measurement:
    launches = tuple(
        Launch(label="", index=index, summary_ns={"min": round(1e9 * math.exp(value)), "median": round(1.1e9 * math.exp(value)), "max": 2_000_000_000})
        for index, value in enumerate(logs)
    )
    return Measurement(
        label="", grade=Grade.SCREEN, artifact="", protocol=SHORT, limits=LIMITS, launches=launches, fingerprint=Fingerprint(fields={"machine": "made up"})
    )


@pytest.mark.parametrize("spreads", [(1,), (1, 1), (1, 3), (1, 1, 1), (1, 1, 3), (1,) * 8])
def test_screen_bounds_miss_in_at_most_one_of_a_hundred_at_each_end(spreads: tuple[float, ...]) -> None:
    """Launches spread by 1 % times the subject's number, and the median is 1.1 times the low: each bound may miss 1100 ms in 1 % of all screens."""
    rng, screens = np.random.default_rng(len(spreads)), 800
    each = launches_each(MeasurePlan(launches=3, max_launches=7), len(spreads))
    low, high, widths = np.zeros(len(spreads)), np.zeros(len(spreads)), []
    for _ in range(screens):
        got = rank({str(position): _made(0.01 * spread * rng.normal(size=each)) for position, spread in enumerate(spreads)}, 50)
        low += [one.lower_ms > 1100.0 for one in got.values()]
        high += [one.upper_ms < 1100.0 for one in got.values()]
        widths.append(math.log(got["0"].upper_ms / got["0"].lower_ms) / 2)
    allowed = 0.01 + 3 * math.sqrt(0.01 * 0.99 / screens)
    assert max(low.max(), high.max()) / screens <= allowed
    if len(set(spreads)) == 1:
        assert float(np.median(widths)) <= 0.03  # three standard deviations; a screen of one subject by three launches had six
