"""A verdict is measured anew: no gate takes over launches that another call left on the device; a killed run finds its own again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edgekd.benching import bench
from edgekd.contracts import BenchmarkRequest
from edgekd.gating import gate
from edgekd.options import Options
from edgekd.quantize_only import quantize_only
from edgekd.records import Budget, Launch, LaunchProtocol
from edgekd.target import LiveTarget, connect
from edgekd.terms import portable
from tests.pipeline.bundle_kit import ROOT, bundle_copy, home, resealed

WAIT_S = 60.0
MARK = 37
"""So many samples has a launch of the verdict, and no other."""
SCREEN = ("measure.screen.launch.warmup_min_s=0.0", "measure.screen.launch.warmup_max_s=0.02", "measure.screen.launch.min_time_s=0.02")
VERDICT = (
    "measure.verdict.launches=4",
    "measure.verdict.step=1",
    "measure.verdict.max_launches=4",
    "measure.verdict.launch.warmup_min_s=0.0",
    "measure.verdict.launch.warmup_max_s=0.02",
    f"measure.verdict.launch.min_samples={MARK}",
    "measure.verdict.launch.min_time_s=0.1",
    "measure.verdict.launch.max_time_s=0.2",
)
CALM = tuple(
    f"measure.limits.{name}=off" for name in ("cpu_share_min", "steal_max", "sentinel_drift_max", "spread_max", "frequency_drop_max", "temperature_rise_max_c")
)


class Listening:
    """A runtime that notes the nonce of every job, and may be interrupted before one."""

    def __init__(self, runtime: Any, verdict: LaunchProtocol) -> None:
        self._runtime = runtime
        self._verdict = verdict
        self.nonces: list[tuple[str, str]] = []
        self.interrupt_at_verdict_job = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def benchmark(self, request: BenchmarkRequest) -> tuple[Launch, ...]:
        self.nonces.append(("verdict" if request.protocol == self._verdict else "screen", request.nonce))
        if self.of("verdict") and len(self.of("verdict")) == self.interrupt_at_verdict_job:
            raise KeyboardInterrupt
        launches: tuple[Launch, ...] = self._runtime.benchmark(request)
        return launches

    def of(self, grade: str) -> list[str]:
        return [nonce for known, nonce in self.nonces if known == grade]


def listening(live: LiveTarget) -> Listening:
    heard = Listening(live.runtime, live.profile.measure.verdict.launch)
    live.runtime = heard
    return heard


def test_every_gate_and_every_bench_has_jobs_of_its_own(tmp_path: Path) -> None:
    bundle = bundle_copy(tmp_path / "bundle")
    with connect("null") as live:
        heard = listening(live)
        seen = []
        for call in (
            lambda: gate(bundle, target=live),
            lambda: gate(bundle, target=live),
            lambda: bench(home() / "net.onnx", target=live),
            lambda: bench(home() / "net.onnx", target=live, verdict_grade=True),
        ):
            heard.nonces.clear()
            call()
            (nonce,) = {nonce for _, nonce in heard.nonces}
            seen.append(nonce)
    assert all(seen)
    assert len(set(seen)) == len(seen)


def nonces_of_a_run(run_dir: Path, interrupt_at: int = 0) -> list[str]:
    with connect("null") as live:
        heard = listening(live)
        heard.interrupt_at_verdict_job = interrupt_at
        arguments: dict[str, Any] = {"target": live, "budget": Budget(latency_share=0.9, max_drop=0.5), "run_dir": run_dir}
        if interrupt_at:
            with pytest.raises(KeyboardInterrupt):
                quantize_only(home() / "net.onnx", home() / "data", options=Options(accept_simulated=True), **arguments)
        else:
            quantize_only(home() / "net.onnx", home() / "data", options=Options(accept_simulated=True), **arguments)
    return heard.of("verdict")


@pytest.mark.slow
def test_a_run_that_was_interrupted_asks_for_its_own_verdict_jobs_and_another_run_for_others(tmp_path: Path) -> None:
    first = nonces_of_a_run(tmp_path / "run", interrupt_at=3)
    again = nonces_of_a_run(tmp_path / "run")
    assert len(set(first)) == 1
    assert first[0]
    assert set(again) == set(first)
    other = nonces_of_a_run(tmp_path / "other")
    assert set(other).isdisjoint(first)
    assert other[0]


@pytest.mark.slow
def test_gate_takes_nothing_over_from_a_gate_that_was_killed(tmp_path: Path) -> None:
    device = tmp_path / "device"
    here = (f"transport.workdir={device}", f"runtime.options.lock={tmp_path / 'lock'}")
    with connect("local", overrides=(*SCREEN, *VERDICT, *CALM, *here)) as live:
        profile, fingerprint = portable(live.profile)[0], live.fingerprint
    bundle = resealed(bundle_copy(tmp_path / "bundle"), profile=profile, fingerprint=fingerprint, latency_limit_ms=10_000.0, latency_limit_upper_ms=None)
    words = [sys.executable, "-m", "edgekd", "gate", str(bundle), *(word for item in here for word in ("--set", item))]
    host = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    job = wait_for(lambda: verdict_job(device), host)
    wait_for(lambda: (device / "jobs" / job / "stdout").stat().st_size, host)
    os.kill(host.pid, signal.SIGKILL)
    host.wait(WAIT_S)
    wait_for(lambda: (device / "jobs" / job / "end.json").is_file())
    left = [json.loads(line)["launch"] for line in (device / "jobs" / job / "stdout").read_text().splitlines() if '"launch"' in line]
    assert len(left) == 4, "the job outlived its host"
    result = gate(bundle, overrides=here)
    assert result.measurement is not None
    assert len(result.measurement.launches) == 4
    assert min(launch.started_at for launch in result.measurement.launches) >= max(launch["started_at"] for launch in left)
    assert {launch.samples_ns for launch in result.measurement.launches}.isdisjoint(tuple(launch["samples_ns"]) for launch in left)


def verdict_job(device: Path) -> str:
    """The name of a job of verdict grade that was started, or nothing."""
    for path in device.glob("work/*/job.json"):
        if json.loads(path.read_text()).get("protocol", {}).get("min_samples") == MARK and (device / "jobs" / path.parent.name / "stdout").exists():
            return path.parent.name
    return ""


def wait_for(asked: Any, host: subprocess.Popen[bytes] | None = None) -> Any:
    deadline = time.monotonic() + WAIT_S
    while not (found := asked()):
        assert time.monotonic() < deadline
        assert host is None or host.poll() is None
        time.sleep(0.01)
    return found
