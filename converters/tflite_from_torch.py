"""From a `torch.nn.Module` to one TFLite file by litert-torch, without TensorFlow."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from edgekd.artifact import StoredArtifact
from edgekd.contracts import ConvertRequest
from edgekd.errors import ConfigError, ConversionRejected, DataError, MissingDependency, ModelError, near_names
from edgekd.models.notes import carried_notes, weights_hash
from edgekd.models.tflite_artifact import store_tflite
from edgekd.models.tflite_file import parse_model, require_schema, unique
from edgekd.records import IOSpec, Precision, TensorSpec
from edgekd.teachers import MODEL_ERRORS
from edgekd.tree import flatten_outputs

from ._litert import blame, quiet
from ._onnx_io import Noise, versions
from ._torch_io import copy_module, module_outputs

if TYPE_CHECKING:
    import torch

_BATCH = "batch"
_OPS_PER_STEP = 16
"""Operators that litert-torch writes per time step, direction and layer of an LSTM (a BiLSTM over 50 steps: 1600)."""

_BLAMED = (
    r"OpOverload\(op='([\w.]+)'",
    r"\b(aten(?:::|\.)\w+)",
    r"\b(torch\.ops\.[\w.]+)",
    r"L__self___model_([\w.]+)'",
    r"\b((?:stablehlo|mhlo)\.\w+)",
)
"""How the library names what it stumbled over."""

_OP_CAP = 20_000
"""Unrolled operators above which a failed conversion is put down to the unrolling."""


@dataclass(frozen=True)
class _Seen:
    """What running the module once told: outputs in order, and the steps of its recurrent layers (steps * layers * directions)."""

    outputs: Mapping[str, torch.Tensor]
    recurrent_steps: int


class TfliteFromTorch:
    """Converts a module with the inputs of the request's IOSpec, in their order, as positional arguments; batch 1, all sizes fixed.

    The caller's module is copied; the copy is converted in evaluation mode, in float32, on the CPU. Inputs and outputs carry edgekd's
    names in the file, operators are named after the module they come from (`layer1.conv/CONV_2D`; the last ones after the outputs).
    Option `channel_last` (false): inputs and outputs of rank 4 are NHWC in the file; `TensorSpec.layout` says so. Recurrent layers
    are unrolled: metadata `recurrent_steps` and `op_total`. 64-bit integers become 32-bit ones.
    """

    name = "tflite-from-torch"
    source = "torch"
    target = "tflite"
    precisions: tuple[Precision, ...] = (Precision.FP32,)
    needs: Mapping[str, str] = {"torch": "distill", "litert_torch": "android"}
    cost_s = 15.0

    def convert(self, request: ConvertRequest) -> StoredArtifact:
        """The converted file `model.tflite` in `request.folder`.

        Raises:
            ConversionRejected: litert-torch refuses the module, or a dynamic batch is asked for; names the operator as far as it tells.
            ConfigError: an unknown option. ModelError: the source is no module. DataError: an example input is missing or contradicts
                the IOSpec. MissingDependency: torch or litert-torch is not installed.
        """
        channel_last = _options(request.options)
        try:
            import torch
        except ImportError as error:
            raise MissingDependency(error.name or "torch", "distill", purpose="converting a torch module") from error
        if not isinstance(request.source, torch.nn.Module):
            raise ModelError("the converter takes a torch.nn.Module", found=type(request.source).__name__, subject=self.name)
        binding = _binding(request)
        names = tuple(tensor.name for tensor in request.iospec.inputs)
        arguments = tuple(torch.from_numpy(np.array(request.example[name][:1])) for name in names)
        module = copy_module(request.source)
        seen = _run(module, arguments)
        layouts = _layouts(request.iospec, arguments, seen.outputs, channel_last)
        data = _converted(module, arguments, names, seen, frozenset(layouts) if channel_last else frozenset())
        model = parse_model(data, source="what litert-torch wrote")
        _restore_names(model, names, tuple(seen.outputs), _scopes(module))
        return store_tflite(
            model,
            request.folder,
            precision=Precision.FP32,
            like=_like(request.iospec, seen.outputs, layouts, binding),
            converter=self.name,
            producers=versions("torch", "litert-torch", "litert-converter", "ai-edge-litert"),
            metadata={"batch": "static", "channel_last": str(channel_last).lower(), "recurrent_steps": str(seen.recurrent_steps)},
            notes={"source": weights_hash(request.source), **carried_notes(request)},
        )


def _options(options: Mapping[str, str | int | float | bool]) -> bool:
    unknown = sorted(set(options) - {"batch", "channel_last"})
    if unknown:
        raise ConfigError(f"tflite-from-torch has no option {unknown[0]!r}", allowed=near_names(unknown[0], ("batch", "channel_last")))
    batch, channel_last = options.get("batch", "static"), options.get("channel_last", False)
    if batch != "static":
        raise ConversionRejected(
            "litert-torch converts with a fixed batch only", found=f"batch={batch}", allowed="static", hint="leave the batch at 1", subject="batch"
        )
    if not isinstance(channel_last, bool):
        raise ConfigError("the option channel_last is no truth value", found=channel_last, allowed="true, false")
    return channel_last


def _binding(request: ConvertRequest) -> dict[str, int]:
    """The size of every named axis, from the IOSpec's binding and the example; the batch is 1."""
    binding = {**request.iospec.static_binding}
    if binding.setdefault(_BATCH, 1) != 1:
        raise ConversionRejected("litert-torch converts with a batch of 1", found=binding[_BATCH], allowed=1, hint="bind batch to 1", subject=_BATCH)
    for tensor in request.iospec.inputs:
        if tensor.name not in request.example:
            raise DataError(
                f"the example has no input {tensor.name!r}", found=sorted(request.example), hint="give one batch for every input", subject=tensor.name
            )
        shape = np.shape(request.example[tensor.name])
        if len(shape) != len(tensor.shape) or shape[0] == 0:
            raise DataError(
                f"the example of {tensor.name!r} does not fit its shape",
                found=shape,
                allowed=tensor.shape,
                hint="give one batch, batch first",
                subject=tensor.name,
            )
        if isinstance(tensor.shape[0], str) and binding.setdefault(tensor.shape[0], 1) != 1:
            raise ConversionRejected("litert-torch converts with a batch of 1", found=binding[tensor.shape[0]], allowed=1, subject=tensor.name)
        for asked, size in zip(tensor.shape[1:], shape[1:], strict=True):
            wanted = binding.setdefault(asked, size) if isinstance(asked, str) else asked
            if wanted != size:
                raise DataError(f"the example of {tensor.name!r} has another size than its axis {asked!r}", found=size, allowed=wanted, subject=tensor.name)
    return binding


