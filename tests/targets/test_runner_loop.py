"""The on-device runner's warm-up and timed loop, with inferences and a sentinel whose times are given."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

RUNNER = Path(__file__).resolve().parents[2] / "targets" / "runner.py"


@pytest.fixture(scope="module")
def runner() -> dict[str, Any]:
    return runpy.run_path(str(RUNNER), run_name="runner")


@pytest.mark.parametrize(
    ("windows", "limit", "runs"),
    [
        ([100] * 5, 0.05, 15),
        ([200, 150, 100, 100, 100, 100, 100], 0.05, 18),
        ([200, 180, 160, 140, 120, 100, 100, 100, 100, 100], 0.05, 27),
        ([100, 104, 100, 104, 100], 0.005, 15),
        ([100, 100, 150, 100, 100], 0.005, 15),
    ],
)
def test_warm_up_stops_when_medians_of_five_windows_have_no_slope(runner: dict[str, Any], windows: list[int], limit: float, runs: int) -> None:
    def step(index: int) -> int:
        return windows[min(index // 3, len(windows) - 1)]

    done, _, drift = runner["warm_up"](step, {"warmup_min_s": 0.0, "warmup_max_s": 30.0, "warmup_drift": limit})
    assert done == runs
    assert drift < limit


def test_warm_up_ends_at_its_longest_and_says_what_it_reached(runner: dict[str, Any]) -> None:
    done, seconds, drift = runner["warm_up"](lambda index: 1_000_000 - 1000 * (index // 3), {"warmup_min_s": 0.0, "warmup_max_s": 0.02, "warmup_drift": 0.0})
    assert done >= 15
    assert seconds >= 0.02
    assert drift is not None
    assert drift > 0.0
    assert runner["warm_up"](lambda index: 1, {"warmup_min_s": 1.0, "warmup_max_s": 0.0, "warmup_drift": 0.01})[::2] == (0, None)


LOOKING = {"min_samples": 4, "min_time_s": 0.0, "max_time_s": 5.0, "look_s": 0.0}


def looking(runner: dict[str, Any], monkeypatch: pytest.MonkeyPatch, looks: list[int], protocol: dict[str, Any] = LOOKING) -> dict[str, Any]:
    """The timed loop of a model whose inferences take 0, 1, 2, ... ns, with a sentinel that takes these times, the last one for ever."""
    seen = iter(looks)
    monkeypatch.setitem(runner["timed_loop"].__globals__, "look_ns", lambda: next(seen, looks[-1]))
    found: dict[str, Any] = runner["timed_loop"](lambda index: index, protocol, 100)
    return found


def test_inferences_beside_a_slow_sentinel_are_set_aside(runner: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = looking(runner, monkeypatch, [90, 95, 101, 150, 99, 100, 91, 90])
    assert found == {"samples_ns": [0, 4, 5, 6], "sentinel_ns": 100, "set_aside": 3}


def test_launch_that_never_finds_the_device_calm_is_invalid(runner: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = looking(runner, monkeypatch, [90, 90, 90, 101], LOOKING | {"max_time_s": 0.05})
    assert found["set_aside"] > 4
    assert found["samples_ns"] == list(range(found["set_aside"] + 2))  # what a rejected launch saw stays known
    assert re.fullmatch(r"slowed: 2 of \d+ inferences \(.* of 0\.05 s\) were beside a calm sentinel, 4 \(0 s\) needed", found["invalid"])
    assert looking(runner, monkeypatch, [101], LOOKING | {"max_time_s": 0.05})["sentinel_ns"] is None


def test_launch_must_count_its_least_time_and_more_than_half_of_a_slow_model(runner: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    short = looking(runner, monkeypatch, [90] * 6 + [101], LOOKING | {"min_time_s": 0.03, "max_time_s": 0.05})
    assert short["set_aside"] > 0
    assert "(0.03 s) needed" in short["invalid"]
    many = LOOKING | {"min_samples": 10**9, "max_time_s": 0.05}
    assert "invalid" not in looking(runner, monkeypatch, [101, *[90] * 10**6], many)
    assert looking(runner, monkeypatch, [90, 90, 101], many)["invalid"].startswith("slowed: 1 of ")


def test_parts_last_as_long_as_asked_and_one_inference_beside_a_slow_look(runner: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = looking(runner, monkeypatch, [101, 101, 101, 90, 90], LOOKING | {"look_s": 0.02, "min_samples": 20})
    assert found["set_aside"] == 3
    assert found["samples_ns"][0] == 3
    assert len(found["samples_ns"]) > 20  # a part is not cut short


def test_loop_without_looks_takes_what_is_asked(runner: dict[str, Any]) -> None:
    assert runner["timed_loop"](lambda index: index, LOOKING, None) == {"samples_ns": [0, 1, 2, 3]}
