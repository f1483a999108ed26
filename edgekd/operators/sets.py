"""What decides whether a network can be converted: its operators with what matters of their arguments, and the kinds of its modules."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Seen = Callable[[Any, Sequence[Any], Mapping[str, Any]], None]

_EXACT = ("dim", "dims", "exponent", "p", "ord", "reduction", "interpolation_mode", "padding_mode", "diagonal")
"""Numbers that choose what an operator computes; the others are sizes, which change with the width of a network."""

_TRIVIAL = {"stride": 1, "dilation": 1, "kernel_size": 1, "padding": 0, "output_padding": 0}
"""Of these it counts only whether they do something."""


def dispatch_watch(seen: Seen) -> Any:
    """A torch mode that calls `seen(operator, args, kwargs)` for every operator, then runs it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        supports_higher_order_operators = True

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            """The operator's own result."""
            seen(func, args, kwargs or {})
            return func(*args, **(kwargs or {}))

    return Watch()  # type: ignore[no-untyped-call]


class OperatorWatch:
    """A context manager around one run of `module`; afterwards `found` says what the run was made of.

    Enter it last: a mode that is entered later would hide operators from it.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._kinds = tuple(sorted({module_kind(layer) for layer in module.modules()}))  # the module itself is not held: there may be hundreds
        self.operators: set[str] = set()
        self._mode: Any = None

    def __enter__(self) -> OperatorWatch:
        self._mode = dispatch_watch(lambda func, args, kwargs: self.operators.add(describe_call(func, args, kwargs)))
        self._mode.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._mode.__exit__(kind, error, trace)

    @property
    def found(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The operators of the run and the kinds of all modules, each sorted."""
        return tuple(sorted(self.operators)), self._kinds


def set_key(operators: Sequence[str], modules: Sequence[str]) -> str:
    """What identifies an operator set."""
    return hashlib.sha256("\n".join([*operators, "", *modules]).encode()).hexdigest()[:16]


def operator_name(token: str) -> str:
    """The operator alone: `aten.convolution` of `aten.convolution.default(float32[4], ...)`."""
    return ".".join(token.partition("(")[0].split(".")[:2])


def module_kind(layer: torch.nn.Module) -> str:
    """The class of a module; of torch's own ones with the settings that choose what is computed: `torch.nn.LSTM(bidirectional)`."""
    kind = type(layer)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if not kind.__module__.startswith("torch.nn.modules."):
        return name
    told = []
    for key, value in sorted(vars(layer).items()):
        if key.startswith("_") or key in ("training", "inplace"):
            continue
        if value is True:
            told.append(key)
        elif isinstance(value, str):
            told.append(f"{key}={value}")
        elif (key == "proj_size" and value > 0) or (key == "num_layers" and value > 1):
            told.append(key)
    short = f"torch.nn.{kind.__qualname__}"
    return f"{short}({', '.join(told)})" if told else short


def describe_call(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """One call of an operator, by what can decide whether it is converted: `aten.convolution.default(float32[4], float32[4], stride, groups=depthwise)`.

    Types and ranks of tensors count, and truth values, texts, dimensions and modes; sizes do not.
    """
    schema = getattr(func, "_schema", None)
    if schema is None:  # control flow such as torch.cond
        return str(func)
    bound = {item.name: value for item, value in _bound(schema, args, kwargs)}
    parts = [text for name, value in bound.items() for text in _argument(name, value)]
    return f"{func}({', '.join([*parts, *_shape_facts(schema.name, bound)])})"


def _bound(schema: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    for position, item in enumerate(schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(item.name, item.default_value)
        yield item, value


def _argument(name: str, value: Any) -> list[str]:
    import torch

    if isinstance(value, torch.Tensor):
        return [f"{str(value.dtype).removeprefix('torch.')}[{value.ndim}]"]
    if isinstance(value, (list, tuple)) and any(isinstance(item, torch.Tensor) for item in value):
        return sorted({text for item in value for text in _argument(name, item)})
    if isinstance(value, bool):
        return [name] if value else []
    if isinstance(value, (str, torch.dtype)):
        return [f"{name}={str(value).removeprefix('torch.')}"]
    if name in _EXACT and isinstance(value, (int, float, list, tuple)):
        return [f"{name}={value}"]
    if name in _TRIVIAL and isinstance(value, (int, list, tuple)):
        sizes = [value] if isinstance(value, int) else value
        return [] if all(size == _TRIVIAL[name] for size in sizes) else [name]
    return []


def _shape_facts(operator: str, bound: Mapping[str, Any]) -> list[str]:
    """What the sizes of some operators decide: kinds of grouping, windows of unequal size, growing or shrinking."""
    if operator == "aten::convolution" and bound["groups"] != 1:
        depthwise = bound["groups"] == bound["input"].shape[1]
        return ["groups=depthwise" if depthwise else "groups"]
    sizes = bound.get("output_size")
    if sizes is None or not hasattr(bound.get("self", bound.get("input")), "shape"):
        return []
    spatial = bound.get("self", bound.get("input")).shape[-len(sizes) :]
    if "adaptive" in operator:
        return ["uneven"] if any(have % want for have, want in zip(spatial, sizes, strict=True)) else []
    return ["shrinks"] if any(have > want for have, want in zip(spatial, sizes, strict=True)) else []