def _run(module: torch.nn.Module, arguments: Sequence[torch.Tensor]) -> _Seen:
    """Outputs of the module, and how far its recurrent layers will be unrolled."""
    import torch

    steps = 0

    def count(layer: torch.nn.Module, inputs: tuple[Any, ...], _: Any) -> None:
        nonlocal steps
        if isinstance(layer, torch.nn.RNNBase) and inputs and isinstance(inputs[0], torch.Tensor):
            length = inputs[0].shape[-2 if layer.batch_first or inputs[0].ndim == 2 else 0]
            steps += length * layer.num_layers * (2 if layer.bidirectional else 1)

    hooks = [layer.register_forward_hook(count) for layer in module.modules() if isinstance(layer, torch.nn.RNNBase)]
    try:
        outputs = module_outputs(module, tuple(arguments))
    finally:
        for hook in hooks:
            hook.remove()
    return _Seen(outputs, steps)


def _layouts(spec: IOSpec, arguments: Sequence[torch.Tensor], outputs: Mapping[str, torch.Tensor], channel_last: bool) -> dict[str, str]:
    """The layout in the file of every input and output of rank 4."""
    known = {tensor.name: tensor.layout for tensor in (*spec.inputs, *spec.outputs)}
    ranks = {tensor.name: argument.ndim for tensor, argument in zip(spec.inputs, arguments, strict=True)} | {
        name: value.ndim for name, value in outputs.items()
    }
    layouts = {name: known.get(name, "") or "NCHW" for name, rank in ranks.items() if rank == 4}
    if not channel_last:
        return layouts
    other = sorted(name for name, layout in layouts.items() if layout != "NCHW")
    if other:
        raise ConfigError("channel_last turns NCHW into NHWC", found=f"{other[0]}: {layouts[other[0]]}", hint="leave channel_last out", subject=other[0])
    return dict.fromkeys(layouts, "NHWC")


