"""The made-up latency of the null runtime: a formula over the graph's operators, shapes and types, never over weights.

All constants are invented, so that a small net takes 0.05 to 50 ms and behaves like a real CPU in three ways that matter to a
search: channels come in steps (a width just above a step is slower than the next full one), int8 is cheaper for each
multiply-accumulate but costs more for each operator, and every operator costs something however small it is.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekd.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path

FORMULA_VERSION = "2"
"""Raised by hand whenever the formula or its noise changes: it is the runtime version in the fingerprint."""

BASE_NS = 20_000.0
NODE_NS = 3_000.0
INT8_NODE_NS = 7_000.0
MAC_NS = {"fp32": 0.4, "int8": 0.12}
ELEMENT_NS = {"fp32": 0.5, "int8": 0.3}
QUANTIZE_ELEMENT_NS = 0.5
CHANNEL_STEPS = {"fp32": 8, "int8": 16}
TAIL = 0.2
"""Share by which a channel count that is no multiple of the step is slower than the next multiple."""

_FREE = frozenset({"Constant", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Shape", "Cast", "Dropout"})
_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_INTEGER_OPS = frozenset({"QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "QLinearAdd", "QLinearGlobalAveragePool"})
_BATCH = 1

Shape = tuple[int, ...]


@dataclass(frozen=True)
class NodeCost:
    """What one operator is said to take, in nanoseconds."""

    name: str
    op_type: str
    time_ns: float


@dataclass(frozen=True)
class GraphCost:
    """What a graph is said to take. `structure` is a hash over operators, shapes and types; `total_ns` includes the base."""

    nodes: tuple[NodeCost, ...]
    structure: str
    parameters: int
    activation_bytes: int

    @property
    def total_ns(self) -> float:
        return BASE_NS + sum(node.time_ns for node in self.nodes)


def graph_cost(path: Path, binding: Mapping[str, int]) -> GraphCost:
    """The made-up cost of the ONNX file at `path`, with named axes bound by `binding` and every other unknown axis taken as 1.

    Raises:
        ModelError: the file is no ONNX graph, or its shapes contradict each other.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(str(path), load_external_data=False)
        for value in model.graph.input:
            for axis in value.type.tensor_type.shape.dim:
                if not axis.HasField("dim_value"):
                    axis.dim_value = binding.get(axis.dim_param, _BATCH)
        del model.graph.value_info[:]
        for value in model.graph.output:
            value.type.tensor_type.ClearField("shape")
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except (DecodeError, onnx.shape_inference.InferenceError) as error:
        raise ModelError(f"{path.name} cannot be read as an ONNX graph", found=str(error).splitlines()[0], hint="export it again", subject=str(path)) from error
    return _Walk(model.graph).cost()


