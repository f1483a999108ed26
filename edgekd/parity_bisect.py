"""Which tensor inside a model is the first to differ from its source: the ladder says the hop, this says the place."""

from __future__ import annotations

from dataclasses import dataclass

from edgekd.artifact import StoredArtifact
from edgekd.contracts import Infer, Tensors
from edgekd.errors import ModelError
from edgekd.onnx_io import Node, float_tensors, load_model, nodes_of
from edgekd.parity import Tolerance, compare_tensors, tolerance_for
from edgekd.quantize.calibrate import plan_taps
from edgekd.records import Format, Precision, TensorParity


@dataclass(frozen=True)
class Divergence:
    """The first tensor that differs: which operator of the reference makes it, and how many shared tensors before it agree."""

    tensor: str
    op_name: str
    op_type: str
    position: int
    compared: int
    parity: TensorParity


def shared_tensors(reference: StoredArtifact, other: StoredArtifact) -> dict[str, int]:
    """Float tensors that both graphs have by name and compute, in the reference's topological order, with elements per sample.

    Raises:
        ModelError: one of them is no ONNX file.
    """
    for artifact in (reference, other):
        if artifact.record.format is not Format.ONNX:
            raise ModelError("only ONNX graphs can be bisected", found=artifact.record.format.value, hint="bisect the ONNX file that it was made from")
    there = {name for node in nodes_of(load_model(other.entry)) for name in node.outputs}
    model = load_model(reference.entry)
    sizes = float_tensors(model)
    return {name: sizes.get(name, -1) for node in nodes_of(model) for name in node.outputs if name in there and (name in sizes or not sizes)}


def _dequantized(nodes: tuple[Node, ...]) -> dict[str, str]:
    """Tensor -> the one that its consumers see after a QuantizeLinear/DequantizeLinear pair.

    A quantizer drops a ReLU whose clipping the pair does; only behind the pair is the tensor what its name says.
    """
    quantized = {node.outputs[0]: node.inputs[0] for node in nodes if node.op_type == "QuantizeLinear"}
    return {quantized[node.inputs[0]]: node.outputs[0] for node in nodes if node.op_type == "DequantizeLinear" and node.inputs[0] in quantized}


def bisect(
    reference: StoredArtifact,
    other: StoredArtifact,
    infer: Infer,
    inputs: Tensors,
    *,
    other_infer: Infer | None = None,
    precision: Precision | None = None,
    memory_mb: int = 256,
) -> Divergence | None:
    """The first tensor in topological order that differs beyond the tolerance at its depth, or `None`.

    Both models run on all `inputs` with the tensors they share tapped, in groups that fit `memory_mb`; `other_infer` runs the other
    model elsewhere, for the hop to a device. The tolerance is `tolerance_for(precision, depth of the tensor)`; the precision is the
    other model's unless given. In a quantized graph a tensor is what its consumers see, behind its Q/DQ pair.

    Raises:
        ModelError: one of them is no ONNX file, or they share no tensor.
    """
    sizes = shared_tensors(reference, other)
    if not sizes:
        raise ModelError("the two graphs share no tensor by name", hint="compare a model with the one that it was made from")
    nodes = nodes_of(load_model(reference.entry))
    maker = {name: node for node in nodes for name in node.outputs}
    depth: dict[str, int] = {}
    for node in nodes:
        here = max((depth.get(name, 0) for name in node.inputs), default=0) + 1
        depth.update(dict.fromkeys(node.outputs, here))
    samples = len(next(iter(inputs.values())))
    largest = max(sizes.values())
    bytes_each = {name: 2 * 4 * samples * (size if size >= 0 else largest) for name, size in sizes.items()}
    kind = precision or other.record.precision
    outputs = {tensor.name for tensor in reference.record.iospec.outputs}
    behind = _dequantized(nodes_of(load_model(other.entry)))
    position = 0
    for group, _ in plan_taps(bytes_each, samples, memory_mb * 1_000_000):
        expected = infer(reference, inputs, [name for name in group if name not in outputs])
        there = {name: behind.get(name, name) for name in group}
        found = (other_infer or infer)(other, inputs, [name for name in there.values() if name not in outputs])
        for name in group:
            limit: Tolerance = tolerance_for(kind, depth[name])
            row = compare_tensors(name, expected[name], found[there[name]], limit)
            if not row.passed:
                node = maker[name]
                return Divergence(name, node.name, node.op_type, position, len(sizes), row)
            position += 1
    return None
