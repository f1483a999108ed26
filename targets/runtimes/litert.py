"""LiteRT on a processor: TFLite files run as they are, through the on-device runner and whatever transport leads there."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from edgekd.artifact import StoredArtifact
from edgekd.contracts import Array, BenchmarkRequest, Tensors, Transport
from edgekd.errors import DeviceError, MissingDependency, ProfileError, RunnerFailed, UnsupportedModel
from edgekd.records import Capabilities, Fingerprint, Format, Launch, OpTime, Precision, Profile, Snapshot, SupportReport

from ._job import RunnerJobs
from ._models import compared_names, fitting, fitting_request, output_names, refused_record

_SHORT_S = 120.0
_SAMPLE_S = 2.0
_PACKAGES = ("ai_edge_litert", "tflite_runtime")


class LiteRt:
    """The `litert` runtime: the interpreter of ai-edge-litert, or of tflite-runtime where the device has only that, with XNNPACK.

    The fingerprint's `package` says which, `runtime_version` its version. `runtime.options` knows `lock` (the path of the device's lock
    file; the default is one file for all users of the device). Inputs and outputs go by the names in the file's signature, or by those
    of its tensors where it has none; the artifact's IOSpec has the same names.
    """

    name = "litert"

    def __init__(self, profile: Profile, transport: Transport) -> None:
        self.profile = profile
        self.transport = transport
        self._jobs = RunnerJobs(profile, transport, self.name, package="ai-edge-litert")
        self._fields: dict[str, str] | None = None

    def open(self) -> None:
        """Send the runner and ask what the device is.

        Raises:
            MissingDependency: the local target needs ai-edge-litert on this machine.
            DeviceError: the device lacks ai-edge-litert or numpy; the message holds the command that installs them.
            ProfileError: an option is unknown.
        """
        for name, value in self.profile.runtime.options.items():
            if name != "lock" or not isinstance(value, str):
                raise ProfileError(f"runtime.options.{name} is not known here", found=value, allowed="lock = a path", subject=name)
        here = self.profile.transport.kind == "local" and not self.profile.transport.python
        if here and not any(importlib.util.find_spec(package) for package in _PACKAGES):
            raise MissingDependency("ai-edge-litert", "litert", purpose="the runtime litert on this machine")
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
        """What LiteRT does on a processor: int8 and float32; a float16 file is smaller, but XNNPACK computes it in float32 there.

        Neither of the two schemes is the faster one for every net: static int8 for convolutions, depthwise ones above all; dynamic
        int8 for transformers. `channel_steps` is a hint, measured with 3x3 convolutions of 8 to 64 channels on AVX-512 with VNNI: the next
        channel after a multiple of 16 costs as much as 16. It is empty for other instruction sets, where nothing was measured.
        """
        measured = {"avx512", "vnni"} <= set(self.fingerprint().fields.get("isa", "").split())
        return Capabilities(
            formats=(Format.TFLITE,),
            precisions=(Precision.INT8, Precision.FP32),
            schemes=("static_int8", "dynamic_int8"),
            channel_steps={"int8": 16, "fp32": 16} if measured else {},
            taps=True,
            op_times=False,
        )

    def snapshot(self) -> Snapshot:
        """The device's state now; the share of stolen time is that of a tenth of a second."""
        with self._jobs.folder("snapshot") as work:
            lines = self._jobs.call("snapshot", work, _SHORT_S)
        return msgspec.convert(lines[0]["snapshot"], Snapshot)

    def supports(self, model: StoredArtifact) -> SupportReport:
        """Whether the model is TFLite with tensors of numbers and an interpreter takes it on the device, which is tried.

        The note says which operators XNNPACK leaves to the interpreter's own, often slower, kernels. A model that the device's
        package is known to compute wrongly is not supported, and does not load for any other call either.
        """
        refused = refused_record(model.record, Format.TFLITE)
        if refused is not None:
            return refused
        try:
            with self._jobs.folder("check") as work:
                found = self._jobs.call("check", work, _SHORT_S, model=self._jobs.send_model(model))[0]
        except UnsupportedModel as error:
            return SupportReport(supported=False, missing={str(error.subject): str(error.found)}, note=error.what)
        except RunnerFailed as error:
            return SupportReport(supported=False, missing={"session": str(error.found)}, note=f"creating an interpreter failed hard: {error.what}")
        return msgspec.structs.replace(compared_names(model.record, found["inputs"], found["outputs"]), note=delegation_text(found["facts"]))

    def compile(self, model: StoredArtifact, folder: Path) -> StoredArtifact:
        """The same files in `folder`: LiteRT deploys what it is given."""
        return model if folder.resolve() == model.folder.resolve() else model.copy_to(folder)

    def benchmark(self, request: BenchmarkRequest) -> tuple[Launch, ...]:
        """One launch, a fresh process on the device, per label of the schedule, in order, with raw samples.

        A sample covers copying the inputs in, the inference and copying all outputs out, in the types of the file.

        Raises:
            ConfigError: the schedule is empty or names a label without a model or inputs; DataError: the inputs do not fit.
            DeviceBusy: another benchmark held the device for `measure.lock_wait_s`.
            DeviceTimeout, LinkLost, RunnerFailed: the device or the way to it failed; ask again to find a job that still runs.
            UnsupportedModel, ModelError: a model cannot be loaded, or not run with these inputs.
        """
        return self._jobs.benchmark(replace(request, inputs=fitting_request(request)))

    def infer(self, model: StoredArtifact, inputs: Tensors, taps: Sequence[str] = ()) -> dict[str, Array]:
        """Outputs `(samples, ...)` by the names and in the order of the IOSpec, then the tapped tensors; all of it in one process.

        Samples go one by one with a batch axis of 1 where the first axis of the inputs is 1 or open, as deployed; a fixed batch of B
        takes B samples at a time. Quantized outputs and taps come as float32 values. With taps XNNPACK is off, since it keeps inner
        tensors to itself: everything, the outputs too, is then computed by the interpreter's own kernels and may round differently
        than what is deployed. Taps are tensors of the file by name.

        Raises:
            ModelError: a tap or an output is no tensor of the file, or the model does not run with these inputs.
            DataError: an input is missing, is not numeric, or the numbers of samples differ.
            UnsupportedModel: the device's package does not load the model, or is known to compute it wrongly.
        """
        tensors, names = fitting(model, inputs), output_names(model, taps)
        samples = len(next(iter(tensors.values())))
        with self._jobs.folder("infer") as work:
            fields = {
                "model": self._jobs.send_model(model),
                "inputs": self._jobs.send_tensors(work, tensors),
                "outputs": names,
                "taps": names[len(model.record.iospec.outputs) :],
            }
            line = self._jobs.call("infer", work, _SHORT_S + samples * _SAMPLE_S, **fields)[0]
            return {name: self._jobs.fetch(line["files"][name]) for name in names}

    def op_times(self, model: StoredArtifact, inputs: Tensors, runs: int = 50) -> tuple[OpTime, ...]:
        """There are none.

        Raises:
            UnsupportedModel: always; the interpreter of the Python packages has no profiler.
        """
        raise UnsupportedModel(
            "the runtime litert cannot time single operators",
            found="the interpreter of the Python package has no profiler",
            hint="compare whole models, or profile with benchmark_model --enable_op_profiling=true on the device",
            subject=self.name,
        )


def delegation_text(facts: Mapping[str, Any]) -> str:
    """How much of a model XNNPACK took, in words: `XNNPACK runs 4 of 5 operators in 1 part; the interpreter runs SUM (1)`."""
    nodes, outside = facts["nodes"], facts["outside"]
    taken, parts = nodes - sum(outside.values()), facts["partitions"]
    if not outside:
        return f"XNNPACK runs all {nodes} operators in {parts} part{'s' if parts != 1 else ''}"
    left = ", ".join(f"{name} ({count})" for name, count in sorted(outside.items(), key=lambda item: (-item[1], item[0])))
    return f"XNNPACK runs {taken} of {nodes} operators in {parts} part{'s' if parts != 1 else ''}; the interpreter runs {left}"
