"""Clears up the casts that onnxruntime's float16 converter leaves in a graph."""

from __future__ import annotations

from typing import Any

from edgekd.models.onnx_file import require_onnx


def join_float_neighbours(graph: Any, names: set[str]) -> None:
    """Let neighbours in float32 pass float32 on, in place; `names` are the nodes that were there before the library added casts.

    The library casts every float32 result down and up again before the next float32 node, which is where it overflows.
    """
    onnx = require_onnx("converting an ONNX model")
    casts = [node for node in graph.node if node.op_type == "Cast" and node.name not in names]
    down = {node.output[0]: node.input[0] for node in casts if node.attribute[0].i == onnx.TensorProto.FLOAT16}
    borders = {item.name for item in (*graph.input, *graph.output)}
    renamed: dict[str, str] = {}
    for node in casts:
        if node.attribute[0].i != onnx.TensorProto.FLOAT or node.input[0] not in down:
            continue
        origin = down[node.input[0]]
        if node.output[0] not in borders:
            renamed[node.output[0]] = origin
        elif origin not in borders:
            renamed[origin] = node.output[0]
        else:
            continue
        graph.node.remove(node)

    def final(name: str) -> str:
        while name in renamed:
            name = renamed[name]
        return name

    for node in graph.node:
        for names_of in (node.input, node.output):
            for slot, name in enumerate(names_of):
                names_of[slot] = final(name)
    read = {name for node in graph.node for name in node.input} | borders
    for node in [node for node in casts if node.output[0] in down and node.output[0] not in read]:
        graph.node.remove(node)
    alive = {name for node in graph.node for name in node.output} - borders
    kept = [item for item in graph.value_info if item.name in alive]
    kept = [onnx.ValueInfoProto.FromString(item.SerializeToString()) for item in kept]
    del graph.value_info[:]
    graph.value_info.extend(kept)


def sort_nodes(graph: Any) -> None:
    """Producers before readers, in place; otherwise the order stays."""
    onnx = require_onnx("converting an ONNX model")
    made = {name for node in graph.node for name in node.output}
    waiting = [onnx.NodeProto.FromString(node.SerializeToString()) for node in graph.node]
    makers = {name: position for position, node in enumerate(waiting) for name in node.output}
    placed: set[int] = set()
    order: list[Any] = []
    for start in range(len(waiting)):
        stack = [start]
        while stack:
            position = stack[-1]
            needs = [makers[name] for name in waiting[position].input if name in made and makers[name] not in placed]
            if position not in placed and not needs:
                placed.add(position)
                order.append(waiting[position])
            if position in placed:
                stack.pop()
            else:
                stack.extend(needs)
    del graph.node[:]
    graph.node.extend(order)
