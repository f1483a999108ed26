"""Which part of a network fails: every part is converted alone, with the inputs that it really gets, from the outside in."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.contracts import Tensors
from edgekd.identity.code_text import is_library
from edgekd.operators.hop import Hop, Trouble, flat_call
from edgekd.operators.replacements import TYPES, replacement_for
from edgekd.operators.report import Culprit
from edgekd.operators.sets import OperatorWatch, describe_call, dispatch_watch, module_kind, operator_name
from edgekd.teachers import tensors_of

if TYPE_CHECKING:
    import torch

_CALLS = 4
"""So many calls of one module with different shapes are looked at."""

_NAMED = 3

_LEAVES = "aten._local_scalar_dense"
"""A value that leaves the graph and becomes a number of Python: where a converter blames no operator, it is this one."""


@dataclass(frozen=True)
class _Call:
    """The arguments of one call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def locate(module: torch.nn.Module, inputs: Tensors, hop: Hop, trouble: Trouble) -> tuple[Culprit, int]:
    """The smallest part of the user's code that fails as the whole `module` does, and how many conversions it took to find it.

    `inputs` holds one sample or more; the first is run. A part counts as failing only at the step where the whole one fails. Parts of
    torch's own layers are not looked into: nobody can change them.
    """
    search = _Search(module, inputs, hop)
    path, found = search.descend("", trouble)
    return search.culprit(path, found), search.conversions


class _Search:
    def __init__(self, module: torch.nn.Module, inputs: Tensors, hop: Hop) -> None:
        self.module, self.hop = module, hop
        self.layers = dict(module.named_modules())
        self.first = {name: value[:1] for name, value in inputs.items()}
        self.calls = _record(module, self.first)
        self.passed: set[str] = set()
        self.tried: dict[frozenset[str], Trouble | None] = {}
        self.conversions = 0

    def descend(self, path: str, trouble: Trouble) -> tuple[str, Trouble]:
        """The path of the smallest failing part at or below `path`, and its trouble."""
        kind = type(self.layers[path])
        if kind.__module__.startswith("torch.") and not kind.__module__.endswith(".container"):
            return path, trouble
        for child in self.called_below(path):
            found = self.attempt(child, trouble.step)
            if found is not None:
                return self.descend(child, found)
        return path, trouble

    def called_below(self, path: str) -> Iterator[str]:
        """The nearest modules below a path that were called; lists of modules are not."""
        for name, _ in self.layers[path].named_children():
            child = f"{path}.{name}" if path else name
            if child in self.calls:
                yield child
            elif child in self.layers:  # a module that stands in two places has one path
                yield from self.called_below(child)

    def attempt(self, path: str, step: str) -> Trouble | None:
        """How a part fails alone at a step; nothing if it passes, or cannot stand alone."""
        for call in self.calls[path]:
            tokens = self.tokens(self.layers[path], call)
            if tokens <= self.passed:
                continue
            if tokens not in self.tried:
                self.tried[tokens] = self.converted(self.layers[path], call)
            found = self.tried[tokens]
            if found is not None and found.step == step:
                return found
            if found is None:
                self.passed |= tokens
        return None

    def converted(self, layer: torch.nn.Module, call: _Call) -> Trouble | None:
        alone, inputs = flat_call(layer, call.args, call.kwargs)
        if not inputs:
            return None
        self.conversions += 1
        with tempfile.TemporaryDirectory(prefix="edgekd.preflight.") as folder:
            return self.hop.attempt(alone, inputs, Path(folder))

    def tokens(self, layer: torch.nn.Module, call: _Call) -> frozenset[str]:
        """What a call is made of: operators and kinds of modules."""
        import torch

        with torch.no_grad(), OperatorWatch(layer) as watch:
            layer(*call.args, **call.kwargs)
        operators, modules = watch.found
        return frozenset((*operators, *modules))

    def culprit(self, path: str, trouble: Trouble) -> Culprit:
        """The record of a part that fails, with the operator and its place."""
        layer = self.layers[path]
        owner = self.owner(path)
        lines, tokens = self.lines(path, owner)
        new = list(dict.fromkeys(operator_name(token) for token in tokens if token not in self.passed))
        if not trouble.operator and _LEAVES in new and trouble.step == "convert":
            new = [_LEAVES]
        types = [name for name in TYPES if any(f"{name}[" in token for token in tokens if token not in self.passed)]
        suspects = [trouble.operator] if trouble.operator else new
        shown = ", ".join(suspects[:_NAMED]) + (f" and {len(suspects) - _NAMED} more" if len(suspects) > _NAMED else "")
        line = next((place for name, place in lines.items() if len(suspects) == 1 and _same(name, suspects[0])), "")
        return Culprit(
            module=path,
            kind=f"{type(layer).__module__}.{type(layer).__qualname__}",
            place=line or _forward_place(self.layers[owner]),
            step=trouble.step,
            operator=shown,
            reason=trouble.reason,
            replacement=replacement_for([trouble.operator, *types, *new], module_kind(layer), self.hop.toolchain.name),
        )

    def owner(self, path: str) -> str:
        """The part itself or the nearest one around it whose forward is the user's own code."""
        steps = path.split(".") if path else []
        for length in range(len(steps), -1, -1):
            here = ".".join(steps[:length])
            if here in self.calls and not is_library(type(self.layers[here]).__module__):
                return here
        return ""

    def lines(self, path: str, owner: str) -> tuple[dict[str, str], list[str]]:
        """Operator to the line of the user's forward that leads to it, and the tokens of the part in order of use."""
        import torch

        layer, places, tokens = self.layers[owner], dict[str, str](), list[str]()
        file = _file_of(layer)

        def seen(func: Any, args: Any, kwargs: Any) -> None:
            token = describe_call(func, args, kwargs)
            tokens.append(token)
            frame = sys._getframe(1)
            while frame is not None and frame.f_code.co_filename != file:
                frame = frame.f_back  # type: ignore[assignment]
            if frame is not None:
                places.setdefault(operator_name(token), f"{Path(file).name}:{frame.f_lineno}")

        call = self.calls[owner][0]
        with torch.no_grad(), dispatch_watch(seen):
            layer(*call.args, **call.kwargs)
        if owner == path:
            return places, tokens
        own = self.tokens(self.layers[path], self.calls[path][0])
        return {}, [token for token in dict.fromkeys(tokens) if token in own]