def _converted(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...], names: tuple[str, ...], seen: _Seen, turned: frozenset[str]) -> bytes:
    """The bytes that litert-torch writes for the module with flat outputs; tensors in `turned` become NHWC at the borders."""
    import torch

    with quiet():
        try:
            import litert_torch
        except ImportError as error:
            raise MissingDependency(error.name or "litert-torch", "android", purpose="converting a torch module to TFLite") from error

    class Flat(torch.nn.Module):
        """The module with its outputs as a flat tuple, absent ones left out."""

        def __init__(self) -> None:
            super().__init__()
            self.model = module

        def forward(self, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
            """All outputs in the order of their names."""
            return tuple(flatten_outputs(self.model(*args)).values())

    wrapped: torch.nn.Module = Flat().eval()
    if turned:
        inside = [position for position, name in enumerate(names) if name in turned]
        outside = [position for position, name in enumerate(seen.outputs) if name in turned]
        wrapped = litert_torch.to_channel_last_io(wrapped, args=inside, outputs=outside).eval()
        arguments = tuple(value.permute(0, 2, 3, 1).contiguous() if at in inside else value for at, value in enumerate(arguments))
    with quiet() as noise:
        try:
            return bytes(litert_torch.convert(wrapped, arguments).model_content())
        except Exception as error:
            if not _is_refusal(error):
                raise
            failure = error
    raise _refused(module, seen, failure, noise) from failure


def _is_refusal(error: Exception) -> bool:
    """Whether an error says that the module cannot be converted: it is of the kinds that models raise, or of the libraries' own."""
    own = type(error).__module__.partition(".")[0] in ("torch", "torchao", "jax", "jaxlib", "litert_torch", "litert_converter", "ai_edge_litert")
    return own or isinstance(error, (*MODEL_ERRORS, RecursionError, MemoryError))


def _refused(module: torch.nn.Module, seen: _Seen, failure: Exception, noise: Noise) -> ConversionRejected:
    kind = type(module).__name__
    unrolled = seen.recurrent_steps * _OPS_PER_STEP
    where = _place(str(failure))
    if unrolled > _OP_CAP:
        hint = (
            f"its {seen.recurrent_steps} recurrent steps unroll to about {unrolled} operators, above {_OP_CAP}: convert one step with its state, "
            "or shorten the sequence"
        )
    else:
        hint = "replace the operator, or remove control flow that depends on values"
    return ConversionRejected(
        f"{kind} cannot be converted to TFLite" + (f", at {where}" if where else ""),
        found=blame(failure, noise),
        hint=hint,
        subject=where.split(" ")[0] or kind,
    )


def _place(text: str) -> str:
    """The operator that the library blames and the line of the user's code that calls it, as far as it tells."""
    found = next((match.group(1) for match in (re.search(pattern, text) for pattern in _BLAMED) if match), "")
    lines = re.findall(r'File "([^"\n]+)", line (\d+), in forward', text)
    line = f"{Path(lines[-1][0]).name}:{lines[-1][1]}" if lines else ""
    return f"{found} ({line})" if found and line else found or line


def _scopes(module: torch.nn.Module) -> dict[str, str]:
    """What litert-torch calls a module in the names of tensors, to the module's path: `pkg.Net_model/torch.nn.modules.conv.Conv2d_c` to `c`.

    Lists and dictionaries of modules are never called, so they are not in those names; a name that fits two modules is left out.
    """
    import torch

    held = (torch.nn.ModuleList, torch.nn.ModuleDict)
    layers = dict(module.named_modules())
    scopes: dict[str, str | None] = {}
    for path in layers:
        steps = path.split(".") if path else []
        chain = [(layers[".".join(steps[: at + 1])], step) for at, step in enumerate(steps)]
        parts = [f"{_class_name(layer)}_{step}" for layer, step in chain if not isinstance(layer, held)]
        key = "/".join([f"{_class_name(module)}_model", *parts])
        if not isinstance(layers[path], held):
            scopes[key] = None if key in scopes else path
    return {key: path for key, path in scopes.items() if path is not None}


def _class_name(layer: torch.nn.Module) -> str:
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


def _restore_names(model: Any, inputs: tuple[str, ...], outputs: tuple[str, ...], scopes: Mapping[str, str]) -> None:
    """Give the file edgekd's names, in place: inputs, outputs, operators after their modules, weights after their operators.

    Raises:
        ConversionRejected: the file has other inputs or outputs than the module.
    """
    _, reader = require_schema("naming the tensors of a TFLite model")
    signature, graph = model.signatureDefs[0], model.subgraphs[0]
    found = (sorted(_numbers(signature.inputs, "args_")), sorted(_numbers(signature.outputs, "output_")))
    if found != (list(range(len(inputs))), list(range(len(outputs)))):
        raise ConversionRejected(
            "the converted file has other inputs or outputs than the module",
            found=[[item.name.decode() for item in items] for items in (signature.inputs, signature.outputs)],
            allowed=f"{inputs} -> {outputs}",
            hint="return tensors that depend on the inputs",
            subject="tflite-from-torch",
        )
    taken: set[str] = set()
    done: dict[int, str] = {}
    for items, names, prefix in ((signature.inputs, inputs, "args_"), (signature.outputs, outputs, "output_")):
        for item, number in zip(items, _numbers(items, prefix), strict=True):
            item.name = names[number].encode()
            if item.tensorIndex not in done:
                done[item.tensorIndex] = unique(names[number], taken)
    for op in graph.operators:
        kind = reader.opcode_to_name(model, op.opcodeIndex) or "CUSTOM"
        named = [graph.tensors[index].name.decode() for index in (*op.outputs[:1], *(index for index in op.inputs if index >= 0 and index not in done))]
        path = next((path for path in (_module_path(name, scopes) for name in named) if path is not None), "")
        wish = f"{path}/{kind}" if path else kind
        for index in op.outputs:
            if index not in done:
                done[index] = unique(wish, taken)
        for position, index in enumerate(op.inputs):
            if index >= 0 and index not in done:
                done[index] = unique(f"{wish}/{position}", taken)
    for index, tensor in enumerate(graph.tensors):
        tensor.name = (done[index] if index in done else unique(f"unused_{index}", taken)).encode()


def _numbers(items: Any, prefix: str) -> list[int]:
    names = [item.name.decode() for item in items or []]
    return [int(name.removeprefix(prefix)) if re.fullmatch(rf"{prefix}\d+", name) else -1 for name in names]


def _module_path(name: str, scopes: Mapping[str, str]) -> str | None:
    """The path of the module in a tensor's name, `None` where none is known.

    The name lists what was fused into the operator, separated by semicolons, and ends in a counter; the operator itself comes last.
    """
    root = next(iter(scopes))
    parts = [part[max(part.find(root), 0) :] for part in name.split(";")]
    return next((scopes[part] for part in reversed(parts) if part in scopes), None)


def _like(spec: IOSpec, outputs: Mapping[str, torch.Tensor], layouts: Mapping[str, str], binding: Mapping[str, int]) -> IOSpec:
    """The request's IOSpec with layouts, all axes bound, and an entry for every output of the module."""
    known = {tensor.name: tensor for tensor in spec.outputs}
    return IOSpec(
        inputs=tuple(msgspec.structs.replace(tensor, layout=layouts.get(tensor.name, tensor.layout)) for tensor in spec.inputs),
        outputs=tuple(
            TensorSpec(
                name=name,
                dtype=str(value.dtype).removeprefix("torch."),
                shape=tuple(value.shape),
                layout=layouts.get(name, known[name].layout if name in known else ""),
                value_range=known[name].value_range if name in known else None,
                normalization=known[name].normalization if name in known else "",
            )
            for name, value in outputs.items()
        ),
        state=spec.state,
        static_binding=dict(binding),
    )
