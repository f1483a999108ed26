"""A scripted device behind the contracts of target and runtime: the one fake of the tests on measuring."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.artifact import StoredArtifact
from edgekd.contracts import BenchmarkRequest, Runtime
from edgekd.records import (
    Capabilities,
    Fingerprint,
    Format,
    Launch,
    LaunchProtocol,
    Limits,
    MeasureConfig,
    MeasurePlan,
    OpTime,
    Precision,
    Profile,
    RuntimeConfig,
    Snapshot,
    SupportReport,
)

SENTINEL = 1_000_000
SHORT = LaunchProtocol(warmup_min_s=0.0, warmup_max_s=0.0, min_samples=100, min_time_s=0.0)
LIMITS = Limits(sentinel_ns=SENTINEL)
Script = Callable[[str, int, np.random.Generator], Mapping[str, Any]]


def steady(ms: Mapping[str, float], noise: float = 0.01) -> Script:
    """Every launch is clean: samples around the label's latency."""

    def script(label: str, index: int, rng: np.random.Generator) -> dict[str, Any]:
        level = ms[label] * math.exp(noise * rng.normal())
        return {"samples_ns": tuple(int(v) for v in 1e6 * level * np.exp(np.abs(0.02 * rng.normal(size=100)))), "cpu_share": 0.995}

    return script


class FakeRuntime:
    """A scripted device: `script(label, index, rng)` tells the facts of each launch. It times nothing and runs nothing."""

    name = "fake"

    def __init__(self, script: Script) -> None:
        self.script = script
        self.jobs: list[tuple[str, ...]] = []
        self.rng = np.random.default_rng(7)

    def open(self) -> None: ...

    def close(self) -> None: ...

    def capabilities(self) -> Capabilities:
        return Capabilities(formats=(Format.ONNX,), precisions=(Precision.FP32,), simulated="fake")

    def fingerprint(self) -> Fingerprint:
        return Fingerprint(fields={"machine": "fake"})

    def snapshot(self) -> Snapshot:
        return Snapshot(sentinel_ns=SENTINEL)

    def supports(self, model: StoredArtifact) -> SupportReport:
        return SupportReport(supported=True)

    def compile(self, model: StoredArtifact, folder: Path) -> StoredArtifact:
        return model

    def benchmark(self, request: BenchmarkRequest) -> tuple[Launch, ...]:
        assert set(request.models) == set(request.inputs) == set(request.schedule)
        self.jobs.append(request.schedule)
        out = []
        for offset, label in enumerate(request.schedule):
            index = request.first_index + offset
            state = Snapshot(sentinel_ns=SENTINEL, steal_share=0.0)
            facts: dict[str, Any] = {"before": state, "after": state, "init_ns": 10, "first_ns": 10}
            out.append(Launch(label=label, index=index, **(facts | dict(self.script(label, index, self.rng)))))
        return tuple(out)

    def infer(self, model: StoredArtifact, inputs: Mapping[str, Any], taps: Sequence[str] = ()) -> dict[str, Any]:
        raise NotImplementedError

    def op_times(self, model: StoredArtifact, inputs: Mapping[str, Any], runs: int = 50) -> tuple[OpTime, ...]:
        raise NotImplementedError

    @property
    def flat(self) -> list[str]:
        return [label for job in self.jobs for label in job]


@dataclass
class FakeTarget:
    """The wire to the scripted device: a profile and its runtime."""

    device: FakeRuntime
    profile: Profile
    transport: Any = None
    simulated: str = "fake"
    runtime: Runtime = field(init=False)
    capabilities: Capabilities = field(init=False)
    fingerprint: Fingerprint = field(init=False)

    def __post_init__(self) -> None:
        self.runtime, self.capabilities, self.fingerprint = self.device, self.device.capabilities(), self.device.fingerprint()

    @property
    def name(self) -> str:
        return self.profile.name


def fake(script: Script, **measure: Any) -> FakeTarget:
    plans = {
        "screen": MeasurePlan(launch=SHORT, launches=3, step=2, max_launches=7, max_reject_share=0.5),
        "verdict": MeasurePlan(launch=SHORT),
    }
    profile = Profile(name="fake", description="scripted", runtime=RuntimeConfig(kind="fake"), measure=MeasureConfig(**(plans | measure)))
    return FakeTarget(FakeRuntime(script), profile)
