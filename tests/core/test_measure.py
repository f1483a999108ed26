"""Measuring against a scripted device: what is rejected, repeated, interleaved, ranked, cached and never cached."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edgekd.aa import aa_run
from edgekd.artifact import StoredArtifact, store_artifact
from edgekd.contracts import BenchmarkRequest, Runtime
from edgekd.errors import InputError, RunnerFailed
from edgekd.measure import Subject, calibrate_limits, measure_verdict, screen
from edgekd.records import (
    Capabilities,
    Clock,
    Fingerprint,
    Format,
    Grade,
    IOSpec,
    Launch,
    LaunchProtocol,
    Limits,
    MeasureConfig,
    Measurement,
    MeasurePlan,
    OpTime,
    Outcome,
    Precision,
    Profile,
    RuntimeConfig,
    Snapshot,
    SupportReport,
    TensorSpec,
)
from edgekd.registry import required_members
from edgekd.verdict import check_latency

SENTINEL = 1_000_000
SHORT = LaunchProtocol(warmup_min_s=0.0, warmup_max_s=0.0, min_samples=100, min_time_s=0.0)
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


@pytest.fixture
def subjects(tmp_path: Path) -> Callable[..., list[Subject]]:
    spec = IOSpec(inputs=(TensorSpec(name="x", dtype="float32", shape=(1, 2)),), outputs=(TensorSpec(name="y", dtype="float32", shape=(1, 2)),))

    def make(*labels: str, structure: bool = False) -> list[Subject]:
        out = []
        for label in labels:
            folder = tmp_path / label
            folder.mkdir(exist_ok=True)
            (folder / "model.onnx").write_bytes(label.encode())
            metadata = {"structure": label.partition("#")[0]} if structure else {}
            artifact = store_artifact(folder, "model.onnx", format=Format.ONNX, precision=Precision.FP32, iospec=spec, metadata=metadata)
            out.append(Subject(label, artifact, {"x": np.zeros((1, 2), dtype=np.float32)}))
        return out

    return make


def never(_: Mapping[str, Measurement]) -> bool:
    return False


LIMITS = Limits(sentinel_ns=SENTINEL)


def test_fake_runtime_has_every_member_of_the_contract() -> None:
    assert all(hasattr(FakeRuntime, member) for member in required_members(Runtime))


# ---------------------------------------------------------------------------------------------- verdict grade


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


# ---------------------------------------------------------------------------------------------- screen grade


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


def test_screen_serves_the_cache_and_measures_only_what_is_new(subjects: Callable[..., list[Subject]], tmp_path: Path) -> None:
    ms = {"a": 1.0, "b": 2.0, "c": 3.0}
    cache = tmp_path / "cache"
    first = screen(fake(steady(ms)), subjects("a", "b"), percentile=50, limits=LIMITS, seed=0, cache_dir=cache)
    target = fake(steady(ms))
    second = screen(target, subjects("a", "b", "c"), percentile=50, limits=LIMITS, seed=1, cache_dir=cache)
    assert set(target.device.flat) == {"c"}
    assert second["a"].measurement == first["a"].measurement
    other = fake(steady(ms))
    other.fingerprint = Fingerprint(fields={"machine": "another"})
    screen(other, subjects("a", "b"), percentile=50, limits=LIMITS, seed=0, cache_dir=cache)
    assert set(other.device.flat) == {"a", "b"}
    strict = fake(steady(ms))
    screen(strict, subjects("a"), percentile=50, limits=msgspec.structs.replace(LIMITS, cpu_share_min=0.999), seed=0, cache_dir=cache)
    assert set(strict.device.flat) == {"a"}


def test_screen_cache_follows_structure_not_weights(subjects: Callable[..., list[Subject]], tmp_path: Path) -> None:
    ms = {"w8#seed0": 1.0, "w8#seed1": 1.0}
    cache = tmp_path / "cache"
    screen(fake(steady(ms)), subjects("w8#seed0", structure=True), percentile=50, limits=LIMITS, seed=0, cache_dir=cache)
    target = fake(steady(ms))
    got = screen(target, subjects("w8#seed1", structure=True), percentile=50, limits=LIMITS, seed=0, cache_dir=cache)
    assert target.device.jobs == []
    assert {launch.label for launch in got["w8#seed1"].measurement.launches} == {"w8#seed1"}
    plain = fake(steady(ms))
    screen(plain, subjects("w8#seed1"), percentile=50, limits=LIMITS, seed=0, cache_dir=cache)
    assert plain.device.jobs


def test_screen_measures_anew_when_a_cache_file_is_unreadable(subjects: Callable[..., list[Subject]], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    screen(fake(steady({"a": 1.0})), subjects("a"), percentile=50, limits=LIMITS, seed=0, cache_dir=cache)
    (path,) = (cache / "screen").iterdir()
    path.write_bytes(path.read_bytes()[:-20])
    target = fake(steady({"a": 1.0}))
    screen(target, subjects("a"), percentile=50, limits=LIMITS, seed=0, cache_dir=cache)
    assert target.device.jobs
    assert Measurement.load(path).valid


def test_screen_does_not_store_an_invalid_measurement(subjects: Callable[..., list[Subject]], tmp_path: Path) -> None:
    clean = steady({"a": 1.0})
    target = fake(lambda label, index, rng: dict(clean(label, index, rng)) | {"cpu_share": 0.1})
    screen(target, subjects("a"), percentile=50, limits=LIMITS, seed=0, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache" / "screen").exists()


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


# ---------------------------------------------------------------------------------------------- A/A


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


def test_cooldown_is_kept_between_jobs(subjects: Callable[..., list[Subject]], monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[float] = []
    monkeypatch.setattr("time.sleep", rests.append)
    target = fake(steady({"a": 1.0, "b": 1.0}), cooldown_s=1.5)
    measure_verdict(target, subjects("a", "b"), limits=LIMITS, seed=0, undecided=never)
    assert rests == [1.5] * (len(target.device.jobs) - 1)


def test_standard_deviation_of_a_minimum_matches_simulation() -> None:
    from edgekd.screening import _SD_OF_MINIMUM

    x = np.random.default_rng(0).normal(size=(40000, 7))
    for n, sd in enumerate(_SD_OF_MINIMUM, start=1):
        assert float(x[:, :n].min(axis=1).std()) == pytest.approx(sd, rel=0.02)


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
