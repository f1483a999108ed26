"""A model file as bisection sees it, ONNX or TFLite: operators in order, tensors by name, what quantization does to each."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgekd.artifact import StoredArtifact
from edgekd.errors import ModelError
from edgekd.models.onnx_file import Node, float_tensors, nodes_of, require_onnx
from edgekd.records import Format

_INTEGERS = {"int8": (-128, 127), "uint8": (0, 255)}


@dataclass(frozen=True)
class Graph:
    """`nodes` are in execution order and name their outputs; `sizes` are elements per sample of float tensors (-1: unknown).

    `behind`: tensor to the one that its consumers see after a quantize/dequantize pair. `ranges`: tensor to the ends of its int8
    range in real values, for those quantized with one scale. `answers`: tensor to the name under which a runtime gives it back
    without a tap, for the outputs of the model.
    """

    nodes: tuple[Node, ...]
    sizes: dict[str, int]
    behind: dict[str, str]
    ranges: dict[str, tuple[float, float]]
    answers: dict[str, str]

    def depths(self) -> dict[str, int]:
        """How many operators lie on the longest path to each tensor, its own maker counted."""
        depth: dict[str, int] = {}
        for node in self.nodes:
            here = max((depth.get(name, 0) for name in node.inputs), default=0) + 1
            depth.update(dict.fromkeys(node.outputs, here))
        return depth


def graph_of(artifact: StoredArtifact) -> Graph:
    """The graph of an ONNX or TFLite artifact, after its files were compared with their hashes.

    Raises:
        BundleError: a file is missing, cut off or changed.
        ModelError: it has another format, or cannot be read.
        MissingDependency: reading TFLite needs ai-edge-litert.
    """
    readers = {Format.ONNX: _onnx_graph, Format.TFLITE: _tflite_graph}
    kind = artifact.record.format
    if kind not in readers:
        raise ModelError("only ONNX and TFLite graphs can be bisected", found=kind.value, allowed="onnx, tflite", hint="bisect the file that it was made from")
    artifact.verify()
    return readers[kind](artifact)


def output_ranges(artifact: StoredArtifact) -> dict[str, tuple[float, float]]:
    """Output to the ends of its int8 range in real values, for outputs that come out of a dequantization with one scale.

    Empty for formats whose graph cannot be read. Raises what `graph_of` raises otherwise.
    """
    if artifact.record.format not in (Format.ONNX, Format.TFLITE):
        return {}
    graph = graph_of(artifact)
    return {answer: graph.ranges[name] for name, answer in graph.answers.items() if name in graph.ranges}


def _ends(scale: float, zero: int, dtype: str) -> tuple[float, float]:
    low, high = _INTEGERS[dtype]
    return (low - zero) * scale, (high - zero) * scale


def _onnx_graph(artifact: StoredArtifact) -> Graph:
    from edgekd.models.onnx_file import load_model

    onnx = require_onnx("reading an ONNX model")
    model = load_model(artifact.entry)
    nodes = nodes_of(model)
    held = {item.name: item for item in model.graph.initializer}
    quantized = {node.outputs[0]: node.inputs[0] for node in nodes if node.op_type == "QuantizeLinear"}
    behind, ranges = {}, {}
    for node in nodes:
        if node.op_type != "DequantizeLinear":
            continue
        source = quantized.get(node.inputs[0])
        if source is not None:
            behind[source] = node.outputs[0]
        if len(node.inputs) < 3 or not all(name in held for name in node.inputs[1:]) or node.inputs[0] in held:
            continue
        scale, zero = (onnx.numpy_helper.to_array(held[name], base_dir=str(artifact.folder)) for name in node.inputs[1:3])
        if scale.size == 1 and str(zero.dtype) in _INTEGERS:
            for name in (node.outputs[0], *(() if source is None else (source,))):
                ranges[name] = _ends(float(scale.reshape(-1)[0]), int(zero.reshape(-1)[0]), str(zero.dtype))
    sizes = float_tensors(model)
    made = {name for node in nodes for name in node.outputs}
    sizes = {name: sizes.get(name, -1) for name in made if name in sizes or not sizes}
    return Graph(nodes, sizes, behind, ranges, {item.name: item.name for item in model.graph.output})


def _tflite_graph(artifact: StoredArtifact) -> Graph:
    from edgekd.models.tflite_file import TfliteTensor, load_model, read_graph

    graph = read_graph(load_model(artifact.entry))
    nodes = tuple(Node(op.name, op.kind, tuple(tensor.name for tensor in op.inputs), tuple(tensor.name for tensor in op.outputs)) for op in graph.ops)
    made = {tensor.index for op in graph.ops for tensor in op.outputs}
    ranges: dict[str, tuple[float, float]] = {}
    behind: dict[str, str] = {}

    def ends(tensor: TfliteTensor) -> tuple[float, float] | None:
        plain = tensor.dtype in _INTEGERS and len(tensor.scales) == 1 and not tensor.constant
        return _ends(tensor.scales[0], (tensor.zero_points or (0,))[0], tensor.dtype) if plain else None

    ranges.update({tensor.name: found for tensor in graph.tensors if (found := ends(tensor)) is not None})
    for op in graph.ops:
        if op.kind == "QUANTIZE" and op.inputs[0].dtype == "float32" and op.outputs[0].name in ranges:
            behind[op.inputs[0].name] = op.outputs[0].name
            ranges[op.inputs[0].name] = ranges[op.outputs[0].name]
        elif op.kind == "DEQUANTIZE" and op.inputs[0].name in ranges:
            ranges[op.outputs[0].name] = ranges[op.inputs[0].name]
    sizes = {
        tensor.name: abs(math.prod(tensor.shape)) if -1 not in tensor.shape else -1
        for tensor in graph.tensors
        if tensor.index in made and (tensor.dtype in ("float32", "float16") or tensor.name in ranges)
    }
    return Graph(nodes, sizes, behind, ranges, {tensor.name: name for name, tensor in graph.outputs.items()})


def depth_told(artifact: StoredArtifact, default: int) -> int:
    """The computing operators on the longest path, as the converter noted them, or `default`."""
    noted = artifact.record.metadata.get("depth", "")
    return int(noted) if noted.isdigit() else default
