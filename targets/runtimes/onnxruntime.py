"""ONNX Runtime on a processor: ONNX files run as they are, through the on-device runner and whatever transport leads there."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from edgekd.artifact import StoredArtifact, store_artifact
from edgekd.contracts import Array, BenchmarkRequest, Tensors, Transport
from edgekd.errors import DeviceError, MissingDependency, ProfileError, RunnerFailed, UnsupportedModel
from edgekd.records import Capabilities, Fingerprint, Format, Launch, OpTime, Precision, Profile, Snapshot, SupportReport

from ._job import RunnerJobs
from ._models import compared_names, fitting, fitting_request, output_names, refused_record, tap

_SHORT_S = 120.0
_SAMPLE_S = 2.0
_OPTIONS = {"spinning": bool, "lock": str}


class OnnxRuntime:
    """The `onnxruntime` runtime: CPU provider, all graph optimizations, `runtime.threads` intra-op threads, one inter-op thread.

    `runtime.options` knows `spinning` (default true: threads wait busily, as is ONNX Runtime's default) and `lock` (the path of
    the device's lock file; the default is one file for all users of the device).
    """

    name = "onnxruntime"

    def __init__(self, profile: Profile, transport: Transport) -> None:
        self.profile = profile
        self.transport = transport
        self._jobs = RunnerJobs(profile, transport, self.name)
        self._fields: dict[str, str] | None = None

    def open(self) -> None:
        """Send the runner and ask what the device is.

        Raises:
            MissingDependency: the local target needs onnxruntime on this machine.
            DeviceError: the device lacks onnxruntime or numpy; the message holds the command that installs them.
            ProfileError: an option is unknown.
        """
        for name, value in self.profile.runtime.options.items():
            if name not in _OPTIONS or not isinstance(value, _OPTIONS[name]):
                raise ProfileError(f"runtime.options.{name} is not known here", found=value, allowed="spinning = true or false, lock = a path", subject=name)
        here = self.profile.transport.kind == "local" and not self.profile.transport.python
        if here and importlib.util.find_spec("onnxruntime") is None:
            raise MissingDependency("onnxruntime", "x86", purpose="the runtime onnxruntime on this machine")
        self._jobs.install()
        self._fields, _ = self._jobs.probe()

    def close(self) -> None:
        """Nothing runs between calls; models stay on the device for the next session."""
        self._fields = None

    def fingerprint(self) -> Fingerprint:
        """What the device is, as found when the runtime was opened.

        Raises:
            DeviceError: the runtime is not open.
        """
        if self._fields is None:
            raise DeviceError("the runtime is not open", hint="use it between open() and close()", subject=self.name)
        return Fingerprint(fields=dict(self._fields))

    def capabilities(self) -> Capabilities:
        """What ONNX Runtime does well on this processor.

        Schemes in the order of preference: unsigned activations with signed weights where the processor multiplies bytes
        without saturation (VNNI); 7-bit weights on x86 without it, where the 16-bit sums of VPMADDUBSW saturate and plain `u8s8` is
        wrong (onnxruntime.ai, "Quantize ONNX models"); signed activations first on arm64. `channel_steps` is a hint, the
        block of channels in the convolution kernels: a vector of 8 or 16 floats, 16 bytes.
        """
        fields = self.fingerprint().fields
        isa = set(fields.get("isa", "").split())
        if fields.get("machine") in ("aarch64", "arm64"):
            schemes: tuple[str, ...] = ("s8s8", "u8s8")
        elif isa & {"vnni", "avx_vnni"}:
            schemes = ("u8s8", "s8s8")
        else:
            schemes = ("u8s8_reduced",)
        return Capabilities(
            formats=(Format.ONNX,),
            precisions=(Precision.INT8, Precision.FP32),
            schemes=schemes,
            channel_steps={"int8": 16, "fp32": 16 if "avx512" in isa else 8},
            taps=True,
            op_times=True,
        )

    def snapshot(self) -> Snapshot:
        """The device's state now; the share of stolen time is that of a tenth of a second."""
        with self._jobs.folder("snapshot") as work:
            lines = self._jobs.call("snapshot", work, _SHORT_S)
        return msgspec.convert(lines[0]["snapshot"], Snapshot)

    def supports(self, model: StoredArtifact) -> SupportReport:
        """Whether the model is ONNX with tensors of numbers and a session of it can be created on the device, which is tried."""
        refused = refused_record(model.record)
        if refused is not None:
            return refused
        try:
            with self._jobs.folder("check") as work:
                found = self._jobs.call("check", work, _SHORT_S, model=self._jobs.send_model(model))[0]
        except UnsupportedModel as error:
            return SupportReport(supported=False, missing={str(error.subject): str(error.found)}, note=error.what)
        except RunnerFailed as error:
            return SupportReport(supported=False, missing={"session": str(error.found)}, note=f"creating a session failed hard: {error.what}")
        return compared_names(model.record, found["inputs"], found["outputs"])

    def compile(self, model: StoredArtifact, folder: Path) -> StoredArtifact:
        """The same files in `folder`: ONNX Runtime deploys what it is given."""
        return model if folder.resolve() == model.folder.resolve() else model.copy_to(folder)

    def benchmark(self, request: BenchmarkRequest) -> tuple[Launch, ...]:
        """One launch, a fresh process on the device, per label of the schedule, in order, with raw samples.

        Raises:
            ConfigError: the schedule is empty or names a label without a model or inputs; DataError: the inputs do not fit.
            DeviceBusy: another benchmark held the device for `measure.lock_wait_s`.
            DeviceTimeout, LinkLost, RunnerFailed: the device or the way to it failed; ask again to find a job that still runs.
            UnsupportedModel, ModelError: a model cannot be loaded, or not run with these inputs.
        """
        return self._jobs.benchmark(replace(request, inputs=fitting_request(request)))

    def infer(self, model: StoredArtifact, inputs: Tensors, taps: Sequence[str] = ()) -> dict[str, Array]:
        """Outputs `(samples, ...)` by the names and in the order of the IOSpec, then the tapped tensors; all of it in one process.

        Samples go one by one with a batch axis of 1 where the first axis of the inputs is 1 or a symbol, as deployed; a fixed
        batch of B takes B samples at a time. A tapped tensor becomes a graph output of a copy of the model, which keeps ONNX Runtime
        from fusing across it: its neighbours may round differently than in the model that is deployed.

        Raises:
            ModelError: a tap or an output is no tensor of the graph, or the model does not run with these inputs.
            DataError: an input is missing, is not numeric, or the numbers of samples differ.
        """
        tensors, names = fitting(model, inputs), output_names(model, taps)
        samples = len(next(iter(tensors.values())))
        with tempfile.TemporaryDirectory(prefix="edgekd-") as folder, self._jobs.folder("infer") as work:
            inner = names[len(model.record.iospec.outputs) :]
            ready = tapped_model(model, inner, Path(folder)) if inner else model
            fields = {"model": self._jobs.send_model(ready), "inputs": self._jobs.send_tensors(work, tensors), "outputs": names}
            line = self._jobs.call("infer", work, _SHORT_S + samples * _SAMPLE_S, **fields)[0]
            return {name: self._jobs.fetch(line["files"][name]) for name in names}

    def op_times(self, model: StoredArtifact, inputs: Tensors, runs: int = 50) -> tuple[OpTime, ...]:
        """Median time per operator in execution order, after ONNX Runtime's fusions, as its profiler tells.

        The profiler counts whole microseconds and slows the model down by a tenth or more: use the shares, not the sum.
        """
        with self._jobs.folder("op_times") as work:
            fields = {"model": self._jobs.send_model(model), "inputs": self._jobs.send_tensors(work, fitting(model, inputs)), "runs": runs}
            ops = self._jobs.call("op_times", work, _SHORT_S + runs * _SAMPLE_S, **fields)[0]["ops"]
        total = sum(op["time_ns"] for op in ops) or 1
        return tuple(OpTime(share=op["time_ns"] / total, **op) for op in ops)


def tapped_model(model: StoredArtifact, taps: Sequence[str], folder: Path) -> StoredArtifact:
    """A copy of an ONNX model in `folder` whose tensors `taps` are graph outputs too.

    Raises:
        ModelError: a tap is not computed by any node of the graph.
        MissingDependency: the package onnx is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingDependency("onnx", "x86", purpose="looking at tensors inside a model") from error
    model.copy_to(folder)
    proto = onnx.load(folder / model.record.entry, load_external_data=False)
    tap(proto, taps)
    (folder / model.record.entry).write_bytes(proto.SerializeToString())
    record = model.record
    return store_artifact(
        folder,
        record.entry,
        format=record.format,
        precision=record.precision,
        iospec=record.iospec,
        opset=record.opset,
        parent=record.content_hash(),
        metadata={"taps": json.dumps(list(taps))},
        extra_files=tuple(name for name in record.files if name != record.entry),
    )
