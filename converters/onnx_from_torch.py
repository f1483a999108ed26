"""From a `torch.nn.Module` to one ONNX file, through the exporter that is built on `torch.export`."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.artifact import StoredArtifact, store_artifact
from edgekd.contracts import ConvertRequest
from edgekd.errors import ConfigError, ConversionRejected, DataError, MissingDependency, ModelError
from edgekd.models.onnx_file import BATCH, PROTO_LIMIT, count_ops, depth_of, iospec_of, name_nodes, opset_of, require_onnx, strip_notes, write_model
from edgekd.records import Format, IOSpec, Precision
from edgekd.tree import flatten_outputs

from ._onnx_io import captured, last_message, versions
from ._torch_io import MODEL_ERRORS, copy_module, module_outputs

if TYPE_CHECKING:
    import torch

_ENTRY = "model.onnx"
_MAX_BATCH = 1024
_SCOPES = "pkg.torch.onnx.name_scopes"


class OnnxFromTorch:
    """Exports a module with the inputs of the request's IOSpec, in their order, as positional arguments.

    The caller's module is copied; the copy is exported in evaluation mode, in float32, on the CPU. Nodes are named after the module
    they come from (`layer1.conv/Conv`). Options: `opset` (20) and `batch`: `static` (bound to 1, the default) or `dynamic`.
    """

    name = "onnx-from-torch"
    source = "torch"
    target = "onnx"
    precisions: tuple[Precision, ...] = (Precision.FP32,)
    needs: Mapping[str, str] = {"torch": "distill", "onnx": "distill", "onnxscript": "distill"}
    cost_s = 7.0

    def convert(self, request: ConvertRequest) -> StoredArtifact:
        """The exported file `model.onnx` in `request.folder`.

        Raises:
            ConversionRejected: the exporter refuses the module; names the module or operator as far as it tells.
            ConfigError: an unknown option. ModelError: the source is no module. DataError: an example input is missing.
            MissingDependency: torch, onnx or onnxscript is not installed.
        """
        try:
            import onnxscript  # noqa: F401
            import torch
        except ImportError as error:
            raise MissingDependency(error.name or "torch", "distill", purpose="exporting a torch module") from error
        require_onnx("exporting a torch module")
        opset, dynamic = _options(request.options)
        if not isinstance(request.source, torch.nn.Module):
            raise ModelError("the exporter takes a torch.nn.Module", found=type(request.source).__name__, subject=self.name)
        names = tuple(tensor.name for tensor in request.iospec.inputs)
        arguments = _arguments(request, names, dynamic)
        module = copy_module(request.source)
        outputs = tuple(module_outputs(module, arguments))
        proto = _export(module, arguments, names, outputs, opset, dynamic)
        folded = count_ops(proto, {"BatchNormalization"})
        name_nodes(proto, _module_names(proto))
        strip_notes(proto)
        iospec = iospec_of(proto, request.iospec)
        found_inputs, found_outputs = tuple(t.name for t in iospec.inputs), tuple(t.name for t in iospec.outputs)
        if found_inputs != names or found_outputs != outputs:
            raise ConversionRejected(
                "the exported file has other inputs or outputs than the module",
                found=f"{found_inputs} -> {found_outputs}",
                allowed=f"{names} -> {outputs}",
                hint="an input that the model ignores is dropped by the exporter: take it out of the model's arguments",
                subject=self.name,
            )
        iospec = IOSpec(inputs=iospec.inputs, outputs=iospec.outputs, state=iospec.state, static_binding={} if dynamic else {**iospec.static_binding, BATCH: 1})
        extra = write_model(proto, request.folder, _ENTRY, limit=PROTO_LIMIT)
        return store_artifact(
            request.folder,
            _ENTRY,
            format=Format.ONNX,
            precision=Precision.FP32,
            iospec=iospec,
            opset=opset_of(proto),
            producers=versions("torch", "onnx", "onnxscript"),
            metadata={
                "converter": self.name,
                "batch": "dynamic" if dynamic else "static",
                "batch_normalizations": str(folded),
                "depth": str(depth_of(proto)),
            },
            extra_files=extra,
        )


def _options(options: Mapping[str, str | int | float | bool]) -> tuple[int, bool]:
    unknown = sorted(set(options) - {"opset", "batch"})
    if unknown:
        raise ConfigError(f"onnx-from-torch has no option {unknown[0]!r}", allowed="opset, batch")
    opset, batch = options.get("opset", 20), options.get("batch", "static")
    if isinstance(opset, bool) or not isinstance(opset, int) or not 18 <= opset <= 23:
        raise ConfigError("the option opset is out of range", found=opset, allowed="18 to 23")
    if batch not in ("static", "dynamic"):
        raise ConfigError("the option batch is unknown", found=batch, allowed="static, dynamic")
    return opset, batch == "dynamic"


def _arguments(request: ConvertRequest, names: tuple[str, ...], dynamic: bool) -> tuple[torch.Tensor, ...]:
    import torch

    arguments = []
    for name in names:
        if name not in request.example:
            raise DataError(f"the example has no input {name!r}", found=sorted(request.example), hint="give one batch for every input", subject=name)
        array = np.asarray(request.example[name])
        if array.ndim == 0 or array.shape[0] == 0:
            raise DataError(f"the example of {name!r} holds no sample", found=array.shape, hint="give one batch, batch first", subject=name)
        rows = [0, min(1, array.shape[0] - 1)] if dynamic else [0]
        arguments.append(torch.from_numpy(np.ascontiguousarray(array[rows])))
    return tuple(arguments)


def _export(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...], inputs: tuple[str, ...], outputs: tuple[str, ...], opset: int, dynamic: bool) -> Any:
    import torch

    class Flat(torch.nn.Module):
        """The module with its outputs as a flat tuple."""

        def __init__(self) -> None:
            super().__init__()
            self.model = module

        def forward(self, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
            """All outputs in the order of their names."""
            return tuple(flatten_outputs(self.model(*args)).values())

    batch = torch.export.Dim(BATCH, min=1, max=_MAX_BATCH)
    shapes = (tuple({0: batch} for _ in arguments),) if dynamic else None
    with captured(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r"# The axis name: batch will not be used", category=UserWarning)
        try:
            program = torch.onnx.export(
                Flat().eval(),
                arguments,
                dynamo=True,
                opset_version=opset,
                verbose=False,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=shapes,
            )
        except MODEL_ERRORS as error:
            where = _place(error)
            raise ConversionRejected(
                f"{type(module).__name__} cannot be exported to ONNX" + (f", at {where}" if where else ""),
                found=last_message(error),
                hint="replace the operator, or remove control flow that depends on values",
                subject=where or type(module).__name__,
            ) from error
    if program is None:
        raise ConversionRejected(f"{type(module).__name__} cannot be exported to ONNX", found="the exporter gave nothing", subject=type(module).__name__)
    return program.model_proto


def _place(error: BaseException) -> str:
    """The operator or module that the exporter blames, or nothing."""
    texts = []
    cause: BaseException | None = error
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__
    for text in reversed(texts):
        for pattern in (r"OpOverload\(op='([\w.]+)'", r"\b(aten(?:::|\.)\w+)", r"L__self___model_([\w.]+)'", r"in (forward)\b.*?\n\s*(.+)"):
            match = re.search(pattern, text)
            if match:
                return match.group(match.lastindex or 0)
    return ""


def _module_names(proto: Any) -> dict[int, str]:
    """For every node that comes from a module: `<module path>/<operator>`; the weight tells better than the trace of a fused node."""
    names = {}
    for position, node in enumerate(proto.graph.node):
        scopes = next((item.value for item in node.metadata_props if item.key == _SCOPES), "[]")
        weights = [name.removesuffix(".weight") for name in node.input if name.startswith("model.") and name.endswith(".weight")]
        path = weights or [scope for scope in ast.literal_eval(scopes)[:-1] if scope]
        if path:
            inner = path[-1].removeprefix("model").removeprefix(".")
            names[position] = f"{inner}/{node.op_type}" if inner else node.op_type
    return names
