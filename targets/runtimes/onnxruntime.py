"""ONNX Runtime on a processor: ONNX files run as they are, through the on-device runner and whatever transport leads there."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from edgekd.artifact import StoredArtifact, store_artifact
from edgekd.contracts import Array, Tensors
from edgekd.errors import MissingDependency
from edgekd.records import Capabilities, Format, OpTime, Precision

from ._job import fed_back
from ._models import in_sequence, out_of_sequence, output_names, tap, with_state
from ._on_runner import SAMPLE_S, SHORT_S, OnRunner


class OnnxRuntime(OnRunner):
    """The `onnxruntime` runtime: CPU provider, all graph optimizations, `runtime.threads` intra-op threads, one inter-op thread.

    `runtime.options` knows `spinning` (default true: threads wait busily, as is ONNX Runtime's default) and `lock` (the path of
    the device's lock file; the default is one file for all users of the device).
    """

    name = "onnxruntime"
    format = Format.ONNX
    package = "onnxruntime"
    modules = ("onnxruntime",)
    extra = "x86"
    options = {"spinning": (bool, "true or false"), "lock": (str, "a path")}

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
            state=True,
        )

    def infer(self, model: StoredArtifact, inputs: Tensors, taps: Sequence[str] = ()) -> dict[str, Array]:
        """Outputs `(samples, ...)` by the names and in the order of the IOSpec, then the tapped tensors; all of it in one process.

        Samples go one by one with a batch axis of 1 where the first axis of the inputs is 1 or a symbol, as deployed; a fixed
        batch of B takes B samples at a time. A tapped tensor becomes a graph output of a copy of the model, which keeps ONNX Runtime
        from fusing across it: its neighbours may round differently than in the model that is deployed.

        Raises:
            ModelError: a tap or an output is no tensor of the graph, or the model does not run with these inputs.
            DataError: an input is missing, is not numeric, or the numbers of samples differ.
        """
        (tensors, steps), names = in_sequence(model, inputs), output_names(model, taps)
        samples = max(map(len, tensors.values()))
        with tempfile.TemporaryDirectory(prefix="edgekd-") as folder, self._jobs.folder("infer") as work:
            inner = names[len(model.record.iospec.outputs) :]
            ready = tapped_model(model, inner, Path(folder)) if inner else model
            fields: dict[str, object] = {"model": self._jobs.send_model(ready), "inputs": self._jobs.send_tensors(work, tensors), "outputs": names}
            fields |= {"state": fed_back(model), "steps": steps} if steps else {}
            line = self._jobs.call("infer", work, SHORT_S + samples * SAMPLE_S, **fields)[0]
            return out_of_sequence({name: self._jobs.fetch(line["files"][name]) for name in names}, steps)

    def op_times(self, model: StoredArtifact, inputs: Tensors, runs: int = 50) -> tuple[OpTime, ...]:
        """Median time per operator in execution order, after ONNX Runtime's fusions, as its profiler tells.

        The profiler counts whole microseconds and slows the model down by a tenth or more: use the shares, not the sum.
        """
        with self._jobs.folder("op_times") as work:
            fields = {"model": self._jobs.send_model(model), "inputs": self._jobs.send_tensors(work, with_state(model, inputs)), "runs": runs}
            ops = self._jobs.call("op_times", work, SHORT_S + runs * SAMPLE_S, **fields)[0]["ops"]
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
