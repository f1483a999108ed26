"""Outputs of a TFLite graph that its own operators read too, taken apart before quantizing: the quantizer gives them one type for both."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from edgekd.models.tflite_file import require_schema, unique


def separate_outputs(model: Any) -> dict[str, str]:
    """Give every float output that an operator reads as well a tensor of its own, in place, behind a RESHAPE that changes nothing.

    The state of a recurrent cell is such an output. Without this ai-edge-quantizer 0.10.0 hands its float form to the operators that read it,
    with int8 weights and an int8 output, and LiteRT refuses the file. Tensors and operators that were there keep their names.

    Returns the name of each new tensor with that of the one that it repeats.
    """
    schema, _ = require_schema("quantizing a TFLite model")
    graph, signature = model.subgraphs[0], model.signatureDefs[0]
    read = {int(index) for op in graph.operators for index in op.inputs}
    made = {int(index) for op in graph.operators for index in op.outputs}
    taken = {tensor.name.decode() for tensor in graph.tensors}
    separated: dict[str, str] = {}
    for index in dict.fromkeys(int(output) for output in graph.outputs):
        tensor = graph.tensors[index]
        if index not in read or index not in made or tensor.type != schema.TensorType.FLOAT32:
            continue
        own = copy.copy(tensor)
        own.name, own.buffer = unique(f"{tensor.name.decode()}/output", taken).encode(), 0
        sizes = np.array([int(size) for size in tensor.shape], dtype=np.int32)
        model.buffers.append(schema.BufferT(data=np.frombuffer(sizes.tobytes(), dtype=np.uint8)))
        shape = schema.TensorT(name=unique(f"{own.name.decode()}/shape", taken).encode(), type=schema.TensorType.INT32, shape=[len(sizes)])
        shape.buffer = len(model.buffers) - 1
        place = len(graph.tensors)
        graph.tensors += [own, shape]
        op = schema.OperatorT(opcodeIndex=_reshape(model, schema), inputs=[index, place + 1], outputs=[place])
        op.builtinOptionsType, op.builtinOptions = schema.BuiltinOptions.ReshapeOptions, schema.ReshapeOptionsT(newShape=sizes.tolist())
        graph.operators.append(op)
        graph.outputs = [place if int(output) == index else int(output) for output in graph.outputs]
        for item in signature.outputs:
            item.tensorIndex = place if item.tensorIndex == index else item.tensorIndex
        separated[own.name.decode()] = tensor.name.decode()
    return separated


def _reshape(model: Any, schema: Any) -> int:
    """The place of RESHAPE among the model's operator codes, which gets it where it is missing."""
    code = schema.BuiltinOperator.RESHAPE
    for place, known in enumerate(model.operatorCodes):
        if max(known.builtinCode, known.deprecatedBuiltinCode) == code:
            return place
    model.operatorCodes.append(schema.OperatorCodeT(builtinCode=code, deprecatedBuiltinCode=code, version=1))
    return len(model.operatorCodes) - 1
