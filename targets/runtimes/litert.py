"""LiteRT on a processor: TFLite files run as they are, through the on-device runner and whatever transport leads there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgekd.artifact import StoredArtifact
from edgekd.contracts import Array, Tensors
from edgekd.errors import UnsupportedModel
from edgekd.records import Capabilities, Format, OpTime, Precision

from ._job import fed_back
from ._models import in_sequence, out_of_sequence, output_names
from ._on_runner import SAMPLE_S, SHORT_S, OnRunner


class LiteRt(OnRunner):
    """The `litert` runtime: the interpreter of ai-edge-litert, or of tflite-runtime where the device has only that, with XNNPACK.

    The fingerprint's `package` says which, `runtime_version` its version. `runtime.options` knows `lock` (the path of the device's lock
    file; the default is one file for all users of the device). Inputs and outputs go by the names in the file's signature, or by those
    of its tensors where it has none; the artifact's IOSpec has the same names.
    """

    name = "litert"
    format = Format.TFLITE
    package = "ai-edge-litert"
    modules = ("ai_edge_litert", "tflite_runtime")
    extra = "litert"

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
            state=True,
        )

    def support_note(self, found: Mapping[str, Any]) -> str:
        """Which operators XNNPACK leaves to the interpreter's own, often slower, kernels."""
        return delegation_text(found["facts"])

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
        (tensors, steps), names = in_sequence(model, inputs), output_names(model, taps)
        samples = max(map(len, tensors.values()))
        with self._jobs.folder("infer") as work:
            fields: dict[str, object] = {
                "model": self._jobs.send_model(model),
                "inputs": self._jobs.send_tensors(work, tensors),
                "outputs": names,
                "taps": names[len(model.record.iospec.outputs) :],
            }
            fields |= {"state": fed_back(model), "steps": steps} if steps else {}
            line = self._jobs.call("infer", work, SHORT_S + samples * SAMPLE_S, **fields)[0]
            return out_of_sequence({name: self._jobs.fetch(line["files"][name]) for name in names}, steps)

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
