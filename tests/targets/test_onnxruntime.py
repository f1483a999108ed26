"""ONNX Runtime through the runner passes the suite of runtimes, and no measurement is lost with its host."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgekd import registry
from edgekd.artifact import StoredArtifact, store_artifact
from edgekd.contracts import BenchmarkRequest, Runtime, Transport
from edgekd.errors import BundleError, DataError, DeviceBusy, DeviceError, MissingDependency, ModelError, ProfileError, UnsupportedModel
from edgekd.records import Format, IOSpec, LaunchProtocol, MeasureConfig, Precision, Profile, RuntimeConfig, TensorSpec, TransportConfig
from edgekd.testing import QUICK_PROTOCOL, RuntimeContract, two_headed, two_headed_outputs, two_inputs

ROOT = Path(__file__).resolve().parents[2]
LONG = LaunchProtocol(warmup_min_s=0.0, warmup_max_s=0.0, min_samples=10, min_time_s=0.3, max_time_s=0.3)
WAIT_S = 30.0
HOST = """
import sys
from pathlib import Path
import numpy as np
from edgekd import registry
from edgekd.artifact import StoredArtifact
from edgekd.contracts import BenchmarkRequest
from edgekd.records import Artifact, LaunchProtocol, Profile
folder = Path(sys.argv[1])
profile = Profile.load(folder / "profile.json")
transport = registry.load("transports", "local")(profile)
transport.open()
runtime = registry.load("runtimes", "onnxruntime")(profile, transport)
runtime.open()
model = StoredArtifact(Artifact.load(folder / "artifact.json"), folder)
inputs = {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in ("a", "b")}
protocol = LaunchProtocol.load(folder / "protocol.json")
runtime.benchmark(BenchmarkRequest(models={"x": model}, schedule=("x",) * int(sys.argv[2]), inputs={"x": inputs}, protocol=protocol))
"""


def profile(workdir: Path, *, python: str = "", lock_wait_s: float = 60.0, **options: bool | str) -> Profile:
    return Profile(
        name="test",
        description="test",
        transport=TransportConfig(workdir=str(workdir), python=python),
        runtime=RuntimeConfig(options={"lock": f"{workdir}.lock", **options}),
        measure=MeasureConfig(lock_wait_s=lock_wait_s),
    )


def pair(target: Profile) -> tuple[Transport, Runtime]:
    transport: Transport = registry.load("transports", "local")(target)
    transport.open()
    runtime: Runtime = registry.load("runtimes", "onnxruntime")(target, transport)
    return transport, runtime


def request(model: StoredArtifact, launches: int, protocol: LaunchProtocol = LONG, seed: int = 0) -> BenchmarkRequest:
    return BenchmarkRequest(models={"x": model}, schedule=("x",) * launches, inputs={"x": two_inputs(2)}, protocol=protocol, seed=seed)


def single(
    folder: Path, nodes: list[onnx.NodeProto], *, domain: str = "", dtype: int = TensorProto.FLOAT, shape: tuple[int | str, ...] = (1, 4)
) -> StoredArtifact:
    """A model with the input x and the output y."""
    folder.mkdir(parents=True, exist_ok=True)
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", dtype, list(shape))], [helper.make_tensor_value_info("y", dtype, None)])
    opsets = [helper.make_opsetid("", 18)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / "m.onnx")
    name = "string" if dtype == TensorProto.STRING else "float32"
    iospec = IOSpec(inputs=(TensorSpec(name="x", dtype=name, shape=shape),), outputs=(TensorSpec(name="y", dtype=name, shape=shape),))
    return store_artifact(folder, "m.onnx", format=Format.ONNX, precision=Precision.FP32, iospec=iospec, opset=18)


def start_host(workdir: Path, model: StoredArtifact, launches: int) -> subprocess.Popen[bytes]:
    """Another process that benchmarks `request(model, launches)`; it is returned when its first launch is on the device."""
    asked = request(model, launches)
    profile(workdir).save(model.folder / "profile.json")
    model.record.save(model.folder / "artifact.json")
    asked.protocol.save(model.folder / "protocol.json")
    for name, value in asked.inputs["x"].items():
        np.save(model.folder / f"{name}.npy", value, allow_pickle=False)
    words = [sys.executable, "-c", HOST, str(model.folder), str(launches)]
    host = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + WAIT_S
    while not any(path.stat().st_size for path in workdir.glob("jobs/*/stdout")):
        assert time.monotonic() < deadline
        assert host.poll() is None, host.communicate()
        time.sleep(0.02)
    return host


def end_host(host: subprocess.Popen[bytes], number: signal.Signals) -> bytes:
    os.kill(host.pid, number)
    return host.communicate(timeout=WAIT_S)[1]


def left_over(workdir: Path) -> list[str]:
    return [path.name for kind in ("jobs", "work") for path in (workdir / kind).glob("*")]


class TestOnnxRuntime(RuntimeContract):
    workdir: ClassVar[Path]

    def make(self, tmp_path: Path) -> Runtime:
        type(self).workdir = tmp_path / "device"
        return pair(profile(self.workdir))[1]

    def test_facts_of_launch_are_in_range(self, runtime: Runtime, tmp_path: Path) -> None:
        protocol = LaunchProtocol(warmup_min_s=0.01, warmup_max_s=0.1, min_samples=30, min_time_s=0.05, max_time_s=2.0)
        launch = runtime.benchmark(request(two_headed(tmp_path / "model"), 1, protocol))[0]
        assert sum(launch.samples_ns) >= 0.5 * 0.05e9
        assert launch.warmup_runs >= 15
        assert launch.warmup_drift is not None
        assert launch.cpu_share is not None
        assert 0.0 < launch.cpu_share <= 1.0
        assert launch.switches_per_s is not None
        assert launch.peak_memory_bytes is not None
        assert launch.peak_memory_bytes > 10_000_000
        assert launch.before.sentinel_ns is not None
        assert launch.after.load_1m is not None
        assert launch.started_at.endswith("Z")

    def test_device_is_clean_after_every_kind_of_job(self, runtime: Runtime, tmp_path: Path) -> None:
        model = two_headed(tmp_path / "model")
        runtime.benchmark(request(model, 1, QUICK_PROTOCOL))
        runtime.infer(model, two_inputs(2), taps=["mixed"])
        runtime.op_times(model, two_inputs(2), runs=2)
        runtime.supports(model)
        assert left_over(self.workdir) == []

    def test_infer_feeds_fixed_batch_whole(self, runtime: Runtime, tmp_path: Path) -> None:
        inputs = two_inputs(7)
        outputs = runtime.infer(two_headed(tmp_path / "model", 4), inputs)
        np.testing.assert_allclose(outputs["heads.gate"], two_headed_outputs(inputs)["heads.gate"], rtol=1e-5, atol=1e-5)

    def test_infer_casts_within_kind_only(self, runtime: Runtime, tmp_path: Path) -> None:
        model, inputs = two_headed(tmp_path / "model"), two_inputs(2)
        wide = {name: value.astype(np.float64) for name, value in inputs.items()}
        np.testing.assert_array_equal(runtime.infer(model, wide)["heads.gate"], runtime.infer(model, inputs)["heads.gate"])
        with pytest.raises(DataError, match="another kind"):
            runtime.infer(model, {"a": inputs["a"].astype(np.complex64), "b": inputs["b"]})

    def test_infer_refuses_unequal_samples(self, runtime: Runtime, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="same number of samples"):
            runtime.infer(two_headed(tmp_path / "model"), {"a": two_inputs(2)["a"], "b": two_inputs(3)["b"]})

    def test_infer_names_cause_when_shape_is_wrong(self, runtime: Runtime, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="did not run"):
            runtime.infer(two_headed(tmp_path / "model"), {"a": np.zeros((2, 9), np.float32), "b": two_inputs(2)["b"]})

    def test_changed_artifact_is_not_run(self, runtime: Runtime, tmp_path: Path) -> None:
        model = two_headed(tmp_path / "model")
        model.entry.write_bytes(model.entry.read_bytes() + b"\0")
        with pytest.raises(BundleError, match="was changed"):
            runtime.infer(model, two_inputs(1))

    def test_supports_names_operator_without_implementation(self, runtime: Runtime, tmp_path: Path) -> None:
        report = runtime.supports(single(tmp_path / "odd", [helper.make_node("Wobble", ["x"], ["y"], domain="made.up")], domain="made.up"))
        assert not report.supported
        assert "Wobble" in report.missing

    def test_texts_are_refused(self, runtime: Runtime, tmp_path: Path) -> None:
        model = single(tmp_path / "text", [helper.make_node("Identity", ["x"], ["y"])], dtype=TensorProto.STRING)
        report = runtime.supports(model)
        assert not report.supported
        assert "string" in report.missing["x"]
        with pytest.raises(DataError, match="holds no numbers"):
            runtime.infer(model, {"x": np.array([["a", "b", "c", "d"]])})

    def test_supports_names_input_that_file_lacks(self, runtime: Runtime, tmp_path: Path) -> None:
        model = two_headed(tmp_path / "model")
        renamed = TensorSpec(name="other", dtype="float32", shape=("batch", 4))
        iospec = IOSpec(inputs=(renamed, model.record.iospec.inputs[1]), outputs=model.record.iospec.outputs)
        report = runtime.supports(store_artifact(model.folder, "model.onnx", format=Format.ONNX, precision=Precision.FP32, iospec=iospec))
        assert not report.supported
        assert {"other", "a"} <= set(report.missing)

    def test_benchmark_rejects_model_that_cannot_be_loaded(self, runtime: Runtime, tmp_path: Path) -> None:
        odd = single(tmp_path / "odd", [helper.make_node("Wobble", ["x"], ["y"], domain="made.up")], domain="made.up")
        inputs = {"x": {"x": np.zeros((1, 4), np.float32)}}
        with pytest.raises(UnsupportedModel, match="launch 0 of 'x'") as caught:
            runtime.benchmark(BenchmarkRequest(models={"x": odd}, schedule=("x",), inputs=inputs, protocol=QUICK_PROTOCOL))
        assert caught.value.subject == "Wobble"
        assert left_over(self.workdir) == []

    def test_opening_refuses_unknown_option(self, tmp_path: Path) -> None:
        with pytest.raises(ProfileError, match=r"runtime\.options\.spining"):
            pair(profile(tmp_path, spining=True))[1].open()
        with pytest.raises(ProfileError, match="true or false"):
            pair(profile(tmp_path, spinning="no"))[1].open()

    def test_opening_names_remedy_when_device_lacks_runtime(self, tmp_path: Path) -> None:
        bare = tmp_path / "bare-python"
        bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
        bare.chmod(0o755)
        with pytest.raises(DeviceError, match="pip install onnxruntime numpy"):
            pair(profile(tmp_path / "device", python=str(bare)))[1].open()

    def test_opening_names_extra_when_host_lacks_runtime(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        monkeypatch.setattr(sys, "path", [entry for entry in sys.path if "site-packages" not in entry])
        monkeypatch.delitem(sys.modules, "onnxruntime")
        with pytest.raises(MissingDependency, match=r"edgekd\[x86\]"):
            pair(profile(tmp_path))[1].open()

    def test_deadline_grows_with_schedule(self) -> None:
        _job = importlib.import_module("edgekd.targets.runtimes._job")
        short, long = LaunchProtocol(max_time_s=1.0), LaunchProtocol(max_time_s=30.0)
        assert _job.job_deadline_s(short, 2, 5.0) < _job.job_deadline_s(short, 3, 5.0)
        assert _job.job_deadline_s(short, 2, 5.0) < _job.job_deadline_s(long, 2, 5.0)
        assert _job.job_deadline_s(long, 20, 60.0) > 60.0 + 20 * 30.0


class TestNothingIsLost:
    def test_launches_of_killed_host_are_taken_over(self, tmp_path: Path) -> None:
        workdir, model = tmp_path / "device", two_headed(tmp_path / "model")
        end_host(start_host(workdir, model, 2), signal.SIGKILL)
        written = next(workdir.glob("jobs/*/stdout"))
        first = json.loads(written.read_text().splitlines()[0])["launch"]
        transport, runtime = pair(profile(workdir))
        runtime.open()
        launches = runtime.benchmark(request(model, 2))
        assert list(launches[0].samples_ns) == first["samples_ns"]
        assert [launch.index for launch in launches] == [0, 1]
        assert left_over(workdir) == []
        again = runtime.benchmark(request(model, 2))
        assert again[0].samples_ns != launches[0].samples_ns
        transport.close()

    def test_launches_older_than_a_day_are_taken_anew(self, tmp_path: Path) -> None:
        workdir, model = tmp_path / "device", two_headed(tmp_path / "model")
        end_host(start_host(workdir, model, 1), signal.SIGKILL)
        transport, runtime = pair(profile(workdir))
        job = next(workdir.glob("jobs/*"))
        deadline = time.monotonic() + WAIT_S
        while transport.poll(job.name).running:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        lines = [json.loads(line) for line in (job / "stdout").read_text().splitlines()]
        lines[0]["launch"]["started_at"] = "2020-01-01T00:00:00Z"
        (job / "stdout").write_text("".join(json.dumps(line) + "\n" for line in lines))
        transport.close()
        transport, runtime = pair(profile(workdir))
        runtime.open()
        launch = runtime.benchmark(request(model, 1))[0]
        assert launch.started_at > "2020-01-02"
        assert left_over(workdir) == []

    def test_interrupt_ends_job_on_device(self, tmp_path: Path) -> None:
        workdir, model = tmp_path / "device", two_headed(tmp_path / "model")
        host = start_host(workdir, model, 20)
        pid = json.loads(next(workdir.glob("jobs/*/pid.json")).read_text())["pgid"]
        assert b"KeyboardInterrupt" in end_host(host, signal.SIGINT)
        assert left_over(workdir) == []
        status = Path(f"/proc/{pid}/status")
        assert not status.exists() or "State:\tZ" in status.read_text()

    def test_second_benchmark_is_busy_while_host_lives_and_takes_over_when_it_died(self, tmp_path: Path) -> None:
        workdir, model = tmp_path / "device", two_headed(tmp_path / "model")
        host = start_host(workdir, model, 200)
        transport, runtime = pair(profile(workdir, lock_wait_s=0.1))
        runtime.open()
        with pytest.raises(DeviceBusy, match=r"process [0-9]+"):
            runtime.benchmark(request(model, 1, seed=1))
        end_host(host, signal.SIGKILL)
        assert len(runtime.benchmark(request(model, 1, QUICK_PROTOCOL, seed=1))) == 1
        assert left_over(workdir) == []
        transport.close()
