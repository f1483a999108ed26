"""Which nodes of an ONNX graph stay in float32 when the rest becomes float16: by operator, by what their constants hold, by the ranges seen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgekd.contracts import Array
from edgekd.errors import ConversionRejected
from edgekd.models.onnx_file import require_onnx

FP16_MAX = float(np.finfo(np.float16).max)
"""The largest float16, 65504."""

FP16_NORMAL = float(np.finfo(np.float16).tiny)
"""The smallest float16 with full precision, 2^-14 = 6.1e-5."""

FP16_ZERO = 2.0**-25
"""Magnitudes up to here become zero (half of the smallest float16, ties to even)."""

RULES: Mapping[str, str] = {
    **dict.fromkeys(
        ("LayerNormalization", "InstanceNormalization", "GroupNormalization", "RMSNormalization", "LpNormalization", "MeanVarianceNormalization"),
        "sums squares",
    ),
    **dict.fromkeys(("ReduceSumSquare", "ReduceL2"), "sums squares"),
    **dict.fromkeys(("Softmax", "LogSoftmax", "ReduceLogSumExp"), "sums exponentials"),
    **dict.fromkeys(("ReduceSum", "ReduceL1", "ReduceLogSum", "ReduceProd", "CumSum"), "sums many values"),
    **dict.fromkeys(("Exp", "Pow", "Sinh", "Cosh"), "leaves float16's range for moderate inputs"),
}
"""Operators that stay in float32 wherever they are, with the reason."""

_AVERAGES = frozenset({"ReduceMean", "GlobalAveragePool", "AveragePool"})
_ROAD_TO_ROOT = frozenset({"Add", "Clip", "Max", "Sqrt", "Reciprocal"})
_LOSE_TO_ZERO: Mapping[str, tuple[int, ...]] = {"Div": (1,), "Log": (0,), "Sqrt": (0,), "Reciprocal": (0,), "Pow": (0,)}
"""Operators to which a value that became zero makes a difference without bound, and at which inputs."""


@dataclass
class Seen:
    """What was seen of one tensor: largest and smallest non-zero magnitude, and how many of the non-zero values float16 makes zero."""

    largest: float = 0.0
    smallest: float = float("inf")
    nonzero: int = 0
    lost: int = 0

    def update(self, values: Array) -> None:
        """Count these values, which must be finite."""
        sizes = np.abs(values[values != 0]).astype(np.float64)
        if sizes.size:
            self.largest, self.smallest = max(self.largest, float(sizes.max())), min(self.smallest, float(sizes.min()))
            self.nonzero += sizes.size
            self.lost += int((sizes <= FP16_ZERO).sum())


@dataclass
class Pins:
    """The nodes that stay in float32, in the order of the graph's nodes, each with the first reason found."""

    graph: Any
    reasons: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.makers = {name: node for node in self.graph.node for name in node.output if name}
        self.readers: dict[str, list[Any]] = {}
        for node in self.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def pin(self, node: Any, reason: str) -> None:
        """Keep one node in float32."""
        self.reasons.setdefault(node.name, reason)

    def around(self, tensor: str, reason: str) -> None:
        """Keep who makes and who reads the tensor in float32."""
        for node in [*filter(None, [self.makers.get(tensor)]), *self.readers.get(tensor, [])]:
            self.pin(node, reason)

    def by_rules(self) -> None:
        """Operators of the table; squares with what averages them, up to the root or reciprocal behind."""
        for node in self.graph.node:
            if node.op_type in RULES:
                self.pin(node, f"{node.op_type} {RULES[node.op_type]}")
            if node.op_type in _AVERAGES and self._is_square(node.input[0]):
                reason = f"{node.op_type} of squares"
                self.pin(self.makers[node.input[0]], reason)
                self.pin(node, reason)
                self._to_root(node, reason)

    def _is_square(self, tensor: str) -> bool:
        maker = self.makers.get(tensor)
        return maker is not None and (maker.op_type == "Pow" or (maker.op_type == "Mul" and len(set(maker.input)) == 1))

    def _to_root(self, node: Any, reason: str) -> None:
        behind = self.readers.get(node.output[0], [])
        if len(behind) == 1 and behind[0].op_type in _ROAD_TO_ROOT:
            self.pin(behind[0], reason)
            self._to_root(behind[0], reason)

    def by_constants(self) -> None:
        """Readers of a constant that float16 cannot tell from zero, or holds with few digits only (an epsilon)."""
        for name, array in float_constants(self.graph).items():
            seen = Seen()
            seen.update(array[np.isfinite(array)])
            if seen.nonzero and seen.largest < FP16_NORMAL:
                for node in self.readers.get(name, []):
                    self.pin(node, f"the constant {name} is at most {seen.largest:.3g}, below {FP16_NORMAL:.3g}")

    def by_ranges(self, seen: Mapping[str, Seen], max_share: float, lost_share: float) -> None:
        """Around tensors beyond `max_share` of 65504, or with more than `lost_share` of their non-zero values lost to zero.

        Where an operator divides by the tensor or takes its root or logarithm, one lost value is enough.
        """
        for name, one in seen.items():
            if one.largest > max_share * FP16_MAX:
                self.around(name, f"|{name}| reaches {one.largest:.4g}, above {max_share * FP16_MAX:.4g}")
            elif one.lost and (one.lost > lost_share * one.nonzero or self._divides(name)):
                self.around(name, f"{one.lost / one.nonzero:.1%} of the non-zero values of {name} become zero, the smallest is {one.smallest:.3g}")

    def _divides(self, tensor: str) -> bool:
        return any(
            tensor == node.input[slot] for node in self.readers.get(tensor, []) for slot in _LOSE_TO_ZERO.get(node.op_type, ()) if slot < len(node.input)
        )

    def refuse_large_constants(self) -> None:
        """Refuse a constant beyond float16's range that would become float16.

        Raises:
            ConversionRejected: names the constant.
        """
        for name, array in float_constants(self.graph).items():
            finite = np.abs(array[np.isfinite(array)])
            # np.float16 rounds up to 65519 down to 65504
            bad = finite.size and float(finite.max()) > FP16_MAX
            users = [node.name for node in self.readers.get(name, []) if node.name not in self.reasons]
            if bad and users:
                raise ConversionRejected(
                    f"the constant {name!r} does not fit float16",
                    found=f"{finite.max():.6g}, used by {', '.join(users)}",
                    allowed=f"magnitudes up to {FP16_MAX:g}",
                    hint="scale it, keep the model in float32, or list these nodes in the option float_ops",
                    subject=name,
                )

    def listed(self) -> str:
        """Every pinned node as JSON, `[name, operator, reason]`, in the order of the graph."""
        return json.dumps([[node.name, node.op_type, self.reasons[node.name]] for node in self.graph.node if node.name in self.reasons])


def float_constants(graph: Any) -> dict[str, Array]:
    """The float32 initializers by name."""
    onnx = require_onnx("reading an ONNX model")
    return {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer if item.data_type == onnx.TensorProto.FLOAT}
