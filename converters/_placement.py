"""Where QuantizeLinear/DequantizeLinear pairs stand for one compiler: the table of its rules, and the check of a finished graph against them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgekd.errors import ConversionRejected
from edgekd.models.onnx_file import require_onnx


@dataclass(frozen=True)
class Placement:
    """The rules of one compiler; activations are int8 per tensor, weights int8 per output channel, zero points 0, biases float.

    `weighted`: operators whose first input and constant weight are quantized. `inputs`: operators without weights whose first input is.
    `fuses_add`: weighted operators that an Add behind them joins; then only the other branch of the Add is quantized. `passes`:
    operators that let int8 through, so that the pair stands before them. `shares`: operators whose inputs and output have one scale.
    `transparent`: activations between an Add and what reads it.
    """

    weighted: frozenset[str]
    inputs: frozenset[str]
    fuses_add: frozenset[str]
    passes: frozenset[str]
    shares: frozenset[str]
    transparent: frozenset[str]


PLACEMENTS: Mapping[str, Placement] = {
    "s8s8_tensorrt": Placement(
        weighted=frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"}),
        inputs=frozenset({"AveragePool", "GlobalAveragePool"}),
        fuses_add=frozenset({"Conv", "ConvTranspose"}),
        passes=frozenset({"MaxPool"}),
        shares=frozenset({"Concat"}),
        transparent=frozenset({"Relu", "Clip", "LeakyRelu"}),
    )
}
"""Placements by scheme. A scheme that is not here is placed by onnxruntime's quantizer.

`s8s8_tensorrt` follows what NVIDIA's documentation says of explicit quantization: inputs of weighted operators and the residual branch of
an Add are quantized, outputs, biases and what is fused between are not. No TensorRT has read these files.
"""

LOW, HIGH = -127, 127
"""Range of weights; activations use -128 to 127 with the scale of 127."""


def weight_axis(node: Any, dims: tuple[int, ...]) -> int | None:
    """The axis of the output channels in a weight of shape `dims`; `None` where this form of the operator cannot be quantized."""
    flags = {item.name: item.i for item in node.attribute}
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Gemm":
        return None if flags.get("transA") else 0 if flags.get("transB") else 1
    return 1 if len(dims) == 2 else None


def check_placement(model: Any, placement: Placement) -> dict[str, str]:
    """Counts of a placed graph, read off the graph alone: `quantized_ops` (weighted operators with both inputs quantized) of `weighted_ops`,
    `float_weighted_ops` (the others, by name), `residual_adds` (Adds that read a quantized branch), `shared_scales` (Concats in one scale).

    Raises:
        ConversionRejected: a rule is broken; names the tensor or node.
    """
    onnx = require_onnx("checking an ONNX model")
    graph = model.graph
    arrays = {item.name: item for item in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    borders = {item.name for item in graph.output}

    def scale(node: Any) -> bytes:
        found = onnx.numpy_helper.to_array(arrays[node.input[1]])
        if not np.isfinite(found).all() or not (found > 0).all():
            raise _broken(f"the scale of {node.name} is not a positive number", found, node.name)
        return bytes(found.tobytes())

    def pair_of(name: str) -> Any:
        """The DequantizeLinear that the tensor comes from, also through operators that pass int8."""
        maker = makers.get(name)
        while maker is not None and maker.op_type in placement.passes:
            maker = makers.get(maker.input[0])
        return maker if maker is not None and maker.op_type == "DequantizeLinear" else None

    for node in graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        zero = onnx.numpy_helper.to_array(arrays[node.input[2]]) if len(node.input) > 2 and node.input[2] in arrays else None
        if zero is None or zero.dtype != np.int8 or zero.any():
            raise _broken(f"the zero point of {node.name} is not an int8 zero", zero, node.name)
        scale(node)
        if borders & set(node.output):
            raise _broken(f"the output of the network comes from {node.name}", node.output[0], node.output[0])
        if node.op_type == "QuantizeLinear":
            lone = [reader for reader in readers.get(node.output[0], []) if reader.op_type != "DequantizeLinear"]
            if lone or not readers.get(node.output[0]):
                raise _broken(f"{node.name} is not followed by a DequantizeLinear alone", [reader.name for reader in lone] or "no reader", node.name)
        else:
            maker, weight = makers.get(node.input[0]), arrays.get(node.input[0])
            if weight is None and (maker is None or maker.op_type != "QuantizeLinear"):
                raise _broken(f"{node.name} stands alone", node.input[0], node.name)
            if maker is not None and scale(maker) != scale(node):
                raise _broken(f"{node.name} has another scale than its QuantizeLinear", node.input[0], node.name)
            if not readers.get(node.output[0]):
                raise _broken(f"nothing reads {node.name}", node.output[0], node.name)
    counts = dict.fromkeys(("weighted_ops", "quantized_ops", "residual_adds", "shared_scales"), 0)
    left: list[str] = []
    for node in graph.node:
        pairs = [pair_of(name) for name in node.input]
        if node.op_type in placement.weighted:
            if len(pairs) > 2 and pairs[2] is not None:
                raise _broken(f"the bias of {node.name} is quantized", node.input[2], node.name)
            halves = [pair is not None for pair in pairs[:2]]
            if halves[1] and not halves[0]:
                raise _broken(f"only the weight of {node.name} is quantized", node.input[0], node.name)
            counts["weighted_ops"] += 1
            counts["quantized_ops"] += all(halves)
            if not all(halves):
                left.append(node.name)
        elif node.op_type == "Add":
            counts["residual_adds"] += any(pair is not None for pair in pairs)
        elif node.op_type in placement.shares and any(pair is not None for pair in pairs):
            after = [reader for reader in readers.get(node.output[0], []) if reader.op_type == "QuantizeLinear"]
            scales = {scale(pair) for pair in pairs if pair is not None} | {scale(reader) for reader in after}
            if len(scales) > 1:
                raise _broken(f"the inputs of {node.name} have different scales", len(scales), node.name)
            counts["shared_scales"] += 1
    return {**{key: str(value) for key, value in counts.items()}, "float_weighted_ops": ", ".join(left)}


def _broken(what: str, found: object, subject: str) -> ConversionRejected:
    return ConversionRejected(what, found=found, hint="keep the nodes around it in float with float_ops", subject=subject)
