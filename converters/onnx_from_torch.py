"""From a `torch.nn.Module` to one ONNX file, through the exporter that is built on `torch.export`."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgekd.artifact import StoredArtifact
from edgekd.contracts import ConvertRequest
from edgekd.errors import ConfigError, ConversionRejected, MissingDependency
from edgekd.models.onnx_file import BATCH, name_nodes, strip_notes
from edgekd.records import Precision
from edgekd.teachers import MODEL_ERRORS

from ._onnx_io import captured
from ._onnx_tidy import tidy
from ._torch_onnx import flat, prepared, refusal, store_exported

if TYPE_CHECKING:
    import torch

_MAX_BATCH = 1024
_SCOPES = "pkg.torch.onnx.name_scopes"


class OnnxFromTorch:
    """Exports a module with the inputs of the request's IOSpec, in their order, as positional arguments.

    The caller's module is copied; the copy is exported in evaluation mode, in float32, on the CPU. Nodes are named after the module
    they come from (`layer1.conv/Conv`). Fake quantization becomes QuantizeLinear and DequantizeLinear, and the artifact int8.
    Options: `opset` (20) and `batch`: `static` (bound to 1, the default) or `dynamic`.
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
        opset, dynamic = _options(request.options)
        module, arguments, names, outputs = prepared(request, self.name, dynamic=dynamic)
        try:
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise MissingDependency("onnxscript", "distill", purpose="exporting a torch module") from error
        proto = _export(module, arguments, names, outputs, opset, dynamic)
        name_nodes(proto, _module_names(proto))
        strip_notes(proto)
        proto, tidied = tidy(proto, request.iospec, request.example)
        return store_exported(
            proto,
            request,
            self.name,
            names=names,
            outputs=outputs,
            dynamic=dynamic,
            producers=("torch", "onnx", "onnxscript"),
            metadata=tidied,
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


def _export(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...], inputs: tuple[str, ...], outputs: tuple[str, ...], opset: int, dynamic: bool) -> Any:
    import torch

    batch = torch.export.Dim(BATCH, min=1, max=_MAX_BATCH)
    shapes = (tuple({0: batch} for _ in arguments),) if dynamic else None
    with captured(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r"The tensor attributes? .*_flat_weights", category=UserWarning)  # how torch's recurrent layers list theirs
        warnings.filterwarnings("ignore", message=r"# The axis name: batch will not be used", category=UserWarning)
        try:
            program = torch.onnx.export(
                flat(module),
                arguments,
                dynamo=True,
                opset_version=opset,
                verbose=False,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=shapes,
            )
        except MODEL_ERRORS as error:
            raise refusal(module, error) from error
    if program is None:
        raise ConversionRejected(f"{type(module).__name__} cannot be exported to ONNX", found="the exporter gave nothing", subject=type(module).__name__)
    return program.model_proto


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
