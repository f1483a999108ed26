"""An ONNX file made ready for quantization: constants and batch norms folded, shapes inferred, every node named."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekd.artifact import StoredArtifact, store_artifact
from edgekd.contracts import ConvertRequest
from edgekd.errors import ConversionRejected, MissingDependency, ModelError
from edgekd.models.onnx_file import (
    count_ops,
    depth_of,
    float_tensors,
    iospec_of,
    load_model,
    name_nodes,
    nodes_of,
    note_state,
    opset_of,
    require_onnx,
    strip_notes,
    write_model,
)
from edgekd.records import Format, Precision

from ._onnx_io import captured, last_message, versions

_ENTRY = "prepared.onnx"
_MIN_OPSET = 13
"""Per-channel QuantizeLinear came with operator set 13."""

_COMPUTING = {
    "Add", "AveragePool", "BatchNormalization", "Concat", "Conv", "ConvTranspose", "Gemm", "GlobalAveragePool", "InstanceNormalization",
    "LayerNormalization", "LeakyRelu", "MatMul", "Mul", "Resize", "Sigmoid", "Softmax", "Where",
}  # fmt: skip
"""Operators that lose accuracy of their own in int8; the others move values, or are fused into these."""


class PrepareOnnx:
    """Runs onnxruntime's pre-processing and says in the metadata how far it got; changes no numbers beyond float rounding.

    Metadata: `prepared` is `symbolic` (everything), `no-symbolic` (symbolic shape inference failed) or `plain` (pre-processing failed;
    shapes only), with `prepared_reason`; `tensors` and `ops` are JSON: what calibration observes (elements per sample, -1 unknown)
    and which nodes can stay in float (`[name, operator]`).
    """

    name = "prepare-onnx"
    source = "onnx"
    target = "onnx"
    precisions: tuple[Precision, ...] = (Precision.FP32,)
    needs: Mapping[str, str] = {"onnx": "x86", "onnxruntime": "x86"}
    cost_s = 1.0

    def convert(self, request: ConvertRequest) -> StoredArtifact:
        """The prepared file in `request.folder`; a source that is prepared already is copied there.

        Raises:
            ConversionRejected: the model is not float32, or too old to be upgraded.
            ModelError: the source is no ONNX artifact.
        """
        require_onnx("quantizing an ONNX model")
        try:
            import onnxruntime.quantization.registry as registry
        except ImportError as error:
            raise MissingDependency("onnxruntime", "x86", purpose="quantizing an ONNX model") from error
        source = request.source
        if not isinstance(source, StoredArtifact) or source.record.format is not Format.ONNX:
            raise ModelError("the quantizer takes an ONNX artifact", found=type(source).__name__, subject=self.name)
        if source.record.precision is not Precision.FP32:
            raise ConversionRejected("only a float32 model can be quantized", found=source.record.precision.value, allowed="fp32", subject=self.name)
        if "prepared" in source.record.metadata:
            return source.copy_to(request.folder)
        model, upgraded = _upgraded(load_model(source.entry))
        name_nodes(model)
        prepared, how, reason = _pre_process(model)
        name_nodes(prepared)
        strip_notes(prepared)
        kinds = set(registry.QLinearOpsRegistry) | set(registry.QDQRegistry)
        nodes = nodes_of(prepared)
        touched = {name for node in nodes if node.op_type in kinds for name in (*node.inputs, *node.outputs)}
        floats = float_tensors(prepared)
        tensors = {name: size for name, size in floats.items() if name in touched}
        note_state(prepared, source.record.iospec.state)
        extra = write_model(prepared, request.folder, _ENTRY)
        return store_artifact(
            request.folder,
            _ENTRY,
            format=Format.ONNX,
            precision=Precision.FP32,
            iospec=iospec_of(prepared, source.record.iospec),
            opset=opset_of(prepared),
            producers={**source.record.producers, **versions("onnx", "onnxruntime")},
            parent=source.record.content_hash(),
            metadata={
                "converter": self.name,
                "prepared": how,
                "prepared_reason": reason,
                "upgraded_from_opset": upgraded,
                "depth": str(depth_of(prepared)),
                "batch_normalizations": str(count_ops(prepared, {"BatchNormalization"})),
                "tensors": json.dumps(tensors),
                "ops": json.dumps([[node.name, node.op_type] for node in nodes if node.op_type in _COMPUTING & kinds and node.outputs[0] in floats]),
            },
            extra_files=extra,
        )


def _upgraded(model: Any) -> tuple[Any, str]:
    """The model at operator set 13 or later, and the version it came from if it was changed."""
    from onnx import version_converter

    found = opset_of(model)
    if found >= _MIN_OPSET:
        return model, ""
    try:
        return version_converter.convert_version(model, _MIN_OPSET), str(found)
    except (RuntimeError, version_converter.ConvertError) as error:
        raise ConversionRejected(
            f"the model's operator set {found} cannot be raised to {_MIN_OPSET}, which int8 needs",
            found=last_message(error),
            hint="export it with a newer operator set",
        ) from error


def _pre_process(model: Any) -> tuple[Any, str, str]:
    """The pre-processed model, how it was made, and why not by the full road."""
    onnx = require_onnx("quantizing an ONNX model")
    reasons: list[str] = []
    for how, skip in (("symbolic", False), ("no-symbolic", True)):
        done, reason = _try_pre_process(model, skip_symbolic=skip)
        if done is not None:
            return done, how, "; ".join(reasons)
        reasons.append(f"{how}: {reason}")
    return onnx.shape_inference.infer_shapes(model, data_prop=True), "plain", "; ".join(reasons)


def _try_pre_process(model: Any, *, skip_symbolic: bool) -> tuple[Any, str]:
    """The library's result, or `None` with its message.

    The library raises a bare `Exception` when shapes stay unknown (and leaves a file in the current folder), and only logs when its
    optimizer failed; both are failures here.
    """
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory(prefix="edgekd.prepare.") as folder:
        work, output = Path(folder), Path(folder) / "out.onnx"
        write_model(model, work, "in.onnx")
        with captured() as noise, contextlib.chdir(folder):
            try:
                quant_pre_process(str(work / "in.onnx"), str(output), skip_symbolic_shape=skip_symbolic)
            except Exception as error:
                known = type(error) is Exception or isinstance(
                    error, (RuntimeError, ValueError, TypeError, AssertionError, LookupError, AttributeError, ImportError)
                )
                if not known:
                    raise
                return None, last_message(error)
        if noise.errors:
            return None, noise.errors[0].splitlines()[0]
        return load_model(output), ""
