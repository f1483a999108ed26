"""What every runtime must do, as a suite of tests that those of a new one subclass."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgekd.artifact import StoredArtifact, store_artifact
from edgekd.contracts import BenchmarkRequest, Runtime
from edgekd.errors import DataError, EdgekdError, ModelError
from edgekd.records import Capabilities, Fingerprint, LaunchProtocol, Precision, Snapshot
from edgekd.testing.models import remembering, remembering_outputs, remembering_sequences, two_headed, two_headed_outputs, two_inputs

QUICK_PROTOCOL = LaunchProtocol(warmup_min_s=0.0, warmup_max_s=0.05, warmup_drift=0.5, min_samples=40, min_time_s=0.0, max_time_s=2.0, rotation=3)
"""Launches as short as they can be: what they measure says nothing."""


class RuntimeContract:
    """Subclass it as `TestMyRuntime` and write `make`; the tests come with it.

    `rtol` is the tolerance of outputs, relative and absolute. A runtime that takes another format than ONNX overrides `model` and `stateful` too.
    """

    rtol = 1e-5

    def make(self, tmp_path: Path) -> Runtime:
        """A new, unopened runtime on an open transport."""
        raise NotImplementedError

    def model(self, folder: Path, batch: int | str = "batch") -> StoredArtifact:
        """The two-headed model in a format that the runtime takes."""
        return two_headed(folder, batch)

    def stateful(self, folder: Path, batch: int | str = "batch") -> StoredArtifact:
        """The remembering model in a format that the runtime takes."""
        return remembering(folder, batch)

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
            models={"x": model, "y": model},
            schedule=("x", "y", "x"),
            inputs={"x": two_inputs(5), "y": two_inputs(2, 1)},
            protocol=QUICK_PROTOCOL,
            first_index=10,
        )
        launches = runtime.benchmark(request)
        assert [(launch.label, launch.index) for launch in launches] == [("x", 10), ("y", 11), ("x", 12)]
        for launch in launches:
            if runtime.capabilities().samples == "raw":
                assert len(launch.samples_ns) >= QUICK_PROTOCOL.min_samples
                assert all(isinstance(sample, int) and sample > 0 for sample in launch.samples_ns)
            else:
                assert 0 < launch.summary_ns["min"] <= launch.summary_ns["median"] <= launch.summary_ns["max"]
            assert launch.init_ns > 0
            assert launch.first_ns > 0

    def test_benchmark_refuses_schedule_with_unknown_label(self, runtime: Runtime, tmp_path: Path) -> None:
        model = self.model(tmp_path / "model")
        with pytest.raises(EdgekdError):
            runtime.benchmark(BenchmarkRequest(models={"x": model}, schedule=("z",), inputs={"x": two_inputs(1)}, protocol=QUICK_PROTOCOL))

    @pytest.mark.parametrize("batch", ["batch", 1])
    def test_infer_equals_numpy_in_order_of_iospec(self, runtime: Runtime, tmp_path: Path, batch: int | str) -> None:
        inputs = two_inputs(5)
        outputs = runtime.infer(self.model(tmp_path / "model", batch), inputs)
        assert list(outputs) == ["heads.total", "heads.gate"]
        for name, value in outputs.items():
            np.testing.assert_allclose(value, two_headed_outputs(inputs)[name], rtol=self.rtol, atol=self.rtol)

    def test_infer_gives_taps_beside_outputs(self, runtime: Runtime, tmp_path: Path) -> None:
        if not runtime.capabilities().taps:
            pytest.skip("this runtime cannot look inside a model")
        inputs = two_inputs(3)
        outputs = runtime.infer(self.model(tmp_path / "model"), inputs, taps=["mixed"])
        assert list(outputs) == ["heads.total", "heads.gate", "mixed"]
        np.testing.assert_allclose(outputs["mixed"], two_headed_outputs(inputs)["mixed"], rtol=self.rtol, atol=self.rtol)

    def test_infer_refuses_unknown_tap(self, runtime: Runtime, tmp_path: Path) -> None:
        if not runtime.capabilities().taps:
            pytest.skip("this runtime cannot look inside a model")
        with pytest.raises(ModelError, match="mixde"):
            runtime.infer(self.model(tmp_path / "model"), two_inputs(1), taps=["mixde"])

    def test_infer_refuses_missing_input(self, runtime: Runtime, tmp_path: Path) -> None:
        with pytest.raises((DataError, ModelError), match="b"):
            runtime.infer(self.model(tmp_path / "model"), {"a": two_inputs(2)["a"]})

    @pytest.mark.parametrize("batch", ["batch", 1])
    def test_infer_feeds_the_state_of_sequences_back_from_zero(self, runtime: Runtime, tmp_path: Path, batch: int | str) -> None:
        model, inputs = self._stateful(runtime, tmp_path, batch), remembering_sequences(4, 5)
        outputs = runtime.infer(model, inputs)
        assert list(outputs) == ["total", "memory.next"]
        for name, value in remembering_outputs(inputs).items():
            np.testing.assert_allclose(outputs[name], value, rtol=self.rtol, atol=self.rtol)

    def test_infer_with_states_takes_one_step(self, runtime: Runtime, tmp_path: Path) -> None:
        model, inputs = self._stateful(runtime, tmp_path), remembering_sequences(4, 2)
        expected = remembering_outputs(inputs)
        outputs = runtime.infer(model, {"x": inputs["x"][:, 1], "memory": expected["memory.next"][:, 0]})
        for name, value in expected.items():
            np.testing.assert_allclose(outputs[name], value[:, 1], rtol=self.rtol, atol=self.rtol)

    def test_infer_refuses_one_step_without_its_state(self, runtime: Runtime, tmp_path: Path) -> None:
        model = self._stateful(runtime, tmp_path)
        with pytest.raises(DataError, match="memory") as refused:
            runtime.infer(model, {"x": remembering_sequences(4, 1)["x"][:, 0]})
        assert refused.value.subject == "x"

    @pytest.mark.parametrize("given", [False, True])
    def test_benchmark_steps_a_model_with_state(self, runtime: Runtime, tmp_path: Path, given: bool) -> None:
        model, steps = self._stateful(runtime, tmp_path), {"x": remembering_sequences(3, 1)["x"][:, 0]}
        inputs = {**steps, "memory": np.ones((3, 3), np.float32)} if given else steps
        (launch,) = runtime.benchmark(BenchmarkRequest(models={"x": model}, schedule=("x",), inputs={"x": inputs}, protocol=QUICK_PROTOCOL))
        assert len(launch.samples_ns) >= QUICK_PROTOCOL.min_samples or launch.summary_ns

    def _stateful(self, runtime: Runtime, tmp_path: Path, batch: int | str = "batch") -> StoredArtifact:
        if not runtime.capabilities().state:
            pytest.skip("this runtime does not feed a state back")
        return self.stateful(tmp_path / "stateful", batch)

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
        np.testing.assert_allclose(runtime.infer(compiled, inputs)["heads.total"], two_headed_outputs(inputs)["heads.total"], rtol=self.rtol, atol=self.rtol)

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
