"""ONNX files as edgekd sees them: their tensors as an `IOSpec`, their nodes, bound axes, files written whole.

onnx is imported when a function is called, so that the module itself costs nothing.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd.errors import MissingDependency, ModelError, near_names
from edgekd.models.layout import MOVING, RENAMING
from edgekd.records import IOSpec, Precision, TensorSpec
from edgekd.storage import sha256_bytes, sha256_file, write_atomic

BATCH = "batch"
"""The name given to a dynamic first axis that the file leaves without one."""


PROTO_LIMIT = 2**31 - 2**20
"""Bytes above which the weights go to a file of their own; a protobuf message ends at 2 GiB."""

_QUANTIZED = {"QuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear"}
_IDLE_OPS = MOVING | RENAMING | {"Identity", "QuantizeLinear", "DequantizeLinear"}


@dataclass(frozen=True)
class Node:
    """One node of a graph; `inputs` and `outputs` are tensor names in order, empty names left out."""

    name: str
    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def require_onnx(purpose: str) -> Any:
    """The module `onnx`.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        import onnx
        import onnx.shape_inference
    except ImportError as error:
        raise MissingDependency("onnx", "x86", purpose=purpose) from error
    return onnx


def load_model(path: Path) -> Any:
    """The `onnx.ModelProto` in a file, external data included.

    Raises:
        ModelError: the file is missing, or is no ONNX model.
    """
    onnx = require_onnx("reading an ONNX model")
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    if not path.is_file():
        raise ModelError(f"{path} does not exist", hint="check the path", subject=path)
    try:
        model = onnx.load(str(path))
    except (DecodeError, ValueError, OSError, onnx.checker.ValidationError) as error:
        raise ModelError(f"{path} is not a readable ONNX model", found=first_line(error), hint="export it again", subject=path) from error
    if not model.graph.node and not model.graph.output:
        raise ModelError(f"{path} is not a readable ONNX model", found="a file without a graph", hint="export it again", subject=path)
    return model


def opset_of(model: Any) -> int:
    """The version of the default operator set that the model imports."""
    return max((int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def named_ops(model: Any) -> tuple[tuple[str, str], ...]:
    """Name and operator of every node, those of inner graphs too."""
    found: list[tuple[str, str]] = []

    def walk(graph: Any) -> None:
        for node in graph.node:
            found.append((node.name, node.op_type))
            for attribute in node.attribute:
                for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                    walk(inner)

    walk(model.graph)
    return tuple(found)


def nodes_of(model: Any) -> tuple[Node, ...]:
    """The nodes of the main graph, in its (topological) order."""
    return tuple(
        Node(node.name, node.op_type, tuple(name for name in node.input if name), tuple(name for name in node.output if name)) for node in model.graph.node
    )


def float_tensors(model: Any) -> dict[str, int]:
    """Every float tensor of the main graph that is no weight, with its number of elements per sample; -1 where unknown.

    The symbols of the inputs' first axes count as 1, since samples run one by one. In topological order, inputs first.
    """
    onnx = require_onnx("reading an ONNX model")
    graph = model.graph
    weights = {item.name for item in graph.initializer}
    known = {item.name: item for item in (*graph.value_info, *graph.output, *graph.input)}
    firsts = [item.type.tensor_type.shape.dim[0] for item in graph.input if item.type.tensor_type.shape.dim]
    symbols = {axis.dim_param for axis in firsts if axis.dim_param}
    order = [item.name for item in graph.input] + [name for node in graph.node for name in node.output if name]
    found: dict[str, int] = {}
    for name in order:
        if name in weights or name not in known or not known[name].type.HasField("tensor_type"):
            continue
        tensor = known[name].type.tensor_type
        if tensor.elem_type not in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16):
            continue
        axes = list(tensor.shape.dim) if tensor.HasField("shape") else []
        loose = [axis for axis in axes if not axis.HasField("dim_value") and axis.dim_param not in symbols]
        sizes = [int(axis.dim_value) if axis.HasField("dim_value") else 1 for axis in axes]
        elements = -1 if loose or not tensor.HasField("shape") else math.prod(sizes)
        found[name] = elements
    return found


def depth_of(model: Any) -> int:
    """The number of computing nodes on the longest path from an input to an output (layout and Q/DQ nodes not counted)."""
    depth: dict[str, int] = {}
    longest = 1
    for node in model.graph.node:
        here = max((depth.get(name, 0) for name in node.input), default=0) + (node.op_type not in _IDLE_OPS)
        depth.update(dict.fromkeys(node.output, here))
        longest = max(longest, here)
    return longest


def _tensor_spec(onnx: Any, item: Any, like: TensorSpec | None) -> TensorSpec:
    tensor = item.type.tensor_type
    if not item.type.HasField("tensor_type") or not tensor.HasField("shape"):
        raise ModelError(f"the tensor {item.name!r} has no shape", hint="export the model with shapes", subject=item.name)
    if tensor.elem_type == onnx.TensorProto.STRING:
        raise ModelError(f"the tensor {item.name!r} holds text", allowed="numbers", hint="keep strings and tokenizers outside the graph", subject=item.name)
    shape: list[int | str] = []
    for position, axis in enumerate(tensor.shape.dim):
        if axis.HasField("dim_value"):
            shape.append(int(axis.dim_value))
        else:
            shape.append(axis.dim_param or (BATCH if position == 0 else f"{item.name}_axis{position}"))
    return TensorSpec(
        name=item.name,
        dtype=str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name),
        shape=tuple(shape),
        layout=like.layout if like else "",
        value_range=like.value_range if like else None,
        normalization=like.normalization if like else "",
    )


