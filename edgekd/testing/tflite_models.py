"""Small TFLite files put together by hand, so that runtimes for TFLite are tested without torch, TensorFlow or a converter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.artifact import StoredArtifact, store_artifact
from edgekd.contracts import Array
from edgekd.errors import MissingDependency
from edgekd.records import Format, IOSpec, Precision, TensorSpec
from edgekd.testing.models import remembering_iospec, remembering_weight, two_headed_weights

SIGNATURE = "serving_default"
"""The key of the one signature in these files."""


@dataclass(frozen=True)
class HandTensor:
    """A tensor of a hand-made file. A shape whose first axis is a name is open there and 1 in the file; `data` make it a constant.

    With `scales` it is quantized: one for all values, or one for each index along `axis`; the zero point is 0.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str = "float32"
    data: Array | None = None
    scales: tuple[float, ...] = ()
    axis: int = 0


@dataclass(frozen=True)
class HandOp:
    """An operator by its name in the TFLite schema, with its options by their names there; tensors by name."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    version: int = 1


_OPTIONS = {
    "FULLY_CONNECTED": "FullyConnectedOptions",
    "CONV_2D": "Conv2DOptions",
    "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions",
    "ADD": "AddOptions",
    "SUM": "ReducerOptions",
    "RESHAPE": "ReshapeOptions",
}


def hand_made(tensors: Sequence[HandTensor], ops: Sequence[HandOp], inputs: Sequence[str], outputs: Sequence[str], *, signature: bool = True) -> bytes:
    """The bytes of a TFLite file with one graph, and a signature whose names are those of the tensors.

    Raises:
        MissingDependency: ai-edge-litert, which brings the classes of the file format, is not installed.
    """
    try:
        from ai_edge_litert import schema_py_generated as schema
        from ai_edge_litert.tools import flatbuffer_utils
    except ImportError as error:
        raise MissingDependency("ai-edge-litert", "litert", purpose="making a TFLite file") from error

    index = {tensor.name: position for position, tensor in enumerate(tensors)}
    model, graph = schema.ModelT(), schema.SubGraphT()
    model.version, model.description, model.buffers = 3, b"made by hand", [schema.BufferT()]
    graph.name, graph.tensors, graph.operators, model.operatorCodes = b"main", [], [], []
    for tensor in tensors:
        made = schema.TensorT()
        made.name, made.type, made.buffer = tensor.name.encode(), getattr(schema.TensorType, tensor.dtype.upper()), 0
        made.shape = [1 if isinstance(axis, str) else axis for axis in tensor.shape]
        if any(isinstance(axis, str) for axis in tensor.shape):
            made.shapeSignature = [-1 if isinstance(axis, str) else axis for axis in tensor.shape]
        if tensor.data is not None:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(tensor.data, dtype=tensor.dtype).tobytes(), dtype=np.uint8)
            made.buffer = len(model.buffers)
            model.buffers.append(buffer)
        if tensor.scales:
            made.quantization = schema.QuantizationParametersT()
            made.quantization.scale, made.quantization.zeroPoint = list(tensor.scales), [0] * len(tensor.scales)
            made.quantization.quantizedDimension = tensor.axis
        graph.tensors.append(made)
    for op in ops:
        code, made = schema.OperatorCodeT(), schema.OperatorT()
        code.builtinCode = getattr(schema.BuiltinOperator, op.kind)
        code.deprecatedBuiltinCode, code.version = min(code.builtinCode, 127), op.version
        made.opcodeIndex, made.inputs, made.outputs = len(model.operatorCodes), [index[name] for name in op.inputs], [index[name] for name in op.outputs]
        if op.kind in _OPTIONS:
            made.builtinOptionsType = getattr(schema.BuiltinOptions, _OPTIONS[op.kind])
            made.builtinOptions = getattr(schema, f"{_OPTIONS[op.kind]}T")()
            for name, value in op.options.items():
                setattr(made.builtinOptions, name, value)
        model.operatorCodes.append(code)
        graph.operators.append(made)
    graph.inputs, graph.outputs, model.subgraphs = [index[name] for name in inputs], [index[name] for name in outputs], [graph]
    if signature:
        model.signatureDefs = [schema.SignatureDefT()]
        model.signatureDefs[0].signatureKey, model.signatureDefs[0].subgraphIndex = SIGNATURE.encode(), 0
        for kind, names in (("inputs", inputs), ("outputs", outputs)):
            entries = []
            for name in names:
                entry = schema.TensorMapT()
                entry.name, entry.tensorIndex = name.encode(), index[name]
                entries.append(entry)
            setattr(model.signatureDefs[0], kind, entries)
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def store_hand_made(folder: Path, data: bytes, iospec: IOSpec, *, precision: Precision = Precision.FP32) -> StoredArtifact:
    """The artifact `model.tflite` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.tflite").write_bytes(data)
    return store_artifact(folder, "model.tflite", format=Format.TFLITE, precision=precision, iospec=iospec)


def two_headed_tflite(folder: Path, batch: int | str = "batch", *, signature: bool = True) -> StoredArtifact:
    """The model of `two_headed` as a TFLite file in `folder`, with the same names, weights and IOSpec. Needs ai-edge-litert.

    A file without a signature has the same names, of its tensors.
    """
    weight_a, weight_b = two_headed_weights()
    tensors = [
        HandTensor("a", (batch, 4)),
        HandTensor("b", (batch, 2)),
        HandTensor("weight_a", (3, 4), data=weight_a.T),
        HandTensor("weight_b", (3, 2), data=weight_b.T),
        HandTensor("axes", (1,), "int32", data=np.array([1])),
        *(HandTensor(name, (batch, 3)) for name in ("from_a", "from_b", "mixed", "heads.gate")),
        HandTensor("heads.total", (batch,)),
    ]
    ops = [
        HandOp("FULLY_CONNECTED", ("a", "weight_a"), ("from_a",)),
        HandOp("FULLY_CONNECTED", ("b", "weight_b"), ("from_b",)),
        HandOp("ADD", ("from_a", "from_b"), ("mixed",)),
        HandOp("RELU", ("mixed",), ("heads.gate",)),
        HandOp("SUM", ("mixed", "axes"), ("heads.total",), {"keepDims": False}),
    ]

    def tensor(name: str, *rest: int) -> TensorSpec:
        return TensorSpec(name=name, dtype="float32", shape=(batch, *rest))

    data = hand_made(tensors, ops, ("a", "b"), ("heads.gate", "heads.total"), signature=signature)
    return store_hand_made(folder, data, IOSpec(inputs=(tensor("a", 4), tensor("b", 2)), outputs=(tensor("heads.total"), tensor("heads.gate", 3))))


def remembering_tflite(folder: Path, batch: int | str = "batch") -> StoredArtifact:
    """The model of `remembering` as a TFLite file in `folder`, with the same names, weight and IOSpec. Needs ai-edge-litert."""
    tensors = [HandTensor(name, (batch, 3)) for name in ("x", "memory", "total", "memory.next")]
    tensors.append(HandTensor("fading", (3, 3), data=remembering_weight().T))
    ops = [HandOp("ADD", ("x", "memory"), ("total",)), HandOp("FULLY_CONNECTED", ("total", "fading"), ("memory.next",))]
    return store_hand_made(folder, hand_made(tensors, ops, ("x", "memory"), ("total", "memory.next")), remembering_iospec(batch))
