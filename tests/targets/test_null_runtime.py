"""The null runtime: what its made-up latency depends on, that its outputs are real, and that it never hides what it is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekd import registry
from edgekd.artifact import StoredArtifact, store_artifact
from edgekd.contracts import BenchmarkRequest, Runtime
from edgekd.errors import BundleError, ConfigError, DataError, ModelError, ProfileError
from edgekd.records import Format, IOSpec, LaunchProtocol, Precision, Profile, RuntimeConfig, TensorSpec
from edgekd.settings.profile_file import load_profile

PROTOCOL = LaunchProtocol(min_samples=400, warmup_min_s=0.0, warmup_max_s=0.0, min_time_s=0.0)


def make_net(folder: Path, width: int, *, int8: bool = False, size: int = 16, seed: int = 0, batch: int | str = 1, depth: int = 2) -> StoredArtifact:
    """A stack of 3x3 convolutions with ReLU, a pool and a linear layer; with `int8` every operand is quantized and dequantized."""
    random = np.random.default_rng(seed)
    nodes, initializers = [], []

    def constant(name: str, value: Any) -> str:
        initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def quantized(name: str) -> str:
        scale, zero = constant(f"{name}_scale", np.float32(0.02)), constant(f"{name}_zero", np.uint8(128))
        nodes.append(helper.make_node("QuantizeLinear", [name, scale, zero], [f"{name}_q"], name=f"q_{name}"))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", scale, zero], [f"{name}_dq"], name=f"dq_{name}"))
        return f"{name}_dq"

    def weight(name: str, shape: tuple[int, ...]) -> str:
        if not int8:
            return constant(name, random.normal(0, 0.2, shape).astype(np.float32))
        constant(f"{name}_q", random.integers(-100, 100, shape).astype(np.int8))
        scale, zero = constant(f"{name}_scale", np.float32(0.003)), constant(f"{name}_zero", np.int8(0))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", scale, zero], [name], name=f"dq_{name}"))
        return name

    tensor, channels = "x", 3
    for layer in range(depth):
        data = quantized(tensor) if int8 else tensor
        nodes.append(helper.make_node("Conv", [data, weight(f"w{layer}", (width, channels, 3, 3))], [f"c{layer}"], name=f"conv{layer}", pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{layer}"], [f"r{layer}"], name=f"relu{layer}"))
        tensor, channels = f"r{layer}", width
    nodes.append(helper.make_node("GlobalAveragePool", [tensor], ["pooled"], name="pool"))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"], name="flatten"))
    data = quantized("flat") if int8 else "flat"
    nodes.append(helper.make_node("MatMul", [data, weight("wl", (width, 10))], ["y"], name="linear"))
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, size, size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 10])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    onnx.checker.check_model(model)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    iospec = IOSpec(
        inputs=(TensorSpec(name="x", dtype="float32", shape=(batch, 3, size, size)),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=(batch, 10)),),
        static_binding={batch: 1} if isinstance(batch, str) else {},
    )
    return store_artifact(folder, "model.onnx", format=Format.ONNX, precision=Precision.INT8 if int8 else Precision.FP32, iospec=iospec)


def make_runtime(*overrides: str) -> Any:
    profile = load_profile("null", overrides)
    runtime = registry.load("runtimes", "null")(profile, None)  # it never touches its transport
    runtime.open()
    return runtime


def request(models: dict[str, StoredArtifact], launches: int = 3, **rest: Any) -> BenchmarkRequest:
    inputs = {label: {"x": np.zeros((2, 3, 16, 16), np.float32)} for label in models}
    return BenchmarkRequest(models=models, schedule=tuple(models) * launches, inputs=inputs, protocol=PROTOCOL, **rest)


def test_null_fulfils_the_contract_and_says_simulated() -> None:
    runtime = make_runtime()
    assert isinstance(runtime, Runtime)
    assert runtime.capabilities().simulated == "null"
    assert not runtime.capabilities().proven_on_hardware
    assert {"cpu_model", "isa", "machine", "runtime", "runtime_version", "threads"} <= set(runtime.fingerprint().fields)


def test_benchmark_refuses_empty_schedule(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="an empty schedule"):
        make_runtime().benchmark(request({"net": make_net(tmp_path, 8)}, launches=0))


def test_latency_does_not_depend_on_weights(tmp_path: Path) -> None:
    runtime = make_runtime()
    one, other = make_net(tmp_path / "a", 8, seed=1), make_net(tmp_path / "b", 8, seed=2)
    assert one.record.content_hash() != other.record.content_hash()
    assert runtime.true_latency_ms(one) == runtime.true_latency_ms(other)
    left, right = runtime.benchmark(request({"net": one})), runtime.benchmark(request({"net": other}))
    assert left == right


@pytest.mark.parametrize("width", [1, 8, 32, 64])
@pytest.mark.parametrize("int8", [False, True])
def test_latency_of_small_nets_lies_between_0_05_and_50_ms(tmp_path: Path, width: int, int8: bool) -> None:
    assert 0.05 < make_runtime().true_latency_ms(make_net(tmp_path, width, int8=int8)) < 50.0


def test_latency_is_not_monotone_in_width(tmp_path: Path) -> None:
    runtime = make_runtime()
    fp32 = {width: runtime.true_latency_ms(make_net(tmp_path / f"f{width}", width)) for width in (12, 16, 20, 24)}
    int8 = {width: runtime.true_latency_ms(make_net(tmp_path / f"i{width}", width, int8=True)) for width in (12, 16)}
    assert fp32[20] > fp32[24] > fp32[16]
    assert int8[12] > int8[16]


def test_int8_is_faster_for_wide_nets_and_slower_for_tiny_ones(tmp_path: Path) -> None:
    runtime = make_runtime()
    wide = [runtime.true_latency_ms(make_net(tmp_path / f"w{int8}", 32, int8=int8)) for int8 in (False, True)]
    tiny = [runtime.true_latency_ms(make_net(tmp_path / f"t{int8}", 4, int8=int8, size=2)) for int8 in (False, True)]
    assert wide[1] < 0.6 * wide[0]
    assert tiny[1] > tiny[0]


def test_speed_divides_latency(tmp_path: Path) -> None:
    net = make_net(tmp_path, 8)
    assert make_runtime("runtime.options.speed=4.0").true_latency_ms(net) == pytest.approx(make_runtime().true_latency_ms(net) / 4)


def test_launches_repeat_to_the_byte_and_differ_by_index_label_and_seed(tmp_path: Path) -> None:
    net = make_net(tmp_path, 8)
    first, again = make_runtime().benchmark(request({"a": net, "b": net})), make_runtime().benchmark(request({"a": net, "b": net}))
    assert [launch.to_json() for launch in first] == [launch.to_json() for launch in again]
    assert [(launch.label, launch.index) for launch in first] == [("a", 0), ("b", 1), ("a", 2), ("b", 3), ("a", 4), ("b", 5)]
    assert len({launch.samples_ns for launch in first}) == 6
    later = make_runtime().benchmark(request({"a": net}, launches=1, first_index=2))
    assert later[0] == first[2]
    for other in (
        make_runtime("runtime.options.seed=1").benchmark(request({"a": net}, launches=1)),
        make_runtime().benchmark(request({"a": net}, launches=1, seed=1)),
    ):
        assert other[0].samples_ns != first[0].samples_ns


def test_samples_scatter_around_the_true_percentile(tmp_path: Path) -> None:
    runtime, net = make_runtime("runtime.options.noise=0.02"), make_net(tmp_path, 8)
    launches = runtime.benchmark(request({"a": net}, launches=200))
    for percentile in (50.0, 90.0):
        logs = np.log([np.percentile(launch.samples_ns, percentile) / 1e6 for launch in launches])
        assert abs(logs.mean() - math.log(runtime.true_latency_ms(net, percentile))) < 5 * 0.02 / math.sqrt(200) + 0.002
        assert logs.std(ddof=1) == pytest.approx(0.02, rel=0.25)


def test_without_noise_every_sample_is_the_true_latency(tmp_path: Path) -> None:
    runtime, net = make_runtime("runtime.options.noise=0"), make_net(tmp_path, 8)
    launch = runtime.benchmark(request({"a": net}, launches=1))[0]
    assert set(launch.samples_ns) == {round(runtime.true_latency_ms(net, 99.0) * 1e6)}
    assert len(launch.samples_ns) == PROTOCOL.min_samples


@pytest.mark.parametrize("batch", [1, "batch"])
@pytest.mark.parametrize("int8", [False, True])
def test_outputs_are_those_of_the_reference_evaluator(tmp_path: Path, batch: int | str, int8: bool) -> None:
    from onnx.reference import ReferenceEvaluator

    net = make_net(tmp_path, 4, batch=batch, int8=int8, size=4)
    x = np.random.default_rng(0).normal(size=(3, 3, 4, 4)).astype(np.float32)
    found = make_runtime().infer(net, {"x": x}, taps=("r1",))
    reference: Any = ReferenceEvaluator(str(net.entry))
    expected = np.concatenate([reference.run(["y"], {"x": x[index : index + 1]})[0] for index in range(3)])
    assert set(found) == {"y", "r1"}
    assert found["r1"].shape == (3, 4, 4, 4)
    np.testing.assert_allclose(found["y"], expected, atol=0.05 if int8 else 1e-5)  # a quantized step at a border moves the sum by a few scales


def test_infer_runs_whole_batches_when_the_batch_is_fixed(tmp_path: Path) -> None:
    pair, single = make_net(tmp_path / "two", 4, batch=2, size=4), make_net(tmp_path / "one", 4, batch=1, size=4)
    x = np.random.default_rng(0).normal(size=(4, 3, 4, 4)).astype(np.float32)
    runtime = make_runtime()
    np.testing.assert_allclose(runtime.infer(pair, {"x": x})["y"], runtime.infer(single, {"x": x})["y"], atol=1e-5)
    with pytest.raises(DataError, match="multiple of the batch 2"):
        runtime.infer(pair, {"x": x[:3]})


def test_infer_refuses_unknown_taps_and_wrong_inputs(tmp_path: Path) -> None:
    runtime, net = make_runtime(), make_net(tmp_path, 4, size=4)
    x = np.zeros((1, 3, 4, 4), np.float32)
    with pytest.raises(ModelError, match="r0"):
        runtime.infer(net, {"x": x}, taps=("r9",))
    with pytest.raises(DataError):
        runtime.infer(net, {"image": x})
    with pytest.raises(DataError, match="kind of numbers"):
        runtime.infer(net, {"x": x.astype(np.complex64)})
    with pytest.raises(ModelError, match="does not run"):
        runtime.infer(net, {"x": x[:, :2]})
    with pytest.raises(DataError):
        runtime.infer(net, {"x": x[:0]})
    with pytest.raises(DataError):
        runtime.benchmark(BenchmarkRequest(models={"a": net}, schedule=("a",), inputs={"a": {"image": x}}, protocol=PROTOCOL))


def test_op_times_name_every_operator_and_sum_to_one(tmp_path: Path) -> None:
    runtime, net = make_runtime(), make_net(tmp_path, 8, int8=True)
    rows = runtime.op_times(net, {"x": np.zeros((1, 3, 16, 16), np.float32)})
    assert sum(row.share for row in rows) == pytest.approx(1.0)
    assert [row.name for row in rows if row.op_type in ("Conv", "MatMul")] == ["conv0", "conv1", "linear"]
    assert "dq_w0" not in {row.name for row in rows}


def test_a_changed_file_is_refused_before_it_runs(tmp_path: Path) -> None:
    net = make_net(tmp_path, 4, size=4)
    net.entry.write_bytes(net.entry.read_bytes() + b"\0")
    with pytest.raises(BundleError):
        make_runtime().infer(net, {"x": np.zeros((1, 3, 4, 4), np.float32)})


def test_supports_is_asked_of_a_session(tmp_path: Path) -> None:
    runtime, net = make_runtime(), make_net(tmp_path / "good", 4)
    assert runtime.supports(net).supported
    graph = onnx.load(str(net.entry))
    graph.graph.node[0].op_type, graph.graph.node[0].domain = "Nonsense", "nowhere"
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "model.onnx").write_bytes(graph.SerializeToString())
    bad = store_artifact(tmp_path / "bad", "model.onnx", format=Format.ONNX, precision=Precision.FP32, iospec=net.record.iospec)
    report = runtime.supports(bad)
    assert not report.supported
    assert "Nonsense" in report.missing["model"]


@pytest.mark.parametrize("setting", ["noise=-1", "noise=0.9", "noise=loud", "speed=0", "seed=0.5", "seed=-1", "nois=0.1"])
def test_a_bad_option_is_refused_at_open(setting: str) -> None:
    with pytest.raises(ProfileError) as caught:
        make_runtime(f"runtime.options.{setting}")
    assert caught.value.allowed is not None


def test_garbage_is_no_graph(tmp_path: Path) -> None:
    net = make_net(tmp_path, 4)
    net.entry.write_bytes(b"this is no model")
    bad = store_artifact(tmp_path, "model.onnx", format=Format.ONNX, precision=Precision.FP32, iospec=net.record.iospec)
    with pytest.raises(ModelError):
        make_runtime().true_latency_ms(bad)
    assert not make_runtime().supports(bad).supported


def test_the_profile_default_matches_the_shipped_options() -> None:
    bare = Profile(name="null", description="", runtime=RuntimeConfig(kind="null"))
    cls = registry.load("runtimes", "null")
    assert cls(bare, None).fingerprint().fields == make_runtime().fingerprint().fields