def iospec_of(model: Any, like: IOSpec | None = None) -> IOSpec:
    """What the file takes and gives. Layout, range, binding and state, which the graph does not tell, come from `like` by name.

    Raises:
        ModelError: a tensor has no shape or holds text.
    """
    onnx = require_onnx("reading an ONNX model")
    weights = {item.name for item in model.graph.initializer}
    hints = {tensor.name: tensor for tensor in (*like.inputs, *like.outputs)} if like else {}
    inputs = tuple(_tensor_spec(onnx, item, hints.get(item.name)) for item in model.graph.input if item.name not in weights)
    outputs = tuple(_tensor_spec(onnx, item, hints.get(item.name)) for item in model.graph.output)
    state = like.state if like else ()
    return IOSpec(inputs=inputs, outputs=outputs, state=state, static_binding=dict(like.static_binding) if like else {})


def bind_axes(model: Any, binding: Mapping[str, int]) -> Any:
    """A copy of the model in which every axis named in `binding` has its size; inner shapes are inferred anew.

    A first axis without a name goes by `batch`.

    Raises:
        ModelError: a name in `binding` belongs to no input axis.
    """
    onnx = require_onnx("binding the axes of an ONNX model")
    bound = onnx.ModelProto()
    bound.CopyFrom(model)
    symbols: set[str] = set()
    for item in (*bound.graph.input, *bound.graph.output):
        for position, axis in enumerate(item.type.tensor_type.shape.dim):
            if axis.HasField("dim_value"):
                continue
            symbol = axis.dim_param or (BATCH if position == 0 else f"{item.name}_axis{position}")
            symbols.add(symbol)
            if symbol in binding:
                axis.dim_value = binding[symbol]
    unknown = sorted(set(binding) - symbols)
    if unknown:
        raise ModelError(f"the model has no dynamic axis {unknown[0]!r}", found=unknown[0], allowed=near_names(unknown[0], symbols), subject=unknown[0])
    del bound.graph.value_info[:]
    return onnx.shape_inference.infer_shapes(bound, data_prop=True)


def name_nodes(model: Any, preferred: Mapping[int, str] | None = None) -> None:
    """Give every node of the main graph a name of its own, in place; `preferred` maps positions to wished names."""
    taken: set[str] = set()
    for position, node in enumerate(model.graph.node):
        wish = (preferred or {}).get(position) or node.name or f"{node.op_type}_{position}"
        name, count = wish, 1
        while name in taken:
            count += 1
            name = f"{wish}_{count}"
        taken.add(name)
        node.name = name


def strip_notes(model: Any) -> None:
    """Remove documentation and metadata of the exporter (among them source paths of its user), in place."""
    holders = [
        model,
        model.graph,
        *model.graph.node,
        *model.graph.input,
        *model.graph.output,
        *model.graph.value_info,
        *model.graph.initializer,
        *model.functions,
    ]
    for holder in holders:
        if holder.HasField("doc_string"):
            holder.ClearField("doc_string")
        if hasattr(holder, "metadata_props"):
            del holder.metadata_props[:]


def write_model(model: Any, folder: Path, entry: str, *, limit: int = PROTO_LIMIT) -> tuple[str, ...]:
    """Write the model whole as `folder/entry`; the names of further files: none up to `limit` bytes, else one with the weights.

    Raises:
        StorageError: the disk is full or the folder is not writable.
    """
    onnx = require_onnx("writing an ONNX model")
    if model.ByteSize() <= limit:
        write_atomic(folder / entry, model.SerializeToString(deterministic=True))
        return ()
    data = f"{entry}.data"
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".onnx.", dir=folder) as name:
        work = Path(name)
        onnx.save_model(copy, str(work / entry), save_as_external_data=True, all_tensors_to_one_file=True, location=data, size_threshold=1024)
        os.replace(work / data, folder / data)
        os.replace(work / entry, folder / entry)
    return (data,)


def precision_of(model: Any) -> Precision:
    """The arithmetic of a file: int8 if it holds quantized operators, fp16 if most float weights are, else fp32."""
    onnx = require_onnx("reading an ONNX model")
    if any(node.op_type in _QUANTIZED for node in model.graph.node):
        return Precision.INT8
    elements: dict[int, int] = {}
    for weight in model.graph.initializer:
        size = 1
        for axis in weight.dims:
            size *= int(axis)
        elements[weight.data_type] = elements.get(weight.data_type, 0) + size
    half = elements.get(onnx.TensorProto.FLOAT16, 0)
    return Precision.FP16 if half > elements.get(onnx.TensorProto.FLOAT, 0) else Precision.FP32


def count_ops(model: Any, names: Iterable[str]) -> int:
    """How many nodes of the main graph are of one of the types `names`."""
    wanted = set(names)
    return sum(node.op_type in wanted for node in model.graph.node)


def first_line(error: BaseException) -> str:
    """The first line of a library's message, or the kind of the error."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def file_hash(path: Path) -> str:
    """What identifies an ONNX file: a SHA-256 over its bytes and over the files that hold its weights, if they lie outside.

    Raises:
        ModelError: the file is not ONNX, or a file with weights is missing.
    """
    onnx = require_onnx("identifying an ONNX model")
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load_model(str(path), load_external_data=False)
    except (DecodeError, ValueError, OSError) as error:
        raise ModelError(f"{path} is not a valid ONNX model", found=first_line(error), hint="export it again", subject=path) from error
    outside = sorted({entry.value for weight in model.graph.initializer for entry in weight.external_data if entry.key == "location"})
    digests = [sha256_file(path)]
    for name in outside:
        if not (path.parent / name).is_file():
            raise ModelError("a file with the model's weights is missing", found=name, hint=f"put it beside {path.name}", subject=path)
        digests.append(f"{name}:{sha256_file(path.parent / name)}")
    return digests[0] if len(digests) == 1 else sha256_bytes("\n".join(digests).encode())
