"""TFLite files as edgekd sees them, without TensorFlow: operators, tensors, names, notes, and files packed with aligned weights.

The flatbuffer classes come with ai-edge-litert and are imported when a function is called, so that the module itself costs nothing.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.errors import ConversionRejected, MissingDependency, ModelError
from edgekd.models.layout import MOVING, RENAMING
from edgekd.records import IOSpec, Precision, TensorSpec

_IDENTIFIER = b"TFL3"
_ALIGNMENT = 16
"""`force_align: 16` of `Buffer.data` in the TFLite schema; the generated Python packer ignores it."""

_SIZE_LIMIT = 2**31 - 2**20
"""Bytes above which a flatbuffer cannot be addressed."""

_IDLE_OPS = MOVING | RENAMING | {"QUANTIZE", "DEQUANTIZE"}
_READ_ERRORS = (struct.error, IndexError, ValueError, TypeError, AttributeError, UnicodeDecodeError, OverflowError)


@dataclass(frozen=True)
class TfliteTensor:
    """One tensor of the main graph. `scales` and `zero_points` are empty unless it is quantized; `axis` is that of its scales.

    `constant`: its values lie in the file.
    """

    index: int
    name: str
    dtype: str
    shape: tuple[int, ...]
    constant: bool
    scales: tuple[float, ...] = ()
    zero_points: tuple[int, ...] = ()
    axis: int = 0


@dataclass(frozen=True)
class TfliteOp:
    """One operator of the main graph, named after its first output; `inputs` and `outputs` are tensors, absent ones left out."""

    name: str
    kind: str
    inputs: tuple[TfliteTensor, ...]
    outputs: tuple[TfliteTensor, ...]


@dataclass(frozen=True)
class TfliteGraph:
    """The main graph in execution order. `inputs` and `outputs` map names (of the signature, else of the tensors) to tensors."""

    signature: str
    inputs: dict[str, TfliteTensor]
    outputs: dict[str, TfliteTensor]
    tensors: tuple[TfliteTensor, ...]
    ops: tuple[TfliteOp, ...]

    def activations(self) -> tuple[TfliteTensor, ...]:
        """Float tensors that are computed or fed and that an operator reads or writes, in the order of the file."""
        used = {tensor.index for op in self.ops for tensor in (*op.inputs, *op.outputs)}
        return tuple(tensor for tensor in self.tensors if tensor.index in used and not tensor.constant and tensor.dtype == "float32")


def require_schema(purpose: str) -> tuple[Any, Any]:
    """The modules with the flatbuffer classes of TFLite, and with the library's reader.

    Raises:
        MissingDependency: ai-edge-litert is not installed.
    """
    try:
        from ai_edge_litert import schema_py_generated as schema
        from ai_edge_litert.tools import flatbuffer_utils
    except ImportError as error:
        raise MissingDependency("ai-edge-litert", "litert", purpose=purpose) from error
    return schema, flatbuffer_utils


def load_model(path: Path) -> Any:
    """The `ModelT` object of a file.

    Raises:
        ModelError: the file is missing, cut off, or no TFLite model.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path} cannot be read", found=error.strerror, hint="check the path", subject=path) from error
    return parse_model(data, source=str(path))


def parse_model(data: bytes, *, source: str = "the data") -> Any:
    """The `ModelT` object in `data`, with the weights as arrays; edit it in place and `pack_model` it.

    Raises:
        ModelError: the data are cut off, or no TFLite model.
    """
    schema, reader = require_schema("reading a TFLite model")
    problem = "no TFLite file identifier"
    if data[4:8] == _IDENTIFIER:
        try:
            root = schema.Model.GetRootAs(data)
            ends = [root.Buffers(index).Offset() + root.Buffers(index).Size() for index in range(root.BuffersLength())]
            model = reader.read_model_from_bytearray(data)
            if max(ends, default=0) <= len(data) and model.subgraphs:
                for buffer in model.buffers:
                    buffer.data = None if buffer.data is None else np.frombuffer(_bytes(buffer.data), dtype=np.uint8)
                return model
            problem = "no graph" if not model.subgraphs else "weights end behind the end of the file"
        except _READ_ERRORS as error:
            problem = f"{type(error).__name__}: {error}"
    raise ModelError(f"{source} is not a whole TFLite model", found=problem, hint="convert it again", subject=source)


def pack_model(model: Any) -> bytes:
    """The bytes of a file, weights aligned to 16 bytes; the same model gives the same bytes.

    Raises:
        ConversionRejected: the model is larger than a flatbuffer can be (2 GiB).
    """
    schema, reader = require_schema("writing a TFLite model")
    size = sum(len(buffer.data) for buffer in model.buffers if buffer.data is not None)
    if size > _SIZE_LIMIT:
        raise ConversionRejected("the model does not fit in one TFLite file", found=f"{size} bytes", allowed=f"{_SIZE_LIMIT} bytes", hint="use a smaller model")

    class Aligned(schema.BufferT):  # type: ignore[misc,name-defined]
        """A buffer whose data start at a multiple of 16 bytes."""

        def Pack(self, builder: Any) -> Any:
            """The offset of the packed buffer."""
            data = None
            if self.data is not None:
                raw = _bytes(self.data)
                builder.StartVector(1, len(raw), _ALIGNMENT)
                builder.head = int(builder.head) - len(raw)
                builder.Bytes[builder.head : builder.head + len(raw)] = raw
                data = builder.EndVector()
            schema.BufferStart(builder)
            if data is not None:
                schema.BufferAddData(builder, data)
            return schema.BufferEnd(builder)

    kept = model.buffers
    model.buffers = [Aligned(data=buffer.data) for buffer in kept]
    try:
        return bytes(reader.convert_object_to_bytearray(model))
    finally:
        model.buffers = kept


