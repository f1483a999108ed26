"""Outputs that nobody asked for cut out of a TFLite file, with the operators, tensors and weights that only fed them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgekd.errors import ConversionRejected
from edgekd.models.onnx_trim import Trimmed, check_outputs, require_fed
from edgekd.models.tflite_file import ensure_signature, read_graph


def keep_outputs(model: Any, names: Sequence[str]) -> Trimmed:
    """Keep these outputs, in the model's order, in place. Tensors keep their names, weights their values.

    Raises:
        ConfigError: the model has no output of this name, or an input then feeds nothing.
        ConversionRejected: the file has several graphs or signatures.
    """
    ensure_signature(model)
    if len(model.subgraphs) > 1 or len(model.signatureDefs) > 1:
        raise ConversionRejected(
            "the outputs of a TFLite file with several graphs cannot be cut",
            found=f"{len(model.subgraphs)} graphs, {len(model.signatureDefs)} signatures",
            hint="cut them where the file comes from: from torch or ONNX with outputs=",
            subject="outputs",
        )
    found = read_graph(model)
    check_outputs(names, list(found.outputs))
    graph, signature = model.subgraphs[0], model.signatureDefs[0]
    read = _read_inputs(graph)
    kept = {name: tensor.index for name, tensor in found.outputs.items() if name in names}
    graph.outputs = np.array(list(dict.fromkeys(kept.values())), dtype=np.int32)
    signature.outputs = [item for item in signature.outputs if _text(item.name) in kept]
    dead = _remove_dead(graph)
    idle = {index for index in read if index not in _read_inputs(graph)}
    require_fed([name for name, tensor in found.inputs.items() if tensor.index in idle], names)
    return Trimmed(0, dead, _remove_tensors(model))


def _read_inputs(graph: Any) -> set[int]:
    used = {int(index) for op in graph.operators for index in op.inputs} | {int(index) for index in graph.outputs}
    return used & {int(index) for index in graph.inputs}


def _remove_dead(graph: Any) -> int:
    """Remove operators none of whose outputs is read; one without outputs acts on a state and stays."""
    needed = {int(index) for index in graph.outputs}
    kept = []
    for op in reversed(graph.operators):
        made = {int(index) for index in op.outputs}
        if not made or made & needed:
            needed |= {int(index) for index in op.inputs}
            kept.append(op)
    dead = len(graph.operators) - len(kept)
    graph.operators = kept[::-1]
    return dead


def _remove_tensors(model: Any) -> int:
    """Remove tensors that nothing uses, and the values of those that were weights; the count of the latter. Everything is numbered anew."""
    graph, signature = model.subgraphs[0], model.signatureDefs[0]
    borders = [int(index) for index in (*graph.inputs, *graph.outputs)]
    inner = [int(index) for op in graph.operators for side in (op.inputs, op.outputs, op.intermediates) if side is not None for index in side]
    used = sorted({index for index in (*borders, *inner) if index >= 0})
    places = {old: new for new, old in enumerate(used)} | {-1: -1}
    filled = {index for index, buffer in enumerate(model.buffers) if buffer.data is not None and len(buffer.data)}
    weights = sum(tensor.buffer in filled for index, tensor in enumerate(graph.tensors) if index not in places)
    graph.tensors = [graph.tensors[index] for index in used]
    graph.inputs, graph.outputs = ([places[int(index)] for index in side] for side in (graph.inputs, graph.outputs))
    for op in graph.operators:
        op.inputs, op.outputs = [places[int(index)] for index in op.inputs], [places[int(index)] for index in op.outputs]
        if op.intermediates is not None:
            op.intermediates = [places[int(index)] for index in op.intermediates]
    for item in (*signature.inputs, *signature.outputs):
        item.tensorIndex = places[int(item.tensorIndex)]
    _remove_buffers(model)
    _remove_codes(model)
    return weights


def _remove_buffers(model: Any) -> None:
    """Remove buffers that neither a tensor nor an entry of the metadata holds; the first one, which is empty by convention, stays."""
    holders = [*model.subgraphs[0].tensors, *(model.metadata or [])]
    used = sorted({0, *(int(item.buffer) for item in holders), *(int(index) for index in _ints(model.metadataBuffer))})
    places = {old: new for new, old in enumerate(used)}
    model.buffers = [model.buffers[index] for index in used]
    for item in holders:
        item.buffer = places[int(item.buffer)]
    if model.metadataBuffer is not None:
        model.metadataBuffer = [places[int(index)] for index in model.metadataBuffer]


def _remove_codes(model: Any) -> None:
    operators = model.subgraphs[0].operators
    used = sorted({int(op.opcodeIndex) for op in operators})
    places = {old: new for new, old in enumerate(used)}
    model.operatorCodes = [model.operatorCodes[index] for index in used]
    for op in operators:
        op.opcodeIndex = places[int(op.opcodeIndex)]


def _ints(values: Any) -> tuple[int, ...]:
    return () if values is None else tuple(int(value) for value in values)


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
