"""What the two exporters from torch to ONNX share: arguments, one flat output, and the file stored with what is known about it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.artifact import StoredArtifact
from edgekd.contracts import ConvertRequest
from edgekd.errors import ConversionRejected, DataError, MissingDependency, ModelError
from edgekd.models.notes import carried_notes, weights_hash
from edgekd.models.onnx_artifact import store_onnx
from edgekd.models.onnx_file import BATCH, iospec_of, precision_of, require_onnx
from edgekd.records import IOSpec
from edgekd.tree import flatten_outputs

from ._onnx_io import last_message, versions
from ._torch_io import copy_module, module_outputs

if TYPE_CHECKING:
    import torch

_ENTRY = "model.onnx"


def prepared(request: ConvertRequest, converter: str, *, dynamic: bool) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...], tuple[str, ...], tuple[str, ...]]:
    """A copy of the request's module in evaluation mode, its arguments (one sample, two where the batch is `dynamic`), and the names of inputs and outputs.

    Raises:
        MissingDependency: torch or onnx is not installed. ModelError: the source is no module. DataError: an example input is missing.
        ConversionRejected: the module fails on its example.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingDependency("torch", "distill", purpose="exporting a torch module") from error
    require_onnx("exporting a torch module")
    if not isinstance(request.source, torch.nn.Module):
        raise ModelError("the exporter takes a torch.nn.Module", found=type(request.source).__name__, subject=converter)
    names = tuple(tensor.name for tensor in request.iospec.inputs)
    arguments = _arguments(request, names, dynamic)
    module = copy_module(request.source)
    return module, arguments, names, tuple(module_outputs(module, arguments))


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


def flat(module: torch.nn.Module) -> torch.nn.Module:
    """The module with its outputs as a flat tuple, in the order of their names."""
    import torch

    class Flat(torch.nn.Module):
        """The module as `model`, called with positional arguments."""

        def __init__(self) -> None:
            super().__init__()
            self.model = module

        def forward(self, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
            """All outputs in the order of their names."""
            return tuple(flatten_outputs(self.model(*args)).values())

    return Flat().eval()


def refusal(module: torch.nn.Module, error: BaseException) -> ConversionRejected:
    """That an exporter failed, with the operator or module that it blames."""
    where = _place(error)
    return ConversionRejected(
        f"{type(module).__name__} cannot be exported to ONNX" + (f", at {where}" if where else ""),
        found=last_message(error),
        hint="replace the operator, or remove control flow that depends on values",
        subject=where or type(module).__name__,
    )


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


def store_exported(
    proto: Any,
    request: ConvertRequest,
    converter: str,
    *,
    names: tuple[str, ...],
    outputs: tuple[str, ...],
    dynamic: bool,
    producers: Sequence[str],
    metadata: Mapping[str, str],
) -> StoredArtifact:
    """The file `model.onnx` in the request's folder; its precision is int8 where the module rounds to it itself.

    Raises:
        ConversionRejected: its inputs or outputs are not those of the module.
    """
    iospec = iospec_of(proto, request.iospec)
    found_inputs, found_outputs = tuple(t.name for t in iospec.inputs), tuple(t.name for t in iospec.outputs)
    if found_inputs != names or found_outputs != outputs:
        raise ConversionRejected(
            "the exported file has other inputs or outputs than the module",
            found=f"{found_inputs} -> {found_outputs}",
            allowed=f"{names} -> {outputs}",
            hint="an input that the model ignores is dropped by the exporter: take it out of the model's arguments",
            subject=converter,
        )
    iospec = IOSpec(inputs=iospec.inputs, outputs=iospec.outputs, state=iospec.state, static_binding={} if dynamic else {**iospec.static_binding, BATCH: 1})
    return store_onnx(
        proto,
        request.folder,
        _ENTRY,
        precision=precision_of(proto),
        iospec=iospec,
        producers=versions(*producers),
        metadata={"converter": converter, "batch": "dynamic" if dynamic else "static", **metadata},
        notes={"source": weights_hash(request.source), **carried_notes(request)},
    )