def read_graph(model: Any) -> TfliteGraph:
    """The main graph: that of the first signature, or the first graph of a file without signatures.

    Raises:
        ModelError: two inputs or two outputs have one name.
    """
    schema, reader = require_schema("reading a TFLite model")
    signature = model.signatureDefs[0] if model.signatureDefs else None
    graph = model.subgraphs[signature.subgraphIndex if signature else 0]
    types = {value: name.lower() for name, value in vars(schema.TensorType).items() if isinstance(value, int)}
    filled = {index for index, buffer in enumerate(model.buffers) if buffer.data is not None and len(buffer.data)}
    tensors = tuple(_tensor(index, tensor, types, filled) for index, tensor in enumerate(graph.tensors))
    ops = []
    for position, op in enumerate(graph.operators):
        inputs = tuple(tensors[index] for index in _ints(op.inputs) if index >= 0)
        outputs = tuple(tensors[index] for index in _ints(op.outputs) if index >= 0)
        kind = _kind(model, op, reader)
        ops.append(TfliteOp(outputs[0].name if outputs else f"{kind}_{position}", kind, inputs, outputs))
    if signature:
        pairs = [[(_text(item.name), tensors[item.tensorIndex]) for item in items or []] for items in (signature.inputs, signature.outputs)]
        order = [list(_ints(graph.inputs)), list(_ints(graph.outputs))]
        pairs = [sorted(items, key=lambda pair, at=at: at.index(pair[1].index)) for items, at in zip(pairs, order, strict=True)]  # type: ignore[misc]
    else:
        pairs = [[(tensors[index].name, tensors[index]) for index in _ints(indices)] for indices in (graph.inputs, graph.outputs)]
    for kind, items in zip(("inputs", "outputs"), pairs, strict=True):
        if len(dict(items)) != len(items):
            raise ModelError(f"two {kind} of the model have one name", found=[name for name, _ in items], hint="convert it again with a signature")
    return TfliteGraph(_text(signature.signatureKey) if signature else "", dict(pairs[0]), dict(pairs[1]), tensors, tuple(ops))


def _tensor(index: int, tensor: Any, types: Mapping[int, str], filled: set[int]) -> TfliteTensor:
    found = tensor.quantization
    scales = tuple(float(value) for value in (found.scale if found is not None and found.scale is not None else ()))
    zeros = tuple(int(value) for value in (found.zeroPoint if found is not None and found.zeroPoint is not None else ()))
    fixed = _ints(tensor.shape)
    open_axes = _ints(tensor.shapeSignature) or fixed
    shape = tuple(-1 if asked < 0 else size for size, asked in zip(fixed, open_axes, strict=True))
    axis = int(found.quantizedDimension) if found is not None else 0
    return TfliteTensor(index, _text(tensor.name), types[tensor.type], shape, tensor.buffer in filled, scales, zeros, axis)


def _kind(model: Any, op: Any, reader: Any) -> str:
    code = model.operatorCodes[op.opcodeIndex]
    if code.customCode:
        return f"CUSTOM {_text(code.customCode)}"
    return str(reader.opcode_to_name(model, op.opcodeIndex))


def op_counts(model: Any) -> dict[str, int]:
    """How often each operator stands in the file, by name, over all its graphs."""
    _, reader = require_schema("reading a TFLite model")
    counts = Counter(_kind(model, op, reader) for graph in model.subgraphs for op in graph.operators)
    return dict(sorted(counts.items()))


def named_ops(model: Any) -> tuple[tuple[str, str], ...]:
    """Name and kind of every operator, over all graphs of the file; an operator is called by its first output."""
    _, reader = require_schema("reading a TFLite model")
    found = []
    for graph in model.subgraphs:
        for op in graph.operators:
            outputs = [index for index in _ints(op.outputs) if index >= 0]
            found.append((_text(graph.tensors[outputs[0]].name) if outputs else "", _kind(model, op, reader)))
    return tuple(found)


def depth_of(graph: TfliteGraph) -> int:
    """Computing operators on the longest path from an input to an output."""
    depth: dict[int, int] = {}
    for op in graph.ops:
        reached = max((depth.get(tensor.index, 0) for tensor in op.inputs), default=0) + (op.kind not in _IDLE_OPS)
        depth.update({tensor.index: reached for tensor in op.outputs})
    return max(depth.values(), default=0)


