"""From a `torch.nn.Module` to one ONNX file of an old operator set, through torch's exporter that works on TorchScript."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

from edgekd.artifact import StoredArtifact
from edgekd.contracts import ConvertRequest
from edgekd.errors import ConfigError
from edgekd.models.onnx_file import name_nodes, require_onnx, strip_notes
from edgekd.records import Precision
from edgekd.teachers import MODEL_ERRORS

from ._onnx_io import captured
from ._onnx_tidy import tidy
from ._torch_onnx import flat, prepared, refusal, store_exported

_OLDEST, _NEWEST, _DEFAULT = 9, 20, 17


class OnnxLegacyFromTorch:
    """Exports by tracing, for readers of old operator sets such as onnx-tf; `onnx-from-torch` is the one for everything else.

    The caller's module is copied; the copy is traced in evaluation mode, in float32, on the CPU, with a batch of 1: what depends on
    values is frozen as the example has it. Option: `opset` (17), 9 to 20. torch calls this exporter deprecated.
    """

    name = "onnx-legacy-from-torch"
    source = "torch"
    target = "onnx"
    precisions: tuple[Precision, ...] = (Precision.FP32,)
    needs: Mapping[str, str] = {"torch": "distill", "onnx": "distill"}
    cost_s = 8.0

    def convert(self, request: ConvertRequest) -> StoredArtifact:
        """The exported file `model.onnx` in `request.folder`.

        Raises:
            ConversionRejected: the exporter refuses the module; names the operator as far as it tells.
            ConfigError: an unknown option. ModelError: the source is no module. DataError: an example input is missing.
            MissingDependency: torch or onnx is not installed.
        """
        opset = _opset(request.options)
        module, arguments, names, outputs = prepared(request, self.name, dynamic=False)
        import torch

        onnx = require_onnx("exporting a torch module")
        with tempfile.TemporaryDirectory(prefix="edgekd-") as work, captured(), warnings.catch_warnings():
            path = Path(work) / "exported.onnx"
            warnings.simplefilter("ignore")  # it warns of its own deprecation and of every branch that tracing freezes
            try:
                torch.onnx.export(
                    flat(module), arguments, path, dynamo=False, opset_version=opset, input_names=list(names), output_names=list(outputs), verbose=False
                )
            except MODEL_ERRORS as error:
                raise refusal(module, error) from error
            proto = onnx.load(path)
        name_nodes(proto, {position: node.name.removeprefix("/model/") for position, node in enumerate(proto.graph.node)})
        strip_notes(proto)
        proto, tidied = tidy(proto, request.iospec, request.example)
        return store_exported(
            proto,
            request,
            self.name,
            names=names,
            outputs=outputs,
            dynamic=False,
            producers=("torch", "onnx"),
            metadata=tidied,
        )


def _opset(options: Mapping[str, str | int | float | bool]) -> int:
    unknown = sorted(set(options) - {"opset"})
    if unknown:
        raise ConfigError(f"onnx-legacy-from-torch has no option {unknown[0]!r}", allowed="opset")
    opset = options.get("opset", _DEFAULT)
    if isinstance(opset, bool) or not isinstance(opset, int) or not _OLDEST <= opset <= _NEWEST:
        raise ConfigError("the option opset is out of range", found=opset, allowed=f"{_OLDEST} to {_NEWEST}")
    return opset
