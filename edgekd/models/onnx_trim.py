"""What nothing needs cut out of an ONNX graph: outputs that nobody asked for, what only fed them, nodes that do nothing, weights that nothing reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.errors import ConfigError, near_names
from edgekd.models.onnx_file import require_onnx


@dataclass(frozen=True)
class Trimmed:
    """How many nodes that do nothing, nodes that nothing reads and weights that nothing reads were removed."""

    idle_nodes: int = 0
    dead_nodes: int = 0
    weights: int = 0

    def metadata(self) -> dict[str, str]:
        """As an artifact's metadata tell it."""
        return {"removed_idle_nodes": str(self.idle_nodes), "removed_dead_nodes": str(self.dead_nodes), "removed_weights": str(self.weights)}


class Links:
    """Who makes and who reads each tensor of a graph, as it is now. `captured` are tensors that inner graphs read."""

    def __init__(self, graph: Any) -> None:
        self.makers = {name: node for node in graph.node for name in node.output if name}
        self.readers: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in filter(None, node.input):
                self.readers.setdefault(name, []).append(node)
        self.captured = {name for node in graph.node for name in _inner_reads(node)}
        for name in self.captured:
            self.readers.setdefault(name, []).extend([None, None])  # so that nothing counts it as read by one
        self.outputs = {item.name for item in graph.output}
        self.inputs = {item.name for item in graph.input}
        self.initializers = {item.name: item for item in graph.initializer}

    def constant(self, name: str) -> NDArray[Any] | None:
        """The value of a tensor that is one weight, `None` for others."""
        onnx = require_onnx("reading an ONNX model")
        if name in self.initializers and name not in self.inputs:
            return np.asarray(onnx.numpy_helper.to_array(self.initializers[name]))
        maker = self.makers.get(name)
        if maker is not None and maker.op_type == "Constant" and maker.attribute and maker.attribute[0].name == "value":
            return np.asarray(onnx.numpy_helper.to_array(maker.attribute[0].t))
        return None

    def holds(self, name: str) -> bool:
        """Whether a tensor has this name."""
        return any(name in names for names in (self.makers, self.readers, self.inputs, self.initializers))

    def free(self, wish: str) -> str:
        """A name that no tensor has."""
        name, count = wish, 1
        while self.holds(name):
            count += 1
            name = f"{wish}_{count}"
        return name


def _inner_reads(node: Any) -> Iterator[str]:
    """Names that the graphs inside a node read."""
    for attribute in node.attribute:
        for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            yield from (item.name for item in inner.output)
            for other in inner.node:
                yield from filter(None, other.input)
                yield from _inner_reads(other)


def trim(model: Any) -> Trimmed:
    """Remove what does nothing and what nothing reads, in place; outputs keep their names and values."""
    idle = _remove_idle(model.graph)
    dead = _remove_dead(model.graph)
    _forget_values(model.graph)
    return Trimmed(idle, dead, _remove_weights(model.graph))


def keep_outputs(model: Any, names: Sequence[str]) -> Trimmed:
    """Keep these outputs, in the model's order, and cut what only fed the others, in place.

    Raises:
        ConfigError: the model has no output of this name, or an input then feeds nothing.
    """
    graph = model.graph
    known = [item.name for item in graph.output]
    check_outputs(names, known)
    read = _read_inputs(graph)
    kept = [item for item in graph.output if item.name in names]
    copies = [type(item).FromString(item.SerializeToString()) for item in kept]
    del graph.output[:]
    graph.output.extend(copies)
    dead = _remove_dead(graph)
    require_fed([name for name in read if name not in _read_inputs(graph)], names)
    _forget_values(graph)
    return Trimmed(0, dead, _remove_weights(graph))


def check_outputs(names: Sequence[str], known: Sequence[str]) -> None:
    """Refuse names that are no outputs.

    Raises:
        ConfigError: there is none of this name, or no name at all.
    """
    if not names:
        raise ConfigError("a model without outputs is of no use", found="()", allowed=", ".join(known), hint="leave outputs out to keep all", subject="outputs")
    for name in names:
        if name not in known:
            raise ConfigError(f"the model has no output {name!r}", found=name, allowed=near_names(name, known), subject=name)


def require_fed(idle: Sequence[str], outputs: Sequence[str]) -> None:
    """Refuse a cut after which inputs feed nothing.

    Raises:
        ConfigError: names them.
    """
    if idle:
        raise ConfigError(
            f"without the outputs that are cut nothing reads the input {idle[0]!r} any more",
            found=", ".join(idle),
            hint=f"keep an output that needs it beside {', '.join(outputs)}, or take the input out of the model",
            subject=idle[0],
        )


def _read_inputs(graph: Any) -> list[str]:
    links = Links(graph)
    return [item.name for item in graph.input if item.name in links.readers or item.name in links.outputs]


def _does_nothing(links: Links, node: Any) -> bool:
    attributes = {item.name: item for item in node.attribute}
    if node.domain not in ("", "ai.onnx") or len([name for name in node.output if name]) != 1:
        return False
    if node.op_type == "Dropout":  # without training_mode it passes its input
        return len(node.input) < 3 or not node.input[2] or ((value := links.constant(node.input[2])) is not None and not value.any())
    if node.op_type == "Transpose":
        return "perm" in attributes and list(attributes["perm"].ints) == sorted(attributes["perm"].ints)
    return node.op_type == "Identity" or (node.op_type == "Concat" and len(node.input) == 1)


def _remove_idle(graph: Any) -> int:
    """Remove nodes that give what they take; one between an input and an output stays, since each has its own name."""
    removed, links = 0, Links(graph)
    for node in list(graph.node):
        if not _does_nothing(links, node):
            continue
        source, made = node.input[0], node.output[0]
        if {source, made} & links.captured:
            continue
        if made in links.outputs:
            maker = links.makers.get(source)
            if maker is None or source in links.outputs:
                continue
            maker.output[:] = [made if name == source else name for name in maker.output]
            _rename(links.readers[source], source, made)
        else:
            _rename(links.readers.get(made, []), made, source)
        graph.node.remove(node)
        removed, links = removed + 1, Links(graph)
    return removed


def _rename(nodes: Sequence[Any], old: str, new: str) -> None:
    for node in nodes:
        node.input[:] = [new if name == old else name for name in node.input]


def _forget_values(graph: Any) -> None:
    """Remove what is told of the shapes of tensors that are no more."""
    made = {name for node in graph.node for name in node.output}
    for item in [item for item in graph.value_info if item.name not in made]:
        graph.value_info.remove(item)


def _remove_dead(graph: Any) -> int:
    """Remove nodes none of whose outputs is read, from the back."""
    needed = {item.name for item in graph.output}
    dead = []
    for node in reversed(list(graph.node)):
        if needed & set(node.output):
            needed |= {*filter(None, node.input), *_inner_reads(node)}
        else:
            dead.append(node)
    for node in dead:
        graph.node.remove(node)
    return len(dead)


def _remove_weights(graph: Any) -> int:
    links = Links(graph)
    idle = [item for item in graph.initializer if item.name not in links.readers and item.name not in links.outputs]
    names = {item.name for item in idle}
    for item in idle:
        graph.initializer.remove(item)
    for item in [item for item in graph.input if item.name in names]:  # old files list weights among their inputs
        graph.input.remove(item)
    return len(idle)
