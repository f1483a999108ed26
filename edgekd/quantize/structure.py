"""What kind of network a file holds, read off its graph: which int8 is fast on a target depends on it as much as on the processor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from edgekd.artifact import StoredArtifact
from edgekd.errors import ModelError
from edgekd.records import Format


class Kind(str, Enum):
    """The kinds of networks that proposals tell apart. `mixed`: attention or recurrence together with convolutions, or with each other."""

    TRANSFORMER = "transformer-like"
    DEPTHWISE = "depthwise"
    RECURRENT = "recurrent"
    CONVOLUTIONAL = "convolutional"
    MIXED = "mixed"
    DENSE = "dense"
    OTHER = "other"


@dataclass(frozen=True)
class Structure:
    """Counts of a graph. `attentions`: a softmax between two products of computed tensors. `recurrent`: recurrent operators, or weights that
    one unrolled step after the other reads. `convolutions` are those over more than one pixel, `pointwise` the others; `dense` have constant weights.

    `ops` are the kinds of operators in the graph, by the names of the file's format.
    """

    attentions: int = 0
    depthwise: int = 0
    recurrent: int = 0
    convolutions: int = 0
    pointwise: int = 0
    dense: int = 0
    ops: frozenset[str] = frozenset()

    @property
    def kind(self) -> Kind:
        """The kind of network; a single convolution in front of attention or recurrence (patches, an embedding) does not make it mixed."""
        images = self.depthwise > 0 or self.convolutions > 1
        sequences = (self.attentions > 0) + (self.recurrent > 0)
        if sequences > 1 or (sequences and images):
            return Kind.MIXED
        if self.attentions:
            return Kind.TRANSFORMER
        if self.recurrent:
            return Kind.RECURRENT
        if self.depthwise:
            return Kind.DEPTHWISE
        if self.convolutions or self.pointwise:
            return Kind.CONVOLUTIONAL
        return Kind.DENSE if self.dense else Kind.OTHER

    def text(self) -> str:
        """The kind with what it was told by: `depthwise (4 depthwise, 6 pointwise, 1 dense)`."""
        names = ("attentions", "recurrent", "depthwise", "convolutions", "pointwise", "dense")
        counted = ", ".join(f"{getattr(self, name)} {name}" for name in names if getattr(self, name))
        return f"{self.kind.value} ({counted or 'no operator with weights'})"


_UNROLLED = 3
"""Readers of one weight from which on a dense operator counts as a step of an unrolled recurrence, if the graph has a tanh."""


@dataclass(frozen=True)
class Op:
    """One operator in the words of this module; `inputs` are computed tensors, `weights` constants."""

    role: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[str, ...] = ()


_ONNX_RECURRENT = frozenset({"LSTM", "GRU", "RNN", "Scan", "Loop"})
_ONNX_BETWEEN = frozenset({
    "Add", "Cast", "Clip", "Div", "Dropout", "Expand", "Identity", "IsNaN", "Mul", "Reshape", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where",
})  # fmt: skip
_TFLITE_RECURRENT = frozenset({
    "BIDIRECTIONAL_SEQUENCE_LSTM", "BIDIRECTIONAL_SEQUENCE_RNN", "LSTM", "RNN", "UNIDIRECTIONAL_SEQUENCE_LSTM", "UNIDIRECTIONAL_SEQUENCE_RNN", "WHILE",
})  # fmt: skip
_TFLITE_BETWEEN = frozenset({
    "ADD", "CAST", "DIV", "EXPAND_DIMS", "MUL", "RESHAPE", "SELECT", "SELECT_V2", "SQUEEZE", "SUB", "TRANSPOSE",
})  # fmt: skip


def structure_of(artifact: StoredArtifact) -> Structure:
    """The structure of a float ONNX or TFLite file.

    Raises:
        ModelError: the file cannot be read, or has another format.
        MissingDependency: onnx, or ai-edge-litert, is not installed.
    """
    if artifact.record.format is Format.ONNX:
        ops, kinds = _onnx_ops(artifact)
    elif artifact.record.format is Format.TFLITE:
        ops, kinds = _tflite_ops(artifact)
    else:
        raise ModelError("the structure of this format cannot be read", found=artifact.record.format.value, allowed="onnx, tflite")
    told = artifact.record.metadata.get("recurrent_steps", "0")
    unrolled = int(told) if told.isdigit() else 0
    return counted(ops, kinds, unrolled)


def counted(ops: Sequence[Op], kinds: frozenset[str], unrolled: int) -> Structure:
    """The structure of a graph of these operators; `unrolled`: so many of its parts are known to be recurrent, though their steps are unrolled."""
    counts: dict[str, int] = {}
    readers: dict[str, int] = {}
    for op in ops:
        counts[op.role] = counts.get(op.role, 0) + 1
        if op.role == "dense":
            for weight in op.weights:
                readers[weight] = readers.get(weight, 0) + 1
    shared = sum(count >= _UNROLLED for count in readers.values()) if "tanh" in counts else 0
    recurrent = counts.get("recurrent", 0) + max(shared, int(unrolled > 0))
    names = ("depthwise", "convolutions", "pointwise", "dense")
    return Structure(attentions=_attentions(ops), recurrent=recurrent, ops=kinds, **{name: counts.get(name, 0) for name in names})


def _attentions(ops: Sequence[Op]) -> int:
    """Attention operators, and softmaxes whose input comes from a product of computed tensors and whose output goes to one."""
    makers = {name: op for op in ops for name in op.outputs}
    readers: dict[str, list[Op]] = {}
    for op in ops:
        for name in op.inputs:
            readers.setdefault(name, []).append(op)

    def before(op: Op) -> Iterable[Op]:
        return (makers[name] for name in op.inputs if name in makers)

    def behind(op: Op) -> Iterable[Op]:
        return (reader for name in op.outputs for reader in readers.get(name, []))

    def reaches(start: Op, backwards: bool) -> bool:
        waiting, seen = list(before(start) if backwards else behind(start)), set()
        while waiting:
            op = waiting.pop()
            if op.role == "product":
                return True
            if op.role == "between" and id(op) not in seen:
                seen.add(id(op))
                waiting.extend(before(op) if backwards else behind(op))
        return False

    softmaxes = [op for op in ops if op.role == "softmax"]
    return sum(op.role == "attention" for op in ops) + sum(reaches(op, True) and reaches(op, False) for op in softmaxes)


def _onnx_ops(artifact: StoredArtifact) -> tuple[list[Op], frozenset[str]]:
    from edgekd.models.onnx_file import load_model

    graph = load_model(artifact.entry).graph
    shapes: dict[str, tuple[int, ...]] = {item.name: tuple(item.dims) for item in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            shapes |= {name: tuple(item.t.dims) for name in node.output for item in node.attribute if item.HasField("t")}
    ops = []
    for node in graph.node:
        inputs = tuple(name for name in node.input if name and name not in shapes)
        weights = tuple(name for name in node.input if name in shapes)
        groups = next((item.i for item in node.attribute if item.name == "group"), 1)
        kernel = shapes.get(node.input[1], ()) if len(node.input) > 1 else ()
        ops.append(Op(_onnx_role(node.op_type, len(inputs), kernel, groups), inputs, tuple(node.output), weights))
    return ops, frozenset(node.op_type for node in graph.node)


def _onnx_role(kind: str, computed: int, kernel: tuple[int, ...], groups: int) -> str:
    if kind in ("Conv", "ConvTranspose"):
        if groups > 1 and len(kernel) > 1 and kernel[1] == 1:
            return "depthwise"
        return "convolutions" if any(size > 1 for size in kernel[2:]) else "pointwise"
    if kind in ("MatMul", "Gemm", "Einsum"):
        return "product" if computed > 1 else "dense"
    roles: Mapping[str, str] = {"Softmax": "softmax", "Attention": "attention", "MultiHeadAttention": "attention", "Tanh": "tanh"}
    return roles.get(kind, "recurrent" if kind in _ONNX_RECURRENT else "between" if kind in _ONNX_BETWEEN else "other")


def _tflite_ops(artifact: StoredArtifact) -> tuple[list[Op], frozenset[str]]:
    from edgekd.models.tflite_file import load_model, read_graph

    graph = read_graph(load_model(artifact.entry))
    ops = []
    for op in graph.ops:
        inputs = tuple(tensor.name for tensor in op.inputs if not tensor.constant)
        weights = tuple(tensor.name for tensor in op.inputs if tensor.constant)
        kernel = op.inputs[1].shape if len(op.inputs) > 1 else ()
        ops.append(Op(_tflite_role(op.kind, len(inputs), kernel), inputs, tuple(tensor.name for tensor in op.outputs), weights))
    return ops, frozenset(op.kind for op in graph.ops)


def _tflite_role(kind: str, computed: int, kernel: tuple[int, ...]) -> str:
    if kind == "CONV_2D":
        return "convolutions" if any(size > 1 for size in kernel[1:3]) else "pointwise"
    if kind in ("BATCH_MATMUL", "FULLY_CONNECTED"):
        return "product" if computed > 1 else "dense"
    roles: Mapping[str, str] = {
        "DEPTHWISE_CONV_2D": "depthwise",
        "CONV_3D": "convolutions",
        "TRANSPOSE_CONV": "convolutions",
        "SOFTMAX": "softmax",
        "TANH": "tanh",
    }
    return roles.get(kind, "recurrent" if kind in _TFLITE_RECURRENT else "between" if kind in _TFLITE_BETWEEN else "other")
