"""LiteRT through the runner passes the suite of runtimes, says what XNNPACK leaves out, and refuses what a package computes wrongly."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekd import registry
from edgekd.artifact import StoredArtifact, store_artifact
from edgekd.contracts import Runtime, Transport
from edgekd.errors import DeviceError, ModelError, ProfileError, UnsupportedModel
from edgekd.records import Format, IOSpec, Precision, Profile, RuntimeConfig, TensorSpec, TransportConfig
from edgekd.settings.profile_file import load_profile
from edgekd.target import connect
from edgekd.testing import RuntimeContract, TransportContract, two_headed_outputs, two_inputs
from edgekd.testing.tflite_models import HandOp, HandTensor, hand_made, remembering_tflite, store_hand_made, two_headed_tflite

ROOT = Path(__file__).resolve().parents[2]


def profile(workdir: Path, *, python: str = "", **options: bool | str) -> Profile:
    return Profile(
        name="test",
        description="test",
        transport=TransportConfig(workdir=str(workdir), python=python),
        runtime=RuntimeConfig(kind="litert", options={"lock": f"{workdir}.lock", **options}),
    )


def opened(target: Profile) -> Runtime:
    transport: Transport = registry.load("transports", "local")(target)
    transport.open()
    runtime: Runtime = registry.load("runtimes", "litert")(target, transport)
    return runtime


@pytest.fixture(scope="module")
def litert(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    runtime = opened(profile(tmp_path_factory.mktemp("device")))
    runtime.open()
    yield runtime
    runtime.close()


def spec(inputs: dict[str, tuple[int | str, ...]], outputs: dict[str, tuple[int | str, ...]], dtype: str = "float32") -> IOSpec:
    def tensors(shapes: dict[str, tuple[int | str, ...]]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name=name, dtype=dtype, shape=shape) for name, shape in shapes.items())

    return IOSpec(inputs=tensors(inputs), outputs=tensors(outputs))


def hybrid(folder: Path, *, per_channel: bool) -> tuple[StoredArtifact, np.ndarray[Any, Any]]:
    """A fully connected layer with int8 weights and float inputs, and the real weights `(8, 16)`."""
    weight = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)
    scales = np.abs(weight).max(axis=1, keepdims=True) / 127 if per_channel else np.full((1, 1), np.abs(weight).max() / 127)
    whole = np.round(weight / scales)
    tensors = [
        HandTensor("x", (1, 16)),
        HandTensor("w", (8, 16), "int8", whole.astype(np.int8), tuple(map(float, scales.ravel()))),
        HandTensor("y", (1, 8)),
    ]
    data = hand_made(tensors, [HandOp("FULLY_CONNECTED", ("x", "w"), ("y",), version=9)], ["x"], ["y"])
    return store_hand_made(folder, data, spec({"x": (1, 16)}, {"y": (1, 8)}), precision=Precision.INT8), whole * scales


def partly_delegated(folder: Path) -> StoredArtifact:
    """XNNPACK takes the two additions and leaves the sign between them."""
    names = ("x", "a", "b", "y")
    tensors = [HandTensor(name, (1, 4)) for name in names]
    ops = [HandOp("ADD", ("x", "x"), ("a",)), HandOp("SIGN", ("a",), ("b",)), HandOp("ADD", ("b", "x"), ("y",))]
    return store_hand_made(folder, hand_made(tensors, ops, ["x"], ["y"]), spec({"x": (1, 4)}, {"y": (1, 4)}))


class TestLiteRt(RuntimeContract):
    def make(self, tmp_path: Path) -> Runtime:
        return opened(profile(tmp_path / "device"))

    def model(self, folder: Path, batch: int | str = "batch") -> StoredArtifact:
        return two_headed_tflite(folder, batch)

    def stateful(self, folder: Path, batch: int | str = "batch") -> StoredArtifact:
        return remembering_tflite(folder, batch)


class TestItsTransport(TransportContract):
    def make(self, tmp_path: Path) -> Transport:
        transport: Transport = registry.load("transports", "local")(load_profile("litert-local", overrides=[f"transport.workdir={tmp_path / 'device'}"]))
        return transport


def test_the_shipped_profile_connects_and_names_the_package() -> None:
    with connect("litert-local") as target:
        assert target.capabilities.formats == (Format.TFLITE,)
        assert target.capabilities.schemes == ("static_int8", "dynamic_int8")
        assert target.fingerprint.fields["package"] == "ai-edge-litert"
        assert "package" in target.profile.identity


def test_infer_takes_tensor_names_where_there_is_no_signature(litert: Runtime, tmp_path: Path) -> None:
    inputs = two_inputs(3)
    outputs = litert.infer(two_headed_tflite(tmp_path, 1, signature=False), inputs)
    np.testing.assert_allclose(outputs["heads.gate"], two_headed_outputs(inputs)["heads.gate"], rtol=1e-5, atol=1e-5)


def test_infer_takes_a_fixed_batch_at_a_time_and_gives_every_sample(litert: Runtime, tmp_path: Path) -> None:
    tensors = [HandTensor(name, (2, 3)) for name in ("x", "y")]
    model = store_hand_made(tmp_path, hand_made(tensors, [HandOp("ADD", ("x", "x"), ("y",))], ["x"], ["y"]), spec({"x": (2, 3)}, {"y": (2, 3)}))
    x = np.arange(15, dtype=np.float32).reshape(5, 3)
    np.testing.assert_array_equal(litert.infer(model, {"x": x})["y"], 2 * x)


def test_infer_resizes_open_axes_from_job_to_job(litert: Runtime, tmp_path: Path) -> None:
    tensors = [HandTensor(name, ("batch", "steps")) for name in ("x", "y")]
    data = hand_made(tensors, [HandOp("ADD", ("x", "x"), ("y",))], ["x"], ["y"])
    model = store_hand_made(tmp_path, data, spec({"x": ("batch", "steps")}, {"y": ("batch", "steps")}))
    for steps in (1, 7):
        x = np.arange(2 * steps, dtype=np.float32).reshape(2, steps)
        np.testing.assert_array_equal(litert.infer(model, {"x": x})["y"], 2 * x)


def test_quantized_outputs_come_as_real_numbers(litert: Runtime, tmp_path: Path) -> None:
    tensors = [HandTensor("x", (1, 4), "int8", scales=(0.5,)), HandTensor("y", (1, 4))]
    tensors += [HandTensor("z", (1, 4), "int8", scales=(0.25,))]
    ops = [HandOp("DEQUANTIZE", ("x",), ("y",), version=2), HandOp("QUANTIZE", ("y",), ("z",))]
    iospec = spec({"x": (1, 4)}, {"z": (1, 4)}, "int8")
    model = store_hand_made(tmp_path, hand_made(tensors, ops, ["x"], ["z"]), iospec, precision=Precision.INT8)
    outputs = litert.infer(model, {"x": np.array([[-4, 0, 2, 10]], dtype=np.int8)}, taps=["y"])
    for name in ("z", "y"):
        assert outputs[name].dtype == np.float32
        np.testing.assert_array_equal(outputs[name], [[-2.0, 0.0, 1.0, 5.0]])


def test_a_tap_that_resembles_a_tensor_is_answered_with_its_name(litert: Runtime, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"mixde.*mixed"):
        litert.infer(two_headed_tflite(tmp_path), two_inputs(1), taps=["mixde"])


def test_supports_says_that_xnnpack_runs_everything(litert: Runtime, tmp_path: Path) -> None:
    report = litert.supports(two_headed_tflite(tmp_path))
    assert report.supported
    assert report.note == "XNNPACK runs all 5 operators in 1 part"


def test_supports_names_operators_that_xnnpack_leaves_out(litert: Runtime, tmp_path: Path) -> None:
    model = partly_delegated(tmp_path)
    report = litert.supports(model)
    assert report.supported
    assert report.note == "XNNPACK runs 2 of 3 operators in 2 parts; the interpreter runs SIGN (1)"
    x = np.array([[-1.0, 0.0, 2.0, 3.0]], dtype=np.float32)
    np.testing.assert_array_equal(litert.infer(model, {"x": x})["y"], np.sign(x) + x)


def test_supports_names_an_operator_that_no_kernel_is_for(litert: Runtime, tmp_path: Path) -> None:
    tensors = [HandTensor(name, (1, 4)) for name in ("x", "y")]
    data = hand_made(tensors, [HandOp("SIGN", ("x",), ("y",), version=99)], ["x"], ["y"])
    report = litert.supports(store_hand_made(tmp_path, data, spec({"x": (1, 4)}, {"y": (1, 4)})))
    assert not report.supported
    assert list(report.missing) == ["SIGN"]


def test_supports_refuses_other_formats_and_other_names(litert: Runtime, tmp_path: Path) -> None:
    tensors = [HandTensor(name, (1, 4)) for name in ("x", "y")]
    data = hand_made(tensors, [HandOp("ADD", ("x", "x"), ("y",))], ["x"], ["y"])
    report = litert.supports(store_hand_made(tmp_path, data, spec({"image": (1, 4)}, {"y": (1, 4)})))
    assert not report.supported
    assert set(report.missing) == {"image", "x"}
    record = two_headed_tflite(tmp_path / "other").record
    other = store_artifact(tmp_path / "other", record.entry, format=Format.ONNX, precision=Precision.FP32, iospec=record.iospec)
    assert litert.supports(other).missing == {"format": "onnx, this runtime takes tflite"}


def test_op_times_are_refused_with_a_reason(litert: Runtime, tmp_path: Path) -> None:
    assert not litert.capabilities().op_times
    with pytest.raises(UnsupportedModel, match="no profiler"):
        litert.op_times(two_headed_tflite(tmp_path), two_inputs(1))


def test_hybrid_layers_are_right_here(litert: Runtime, tmp_path: Path) -> None:
    x = np.random.default_rng(1).standard_normal((4, 16)).astype(np.float32)
    for per_channel in (False, True):
        model, weight = hybrid(tmp_path / str(per_channel), per_channel=per_channel)
        assert litert.supports(model).supported
        np.testing.assert_allclose(litert.infer(model, {"x": x})["y"], x @ weight.T, atol=0.15)


def test_an_unknown_option_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="spinning"):
        opened(profile(tmp_path, spinning=True)).open()


def test_a_device_without_the_package_is_told_how_to_get_it(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n', encoding="utf-8")
    bare.chmod(0o755)
    with pytest.raises(DeviceError, match="pip install ai-edge-litert numpy"):
        opened(profile(tmp_path / "device", python=str(bare))).open()


def half() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "targets" / "runner_litert.py"))


def test_partitions_are_found_by_walking_back_from_delegates() -> None:
    ops = [
        {"index": 0, "op_name": "ADD", "inputs": [0, 0], "outputs": [1]},
        {"index": 1, "op_name": "SIGN", "inputs": [1], "outputs": [2]},
        {"index": 2, "op_name": "ADD", "inputs": [2, 0], "outputs": [3]},
        {"index": 3, "op_name": "DELEGATE", "inputs": [0], "outputs": [1]},
        {"index": 4, "op_name": "DELEGATE", "inputs": [2, 0], "outputs": [3]},
    ]
    assert half()["partitions"](ops) == {"nodes": 3, "partitions": 2, "outside": {"SIGN": 1}}


@pytest.mark.slow
@pytest.mark.installs
def test_tflite_runtime_2_14_is_refused_for_what_it_computes_wrongly(tmp_path: Path) -> None:
    """In an environment of its own: the package needs an older numpy."""
    home = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    python = str(home / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "tflite-runtime==2.14.0", "numpy<2"], check=True)
    runtime = opened(profile(tmp_path / "device", python=python))
    runtime.open()
    fields = runtime.fingerprint().fields
    assert (fields["package"], fields["runtime_version"]) == ("tflite-runtime", "2.14.0")
    inputs = two_inputs(5)
    good = two_headed_tflite(tmp_path / "good")
    assert "SUM (1)" in runtime.supports(good).note
    outputs = runtime.infer(good, inputs, taps=["mixed"])
    for name, value in outputs.items():
        np.testing.assert_allclose(value, two_headed_outputs(inputs)[name], rtol=1e-5, atol=1e-5)
    x = np.random.default_rng(1).standard_normal((4, 16)).astype(np.float32)
    plain, weight = hybrid(tmp_path / "plain", per_channel=False)
    np.testing.assert_allclose(runtime.infer(plain, {"x": x})["y"], x @ weight.T, atol=0.15)
    bad, _ = hybrid(tmp_path / "bad", per_channel=True)
    report = runtime.supports(bad)
    assert not report.supported
    assert "without an error" in report.missing["FULLY_CONNECTED"]
    with pytest.raises(UnsupportedModel, match="tflite_runtime"):
        runtime.infer(bad, {"x": x})