class _Walk:
    """One pass over a graph with known shapes."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.constants = {item.name: tuple(item.dims) for item in graph.initializer}
        self.shapes: dict[str, Shape] = dict(self.constants)
        for value in (*graph.input, *graph.value_info, *graph.output):
            dims = value.type.tensor_type.shape.dim
            self.shapes.setdefault(value.name, tuple(axis.dim_value if axis.HasField("dim_value") else 1 for axis in dims))
        self.producers = {name: node for node in graph.node for name in node.output}

    def cost(self) -> GraphCost:
        nodes = tuple(
            NodeCost(node.name or f"{node.op_type}_{index}", node.op_type, self._node(node))
            for index, node in enumerate(self.graph.node)
            if not self._folded(node)
        )
        digest = hashlib.sha256()
        for node in self.graph.node:
            shapes = [self._shape(name) for name in (*node.input, *node.output) if name]
            digest.update(repr((node.op_type, shapes, self._precision(node), _attributes(node))).encode())
        live = max((_elements(self._shape(name)) for node in self.graph.node for name in node.output), default=0)
        return GraphCost(nodes, digest.hexdigest(), sum(_elements(dims) for dims in self.constants.values()), 4 * live)

    def _shape(self, name: str) -> Shape:
        return self.shapes.get(name, ())

    def _constant(self, name: str) -> bool:
        """Whether a tensor is known before the first inference: an initializer, or computed from such alone."""
        producer = self.producers.get(name)
        if producer is None:
            return name in self.constants
        return producer.op_type == "Constant" or (producer.op_type in ("DequantizeLinear", "Identity", "Cast") and self._constant(producer.input[0]))

    def _folded(self, node: Any) -> bool:
        return node.op_type == "Constant" or all(self._constant(name) for name in node.output)

    def _precision(self, node: Any) -> str:
        """`int8` if every operand that carries data was dequantized just before."""
        if node.op_type in _INTEGER_OPS:
            return "int8"
        first = [self.producers.get(name) for name in node.input[:2] if name]
        quantized = [item is not None and item.op_type == "DequantizeLinear" for item in first]
        return "int8" if quantized and all(quantized) else "fp32"

    def _node(self, node: Any) -> float:
        out = self._shape(node.output[0])
        if node.op_type in _FREE:
            return 0.0
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            return QUANTIZE_ELEMENT_NS * _elements(out)
        precision = self._precision(node)
        macs = self._macs(node, out, CHANNEL_STEPS[precision])
        fixed = INT8_NODE_NS if precision == "int8" else NODE_NS
        return fixed + (MAC_NS[precision] * macs if macs else ELEMENT_NS[precision] * _elements(out))

    def _macs(self, node: Any, out: Shape, step: int) -> float:
        """Multiply-accumulates with the channels rounded up to the step; 0 for an operator that only moves or maps elements."""
        rules: dict[str, Callable[[Any, Shape, int], float]] = {
            "Conv": self._conv,
            "ConvInteger": self._conv,
            "QLinearConv": self._conv,
            "ConvTranspose": self._conv_transpose,
            "Gemm": self._matmul,
            "MatMul": self._matmul,
            "MatMulInteger": self._matmul,
            "QLinearMatMul": self._matmul,
            "LSTM": self._recurrent,
            "GRU": self._recurrent,
            "RNN": self._recurrent,
        }
        rule = rules.get(node.op_type)
        return rule(node, out, step) if rule else 0.0

    def _conv(self, node: Any, out: Shape, step: int) -> float:
        weight = self._shape(node.input[3 if node.op_type == "QLinearConv" else 1])
        if len(weight) < 2 or len(out) < 2:
            return float(_elements(out))
        places = _elements(out) / max(out[1], 1) * math.prod(weight[2:])
        depthwise = weight[1] == 1 and weight[0] > 1
        return places * _full(weight[0], step) * (1.0 if depthwise else _full(weight[1], step))

    def _conv_transpose(self, node: Any, out: Shape, step: int) -> float:
        data, weight = self._shape(node.input[0]), self._shape(node.input[1])
        if len(weight) < 2 or len(data) < 2:
            return float(_elements(out))
        return _elements(data) / max(data[1], 1) * math.prod(weight[2:]) * _full(weight[0], step) * _full(weight[1], step)

    def _matmul(self, node: Any, out: Shape, step: int) -> float:
        left = self._shape(node.input[0])
        if not left or not out:
            return float(_elements(out))
        inner = left[-2] if node.op_type == "Gemm" and _flag(node, "transA") else left[-1]
        return _elements(out) / max(out[-1], 1) * _full(out[-1], step) * _full(inner, step)

    def _recurrent(self, node: Any, out: Shape, step: int) -> float:
        data, hidden = self._shape(node.input[0]), self._shape(node.input[2])
        if len(data) < 3 or len(hidden) < 3:
            return float(_elements(out))
        width = _full(hidden[2], step)
        return data[0] * data[1] * hidden[0] * _GATES[node.op_type] * width * (_full(data[2], step) + width)


def _full(channels: int, step: int) -> float:
    """The channels that are paid for: the next multiple of the step, and a tail penalty where the count is none."""
    rounded = math.ceil(channels / step) * step
    return rounded * (1.0 if channels == rounded else 1.0 + TAIL)


def _elements(shape: Shape) -> int:
    return math.prod(shape)


def _flag(node: Any, name: str) -> bool:
    return any(item.name == name and item.i for item in node.attribute)


def _attributes(node: Any) -> list[tuple[str, int, list[int]]]:
    """Integer attributes, sorted: strides, pads, groups, axes."""
    return sorted((item.name, item.i, list(item.ints)) for item in node.attribute if item.type in (2, 7))