def precision_of(graph: TfliteGraph) -> Precision:
    """The arithmetic of a file: int8 if an operator reads int8 values, fp16 if most float weights are, else fp32."""
    read = {tensor.index: tensor for op in graph.ops if op.kind not in ("QUANTIZE", "DEQUANTIZE") for tensor in op.inputs}
    if any(tensor.dtype in ("int8", "uint8") and tensor.scales for tensor in read.values()):
        return Precision.INT8
    sizes: Counter[str] = Counter()
    for tensor in graph.tensors:
        if tensor.constant:
            sizes[tensor.dtype] += math.prod(tensor.shape)
    return Precision.FP16 if sizes["float16"] > sizes["float32"] else Precision.FP32


def unique_tensor_names(model: Any) -> int:
    """Give every tensor of every graph a name of its own, in place; how many were changed. Inputs and outputs come first."""
    taken: set[str] = set()
    changed = 0
    for position, graph in enumerate(model.subgraphs):
        borders = dict.fromkeys((*_ints(graph.inputs), *_ints(graph.outputs)))
        for index in (*borders, *(other for other in range(len(graph.tensors)) if other not in borders)):
            tensor = graph.tensors[index]
            wish = _text(tensor.name) or f"tensor_{position}_{index}"
            name = unique(wish, taken)
            if name != _text(tensor.name):
                tensor.name = name.encode()
                changed += 1
    return changed


def ensure_signature(model: Any) -> int:
    """Give a file without a signature one, in place, with the names of its tensors; how many were added (0 or 1).

    Raises:
        ModelError: two inputs or two outputs have one name.
    """
    if model.signatureDefs:
        return 0
    schema, _ = require_schema("naming the tensors of a TFLite model")
    found = read_graph(model)
    pairs = [[schema.TensorMapT(name=name.encode(), tensorIndex=tensor.index) for name, tensor in items.items()] for items in (found.inputs, found.outputs)]
    model.signatureDefs = [schema.SignatureDefT(inputs=pairs[0], outputs=pairs[1], signatureKey=b"serving_default", subgraphIndex=0)]
    return 1


def unique(wish: str, taken: set[str]) -> str:
    """`wish`, or `wish_2`, `wish_3`, ... where it is taken; the answer is taken from now on."""
    name, count = wish, 1
    while name in taken:
        count += 1
        name = f"{wish}_{count}"
    taken.add(name)
    return name


def iospec_of(graph: TfliteGraph, like: IOSpec | None = None) -> IOSpec:
    """What the file takes and gives. Names, types and sizes come from the file; order, layout, value range and normalization from `like`."""
    hints = {tensor.name: tensor for tensor in (*like.inputs, *like.outputs)} if like else {}

    def spec(name: str, tensor: TfliteTensor) -> TensorSpec:
        hint = hints.get(name)
        shape = tuple(("batch" if at == 0 else f"{name}_axis{at}") if size < 0 else size for at, size in enumerate(tensor.shape))
        return TensorSpec(
            name=name,
            dtype=tensor.dtype,
            shape=shape,
            layout=hint.layout if hint else "",
            value_range=hint.value_range if hint else None,
            normalization=hint.normalization if hint else "",
        )

    def ordered(found: Mapping[str, TfliteTensor], wanted: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        first = [tensor.name for tensor in wanted if tensor.name in found]
        return tuple(spec(name, found[name]) for name in dict.fromkeys((*first, *found)))

    return IOSpec(
        inputs=ordered(graph.inputs, like.inputs if like else ()),
        outputs=ordered(graph.outputs, like.outputs if like else ()),
        state=like.state if like else (),
        static_binding=dict(like.static_binding) if like else {},
    )


def read_metadata(model: Any) -> dict[str, bytes]:
    """The metadata entries of a file by name."""
    return {_text(item.name): _bytes(model.buffers[item.buffer].data) for item in model.metadata or []}


def set_metadata(model: Any, entries: Mapping[str, bytes]) -> None:
    """Write metadata entries into the model, in place; an entry of the same name is replaced."""
    schema, _ = require_schema("writing TFLite metadata")
    found = {_text(item.name): item for item in model.metadata or []}
    model.metadata = list(model.metadata or [])
    for name, data in sorted(entries.items()):
        buffer = schema.BufferT(data=np.frombuffer(data, dtype=np.uint8))
        if name in found and found[name].buffer:
            model.buffers[found[name].buffer] = buffer
            continue
        if name not in found:
            found[name] = schema.MetadataT(name=name.encode())
            model.metadata.append(found[name])
        model.buffers.append(buffer)
        found[name].buffer = len(model.buffers) - 1


def _ints(values: Any) -> tuple[int, ...]:
    return tuple(int(value) for value in values) if values is not None else ()


def _text(value: bytes | str | None) -> str:
    return value.decode() if isinstance(value, bytes) else value or ""


def _bytes(values: Any) -> bytes:
    if isinstance(values, (bytes, bytearray, memoryview)):
        return bytes(values)
    return b"" if values is None else np.asarray(values, dtype=np.uint8).tobytes()
