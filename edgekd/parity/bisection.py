"""Which tensor inside a model is the first to differ from its source: the ladder says the hop, this says the place."""

from __future__ import annotations

from dataclasses import dataclass, replace

from edgekd.artifact import StoredArtifact
from edgekd.contracts import Infer, Tensors
from edgekd.errors import ModelError
from edgekd.parity.compare import BASE_DEPTH, compare_tensors, tolerance_for
from edgekd.parity.faults import Diagnosis, Fault, Finding, diagnose
from edgekd.parity.graph import Graph, depth_told, graph_of, output_ranges
from edgekd.quantize.calibrate import plan_taps
from edgekd.records import Precision, TensorParity


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
        ModelError: one of them is neither ONNX nor TFLite, or one is this and the other that; BundleError: a file is cut off or changed.
    """
    return _shared(*_graphs(reference, other))


def _graphs(reference: StoredArtifact, other: StoredArtifact) -> tuple[Graph, Graph]:
    kinds = [artifact.record.format.value for artifact in (reference, other)]
    graphs = graph_of(reference), graph_of(other)
    if kinds[0] != kinds[1]:
        raise ModelError(
            "two formats name their tensors differently, so their graphs cannot be bisected",
            found=" and ".join(kinds),
            allowed="two files of one format",
            hint="compare the outputs of the hop between them, and bisect float against quantized within each format",
        )
    return graphs


def _shared(reference: Graph, other: Graph) -> dict[str, int]:
    there = {name for node in other.nodes for name in node.outputs}
    return {name: reference.sizes[name] for node in reference.nodes for name in node.outputs if name in there and name in reference.sizes}


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

    Works on two ONNX files or two TFLite files with any `infer` that gives taps. Both models run on all `inputs` with the tensors they
    share tapped, in groups that fit `memory_mb`; `other_infer` runs the other model elsewhere, for the hop to a device. The tolerance is
    `tolerance_for(precision, depth of the tensor)`; the precision is the other model's unless given. In a quantized graph a tensor is
    what its consumers see, behind its quantize/dequantize pair, and saturation is counted at the ends of its range.

    Raises:
        ModelError: the files are not of one format that can be read, or share no tensor.
        BundleError: a file is missing, cut off or changed.
    """
    here, there = _graphs(reference, other)
    sizes = _shared(here, there)
    if not sizes:
        raise ModelError("the two graphs share no tensor by name", hint="compare a model with the one that it was made from")
    maker = {name: node for node in here.nodes for name in node.outputs}
    depth = here.depths()
    samples = len(next(iter(inputs.values())))
    largest = max(sizes.values())
    bytes_each = {name: 2 * 4 * samples * (size if size >= 0 else largest) for name, size in sizes.items()}
    kind = precision or other.record.precision
    position = 0
    for group, _ in plan_taps(bytes_each, samples, memory_mb * 1_000_000):
        seen = {name: there.behind.get(name, name) for name in group}
        expected = infer(reference, inputs, [name for name in group if name not in here.answers])
        found = (other_infer or infer)(other, inputs, [name for name in seen.values() if name not in there.answers])
        for name in group:
            left, right = expected[here.answers.get(name, name)], found[there.answers.get(seen[name], seen[name])]
            row = compare_tensors(name, left, right, tolerance_for(kind, depth[name]), limits=there.ranges.get(name))
            if not row.passed:
                node = maker[name]
                return Divergence(name, node.name, node.op_type, position, len(sizes), row)
            position += 1
    return None


def diagnose_files(
    reference: StoredArtifact,
    other: StoredArtifact,
    infer: Infer,
    inputs: Tensors,
    *,
    other_infer: Infer | None = None,
    precision: Precision | None = None,
    hop: str = "",
) -> tuple[Diagnosis, Divergence | None]:
    """What `diagnose` says of two files, and the first tensor that differs; what is wrong at that tensor is named too.

    Saturation inside a graph (stale calibration), NaN and overflow show at their tensor even where the outputs no longer tell. The place
    is `None` if the outputs agree, if the formats differ, or if every shared tensor agrees (then the inputs or outputs were changed
    outside of the graphs).

    Raises:
        BundleError: a file is missing, cut off or changed.
        ModelError: two files of one format share no tensor, or a file cannot be read.
    """
    there, kind = other_infer or infer, precision or other.record.precision
    for artifact in (reference, other):
        artifact.verify()
    diagnosis = diagnose(
        lambda given: infer(reference, given),
        lambda given: there(other, given),
        inputs,
        specs=reference.record.iospec.inputs,
        precision=kind,
        depth=depth_told(other, BASE_DEPTH),
        limits=output_ranges(other),
        hop=hop or f"{reference.record.format.value} {reference.record.precision.value} -> {other.record.format.value} {kind.value}",
    )
    if diagnosis.parity.passed or reference.record.format is not other.record.format:
        return diagnosis, None
    place = bisect(reference, other, infer, inputs, other_infer=other_infer, precision=precision)
    fault = None if place is None else _fault_of(place.parity)
    if place is None or fault is None:
        return diagnosis, place
    at_place = Finding(fault, place.tensor, f"first at the tensor {place.tensor} ({place.op_type} {place.op_name}): {place.parity.reason}")
    return replace(diagnosis, findings=(at_place, *diagnosis.findings)), place


def _fault_of(row: TensorParity) -> Fault | None:
    """The fault that a comparison of one tensor shows by itself."""
    if row.nonfinite:
        return Fault.OVERFLOW if "fp16 overflow" in row.reason else Fault.NOT_FINITE
    if "saturated int8" in row.reason:
        return Fault.SATURATED
    if row.constant:
        return Fault.CONSTANT
    return Fault.LAYOUT if row.layout else None
