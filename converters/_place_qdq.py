"""Puts QuantizeLinear/DequantizeLinear pairs into a float graph by a placement table, with scales from observed ranges."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from edgekd.models.onnx_file import require_onnx

from ._placement import HIGH, LOW, Placement, weight_axis

_TINY = float(np.finfo(np.float32).tiny)


def place(model: Any, ranges: Mapping[str, tuple[float, float]], placement: Placement, float_ops: Collection[str]) -> None:
    """Quantize the model in place; `ranges` has every float tensor that a rule may touch, `float_ops` the nodes that stay in float.

    Each reader of a tensor is asked whether it wants int8; a tensor that one wants gets one pair, which those readers share. The others,
    and the network's outputs, go on reading the float tensor. The nodes must be in topological order.
    """
    plan = _Plan(model, ranges, placement, float_ops)
    for position in reversed(range(len(plan.nodes))):
        plan.visit(position)
    plan.write()


class _Plan:
    """Who wants which tensor in int8, and which tensors have one scale."""

    def __init__(self, model: Any, ranges: Mapping[str, tuple[float, float]], placement: Placement, float_ops: Collection[str]) -> None:
        self.onnx = require_onnx("quantizing an ONNX model")
        self.graph = model.graph
        self.nodes = list(model.graph.node)
        self.ranges, self.placement, self.float_ops = ranges, placement, set(float_ops)
        self.arrays = {item.name: item for item in model.graph.initializer}
        self.maker = {name: position for position, node in enumerate(self.nodes) for name in node.output}
        self.readers: dict[str, list[int]] = {}
        for position, node in enumerate(self.nodes):
            for name in node.input:
                self.readers.setdefault(name, []).append(position)
        self.depth: list[int] = []
        for node in self.nodes:
            self.depth.append(1 + max((self.depth[self.maker[name]] for name in node.input if name in self.maker), default=0))
        self.borders = {item.name for item in model.graph.output}
        self.wants: dict[str, set[int]] = {}
        self.weights: dict[int, int] = {}
        self._group: dict[str, str] = {}
        self._taken = {name for node in self.nodes for name in (*node.input, *node.output)} | set(self.arrays)

    # ------------------------------------------------------------------ the rules

    def visit(self, position: int) -> None:
        """What one node asks of its inputs; its readers were asked before."""
        node = self.nodes[position]
        if node.name in self.float_ops:
            return
        rules = self.placement
        if node.op_type in rules.weighted:
            axis = self.axis(node)
            if axis is not None:
                self.weights[position] = axis
                self.want(node.input[0], position)
        elif node.op_type in rules.inputs and node.input[0] in self.ranges:
            self.want(node.input[0], position)
        elif node.op_type == "Add":
            self.visit_add(position)
        elif node.op_type in rules.passes:
            self.visit_passing(position)
        elif node.op_type in rules.shares and self.wants.get(node.output[0]) and all(name in self.ranges for name in node.input):
            for name in node.input:
                self.want(name, position)
                self.join(name, node.output[0])

    def visit_add(self, position: int) -> None:
        """The branch that is not computed with the Add: the shorter one where both could be, which is the skip connection.

        Both branches where no operator can compute the Add and an int8 one reads it.
        """
        node = self.nodes[position]
        if any(name not in self.ranges for name in node.input):
            return
        fused = [name for name in node.input if self.fuses(name)]
        if fused:
            joined = max(fused, key=lambda name: (self.depth[self.maker[name]], self.maker[name]))
            self.want(next(name for name in node.input if name != joined), position)
        elif self.is_wanted(node.output[0]):
            for name in node.input:
                self.want(name, position)

    def visit_passing(self, position: int) -> None:
        """Move the wish for the output to the input, if every reader has it and the network does not give this tensor."""
        before, after = self.nodes[position].input[0], self.nodes[position].output[0]
        asked = self.wants.get(after, set())
        if asked and asked == set(self.readers[after]) and after not in self.borders and before in self.ranges:
            self.join(before, after)
            del self.wants[after]
            self.want(before, position)

    def fuses(self, name: str) -> bool:
        """Whether the tensor comes from an int8 operator that nothing but the Add reads."""
        made = self.maker.get(name)
        if made is None or name in self.borders or len(self.readers[name]) != 1:
            return False
        node = self.nodes[made]
        return node.op_type in self.placement.fuses_add and node.name not in self.float_ops and self.axis(node) is not None

    def is_wanted(self, name: str) -> bool:
        """Whether an int8 operator reads the tensor, activations between not counted."""
        if self.wants.get(name):
            return True
        behind = [self.nodes[position] for position in self.readers.get(name, [])]
        return any(node.op_type in self.placement.transparent and self.is_wanted(node.output[0]) for node in behind)

    def axis(self, node: Any) -> int | None:
        weight = self.arrays.get(node.input[1])
        if weight is None or weight.data_type != self.onnx.TensorProto.FLOAT or node.input[0] not in self.ranges:
            return None
        return weight_axis(node, tuple(weight.dims))

    def want(self, name: str, position: int) -> None:
        self.wants.setdefault(name, set()).add(position)

    # ------------------------------------------------------------------ scales

    def root(self, name: str) -> str:
        while name in self._group:
            name = self._group[name]
        return name

    def join(self, one: str, other: str) -> None:
        """Both tensors have one scale from now on."""
        left, right = self.root(one), self.root(other)
        if left != right:
            self._group[right] = left

    def bounds(self) -> dict[str, float]:
        """The largest magnitude of each group of tensors."""
        found: dict[str, float] = {}
        for name in {*self.wants, *self._group, *self._group.values()}:
            low, high = self.ranges[name]
            found[self.root(name)] = max(found.get(self.root(name), 0.0), abs(low), abs(high))
        return found

    # ------------------------------------------------------------------ the graph

    def fresh(self, name: str) -> str:
        """A name that no tensor has."""
        wish, count = name, 1
        while wish in self._taken:
            count += 1
            wish = f"{name}_{count}"
        self._taken.add(wish)
        return wish

    def constant(self, name: str, array: Any) -> str:
        made = self.fresh(name)
        self.graph.initializer.append(self.onnx.numpy_helper.from_array(array, made))
        return made

    def write(self) -> None:
        """Add the pairs and int8 weights, and drop float weights that nobody reads any more."""
        helper, bounds = self.onnx.helper, self.bounds()
        scales: dict[str, str] = {}
        zero = ""
        behind: dict[int, list[Any]] = {}
        for name in sorted(self.wants, key=lambda item: (self.maker.get(item, -1), item)):
            zero = zero or self.constant("int8_zero_point", np.zeros((), np.int8))
            root = self.root(name)
            if root not in scales:
                scales[root] = self.constant(f"{root}_scale", np.array(scale_of(bounds[root]), np.float32))
            coded, decoded = self.fresh(f"{name}_quantized"), self.fresh(f"{name}_dequantized")
            behind.setdefault(self.maker.get(name, -1), []).extend(
                (
                    helper.make_node("QuantizeLinear", [name, scales[root], zero], [coded], name=f"{name}_QuantizeLinear"),
                    helper.make_node("DequantizeLinear", [coded, scales[root], zero], [decoded], name=f"{name}_DequantizeLinear"),
                )
            )
            for position in self.wants[name]:
                node = self.nodes[position]
                for slot, given in enumerate(node.input):
                    if given == name:
                        node.input[slot] = decoded
        before: dict[int, list[Any]] = {}
        ready: dict[tuple[str, int], str] = {}
        for position, axis in sorted(self.weights.items()):
            node = self.nodes[position]
            key = (node.input[1], axis)
            if key not in ready:
                ready[key] = self.fresh(f"{key[0]}_dequantized")
                before[position] = [self.weight(key[0], axis, ready[key])]
            node.input[1] = ready[key]
        ordered = list(behind.get(-1, []))
        for position, node in enumerate(self.nodes):
            ordered += [*before.get(position, []), node, *behind.get(position, [])]
        kept = [self.onnx.NodeProto.FromString(node.SerializeToString()) for node in ordered]
        del self.graph.node[:]
        self.graph.node.extend(kept)
        read = {name for node in kept for name in node.input} | self.borders
        for item in [item for item in self.graph.initializer if item.name not in read]:
            self.graph.initializer.remove(item)

    def weight(self, name: str, axis: int, output: str) -> Any:
        """The DequantizeLinear of a weight that is stored in int8."""
        array = self.onnx.numpy_helper.to_array(self.arrays[name]).astype(np.float64)
        others = tuple(index for index in range(array.ndim) if index != axis)
        scale = np.array([scale_of(float(bound)) for bound in np.abs(array).max(axis=others)], np.float32)
        shape = [1] * array.ndim
        shape[axis] = -1
        coded = np.clip(np.rint(array / scale.reshape(shape)), LOW, HIGH).astype(np.int8)
        parts = {"quantized": coded, "scale": scale, "zero_point": np.zeros(len(scale), np.int8)}
        inputs = [self.constant(f"{name}_{part}", value) for part, value in parts.items()]
        return self.onnx.helper.make_node("DequantizeLinear", inputs, [output], name=f"{name}_DequantizeLinear", axis=axis)


def scale_of(bound: float) -> float:
    """The scale that maps `bound` to 127; of a tensor that is always zero, 1/127."""
    return max(bound, _TINY * HIGH) / HIGH if bound > 0 else 1.0 / HIGH