def _record(module: torch.nn.Module, inputs: Tensors) -> dict[str, list[_Call]]:
    """The arguments of every module's calls in one run; of calls with equal shapes the first."""
    import torch

    calls: dict[str, list[_Call]] = {}
    shapes: dict[str, set[str]] = {}

    def remember(path: str) -> Any:
        def hook(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            from torch.utils import _pytree

            shape = str([tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else leaf for leaf in _pytree.tree_leaves((args, kwargs))])
            if shape not in shapes.setdefault(path, set()) and len(shapes[path]) < _CALLS:
                shapes[path].add(shape)
                kept = _pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf, (args, kwargs))
                calls.setdefault(path, []).append(_Call(*kept))

        return hook

    hooks = [layer.register_forward_pre_hook(remember(path), with_kwargs=True) for path, layer in module.named_modules()]
    try:
        with torch.no_grad():
            module(*tensors_of(inputs))
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _code(layer: torch.nn.Module) -> Any:
    return getattr(type(layer).forward, "__code__", None)


def _file_of(layer: torch.nn.Module) -> str:
    code = _code(layer)
    return "" if code is None else str(code.co_filename)


def _forward_place(layer: torch.nn.Module) -> str:
    """The file's name and the line of the forward."""
    code = _code(layer)
    return "" if code is None else f"{Path(code.co_filename).name}:{code.co_firstlineno}"


def _same(name: str, told: str) -> bool:
    """Whether a converter means this operator: `aten::sort`, `torch.ops.aten.sort` and `aten.sort.default` are one, and so are the forms in place."""
    own = name.rpartition(".")[2].strip("_")
    return own != "" and own in [part.strip("_") for part in told.replace("::", ".").split(".")]
