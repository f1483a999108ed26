"""What every runtime must do, as an abstract suite: subclass `RuntimeContract` and give `make`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekd.artifact import StoredArtifact, store_artifact
from edgekd.contracts import Array, BenchmarkRequest, Runtime
from edgekd.errors import DataError, EdgekdError, ModelError
from edgekd.records import Capabilities, Fingerprint, Format, IOSpec, LaunchProtocol, Precision, Snapshot, TensorSpec

PROTOCOL = LaunchProtocol(warmup_min_s=0.0, warmup_max_s=0.05, warmup_drift=0.5, min_samples=40, min_time_s=0.0, max_time_s=2.0, rotation=3)
_RANDOM = np.random.default_rng(7)
WEIGHT_A = _RANDOM.standard_normal((4, 3)).astype(np.float32)
WEIGHT_B = _RANDOM.standard_normal((2, 3)).astype(np.float32)


def two_inputs(samples: int, seed: int = 0) -> dict[str, Array]:
    """Inputs of `two_headed`."""
    random = np.random.default_rng(seed)
    return {"a": random.standard_normal((samples, 4)).astype(np.float32), "b": random.standard_normal((samples, 2)).astype(np.float32)}


def reference(inputs: dict[str, Array]) -> dict[str, Array]:
    """What `two_headed` computes, in numpy."""
    mixed = inputs["a"] @ WEIGHT_A + inputs["b"] @ WEIGHT_B
    return {"mixed": mixed, "heads.gate": np.maximum(mixed, 0.0), "heads.total": mixed.sum(axis=1)}


def two_headed(folder: Path, batch: int | str = "batch") -> StoredArtifact:
    """Two inputs, two outputs named by key path; the IOSpec lists the outputs in another order than the file."""
    folder.mkdir(parents=True, exist_ok=True)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["a", "weight_a"], ["from_a"], name="left"),
            helper.make_node("MatMul", ["b", "weight_b"], ["from_b"], name="right"),
            helper.make_node("Add", ["from_a", "from_b"], ["mixed"], name="mix"),
            helper.make_node("Relu", ["mixed"], ["heads.gate"], name="gate"),
            helper.make_node("ReduceSum", ["mixed", "axes"], ["heads.total"], name="total", keepdims=0),
        ],
        "two_headed",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, [batch, 4]), helper.make_tensor_value_info("b", TensorProto.FLOAT, [batch, 2])],
        [helper.make_tensor_value_info("heads.gate", TensorProto.FLOAT, [batch, 3]), helper.make_tensor_value_info("heads.total", TensorProto.FLOAT, [batch])],
        [numpy_helper.from_array(WEIGHT_A, "weight_a"), numpy_helper.from_array(WEIGHT_B, "weight_b"), numpy_helper.from_array(np.array([1]), "axes")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), folder / "model.onnx")

    def tensor(name: str, *rest: int) -> TensorSpec:
        return TensorSpec(name=name, dtype="float32", shape=(batch, *rest))

    iospec = IOSpec(inputs=(tensor("a", 4), tensor("b", 2)), outputs=(tensor("heads.total"), tensor("heads.gate", 3)))
    return store_artifact(folder, "model.onnx", format=Format.ONNX, precision=Precision.FP32, iospec=iospec, opset=18)


class RuntimeContract:
    """The tolerance of outputs is `rtol`, relative and absolute."""

    rtol = 1e-5

    def make(self, tmp_path: Path) -> Runtime:
        """A new, unopened runtime on an open transport."""
        raise NotImplementedError

    def model(self, folder: Path, batch: int | str = "batch") -> StoredArtifact:
        """The two-headed model in a format that the runtime takes."""
        return two_headed(folder, batch)

    @pytest.fixture(scope="class")
    @classmethod
    def runtime(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
        """One opened runtime for all tests of the class."""
        runtime = cls().make(tmp_path_factory.mktemp("device"))
        runtime.open()
        yield runtime
        runtime.close()

    def test_runtime_fulfils_protocol(self, runtime: Runtime) -> None:
        assert isinstance(runtime, Runtime)

    def test_runtime_describes_device(self, runtime: Runtime) -> None:
        fingerprint, capabilities, snapshot = runtime.fingerprint(), runtime.capabilities(), runtime.snapshot()
        assert isinstance(fingerprint, Fingerprint)
        assert isinstance(capabilities, Capabilities)
        assert isinstance(snapshot, Snapshot)
        assert fingerprint.fields["runtime"] == runtime.name
        assert fingerprint.fields["runtime_version"]
        assert capabilities.formats
        assert capabilities.precisions
        assert capabilities.samples in ("raw", "summary")
        assert runtime.fingerprint() == fingerprint

    def test_benchmark_gives_launches_in_order_of_schedule(self, runtime: Runtime, tmp_path: Path) -> None:
        model = self.model(tmp_path / "model")
        request = BenchmarkRequest(
            models={"x": model, "y": model}, schedule=("x", "y", "x"), inputs={"x": two_inputs(5), "y": two_inputs(2, 1)}, protocol=PROTOCOL, first_index=10
        )
        launches = runtime.benchmark(request)
        assert [(launch.label, launch.index) for launch in launches] == [("x", 10), ("y", 11), ("x", 12)]
        for launch in launches:
            if runtime.capabilities().samples == "raw":
                assert len(launch.samples_ns) >= PROTOCOL.min_samples
                assert all(isinstance(sample, int) and sample > 0 for sample in launch.samples_ns)
            else:
                assert 0 < launch.summary_ns["min"] <= launch.summary_ns["median"] <= launch.summary_ns["max"]
            assert launch.init_ns > 0
            assert launch.first_ns > 0

    def test_benchmark_refuses_schedule_with_unknown_label(self, runtime: Runtime, tmp_path: Path) -> None:
        model = self.model(tmp_path / "model")
        with pytest.raises(EdgekdError):
            runtime.benchmark(BenchmarkRequest(models={"x": model}, schedule=("z",), inputs={"x": two_inputs(1)}, protocol=PROTOCOL))

    @pytest.mark.parametrize("batch", ["batch", 1])
    def test_infer_equals_numpy_in_order_of_iospec(self, runtime: Runtime, tmp_path: Path, batch: int | str) -> None:
        inputs = two_inputs(5)
        outputs = runtime.infer(self.model(tmp_path / "model", batch), inputs)
        assert list(outputs) == ["heads.total", "heads.gate"]
        for name, value in outputs.items():
            np.testing.assert_allclose(value, reference(inputs)[name], rtol=self.rtol, atol=self.rtol)

    def test_infer_gives_taps_beside_outputs(self, runtime: Runtime, tmp_path: Path) -> None:
        if not runtime.capabilities().taps:
            pytest.skip("this runtime cannot look inside a model")
        inputs = two_inputs(3)
        outputs = runtime.infer(self.model(tmp_path / "model"), inputs, taps=["mixed"])
        assert list(outputs) == ["heads.total", "heads.gate", "mixed"]
        np.testing.assert_allclose(outputs["mixed"], reference(inputs)["mixed"], rtol=self.rtol, atol=self.rtol)

    def test_infer_refuses_unknown_tap(self, runtime: Runtime, tmp_path: Path) -> None:
        if not runtime.capabilities().taps:
            pytest.skip("this runtime cannot look inside a model")
        with pytest.raises(ModelError, match="mixde"):
            runtime.infer(self.model(tmp_path / "model"), two_inputs(1), taps=["mixde"])

    def test_infer_refuses_missing_input(self, runtime: Runtime, tmp_path: Path) -> None:
        with pytest.raises((DataError, ModelError), match="b"):
            runtime.infer(self.model(tmp_path / "model"), {"a": two_inputs(2)["a"]})

    def test_supports_is_true_for_model_and_false_for_garbage(self, runtime: Runtime, tmp_path: Path) -> None:
        model = self.model(tmp_path / "model")
        assert runtime.supports(model).supported
        folder = tmp_path / "garbage"
        folder.mkdir()
        (folder / model.record.entry).write_bytes(b"this is no model at all" * 20)
        garbage = store_artifact(folder, model.record.entry, format=model.record.format, precision=Precision.FP32, iospec=model.record.iospec)
        report = runtime.supports(garbage)
        assert not report.supported
        assert report.missing or report.note

    def test_compile_gives_artifact_that_runs(self, runtime: Runtime, tmp_path: Path) -> None:
        inputs = two_inputs(2)
        compiled = runtime.compile(self.model(tmp_path / "model"), tmp_path / "compiled")
        compiled.verify()
        np.testing.assert_allclose(runtime.infer(compiled, inputs)["heads.total"], reference(inputs)["heads.total"], rtol=self.rtol, atol=self.rtol)

    def test_op_times_are_shares_of_whole(self, runtime: Runtime, tmp_path: Path) -> None:
        if not runtime.capabilities().op_times:
            pytest.skip("this runtime has no profiler")
        ops = runtime.op_times(self.model(tmp_path / "model"), two_inputs(2), runs=20)
        assert {op.op_type for op in ops} & {"MatMul", "Gemm", "FusedMatMul"}
        assert sum(op.share for op in ops) == pytest.approx(1.0)
        total = sum(op.time_ns for op in ops)
        assert all(op.share == pytest.approx(op.time_ns / total) for op in ops)

    def test_opened_again_after_close(self, runtime: Runtime) -> None:
        before = runtime.fingerprint()
        runtime.close()
        runtime.open()
        assert runtime.fingerprint() == before
