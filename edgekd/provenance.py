"""Where user code comes from: whether it can be imported again, and hashes that change when it changes."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import sys
import textwrap
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from edgekd.errors import InputError

if TYPE_CHECKING:
    import torch


class Origin(NamedTuple):
    """A callable's `module:qualname` (empty if it has none), the hash of its source, and `yes` or why it cannot be imported."""

    name: str
    hash: str
    rebuildable: str


def describe_factory(factory: Callable[..., Any]) -> Origin:
    """How a factory is found again: by name, if the name leads back to it."""
    digest = code_hash(factory)
    qualname = getattr(factory, "__qualname__", "")
    module = getattr(factory, "__module__", "")
    if not qualname or not module:
        return Origin("", digest, f"the factory is a {type(factory).__name__} without a name of its own")
    if "<lambda>" in qualname:
        return Origin("", digest, "the factory is a lambda")
    if "<locals>" in qualname:
        return Origin("", digest, f"the factory {qualname.rsplit('.', 1)[-1]} is defined inside a function")
    if module == "__main__":
        return Origin("", digest, "the factory is defined in the script that is run (__main__); move it to a module of its own")
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    if found is not factory:
        return Origin("", digest, f"{module}:{qualname} is no longer this factory (it was wrapped or replaced)")
    return Origin(f"{module}:{qualname}", digest, "yes")


def import_factory(name: str) -> Callable[..., Any]:
    """The callable at `module:qualname`.

    Raises:
        InputError: the module cannot be imported, or it has no such attribute.
    """
    module_name, _, qualname = name.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(
            f"the student's factory {name} cannot be imported", found=str(error), hint="run from the folder that holds the module, or install it", subject=name
        ) from error
    for part in qualname.split("."):
        if not hasattr(found, part):
            raise InputError(f"the module {module_name} has no {qualname}", hint="restore the factory under the name that was recorded", subject=name)
        found = getattr(found, part)
    if not callable(found):
        raise InputError(f"{name} is no factory", found=type(found).__name__, subject=name)
    return found  # type: ignore[no-any-return]


def code_hash(function: Callable[..., Any]) -> str:
    """A SHA-256 that changes when the callable changes.

    A function: its own source and, through the names it uses, the functions, classes and plain constants of the same
    module. A class: its module's whole file. A callable without source: its byte code.
    """
    target: Any = getattr(function, "func", function)  # functools.partial
    parts: list[str] = []
    if target is not function:
        bound = {"args": list(function.args), "kwargs": dict(function.keywords)}  # type: ignore[attr-defined]
        parts.append(json.dumps(bound, sort_keys=True, default=lambda value: getattr(value, "__qualname__", type(value).__name__)))
    if not inspect.isroutine(target) and not inspect.isclass(target):
        target = type(target)
    if inspect.isclass(target):
        parts.append(_class_text(target))
    else:
        _collect(inspect.unwrap(target), set(), parts)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _class_text(cls: type) -> str:
    try:
        return Path(inspect.getfile(cls)).read_text(encoding="utf-8") + cls.__qualname__
    except (OSError, TypeError):
        return "".join(_code_text(value.__code__) for value in vars(cls).values() if isinstance(value, types.FunctionType)) + cls.__qualname__


def _source(value: Any) -> str:
    try:
        return textwrap.dedent(inspect.getsource(value))
    except (OSError, TypeError):
        code = getattr(value, "__code__", None)
        return _code_text(code) if code is not None else f"{value.__module__}.{value.__qualname__}"


def _code_text(code: types.CodeType) -> str:
    constants = [_code_text(item) if isinstance(item, types.CodeType) else item for item in code.co_consts]
    plain = [item for item in constants if isinstance(item, (int, float, str, bool))]
    return f"{code.co_code.hex()} {json.dumps(plain)} {' '.join(code.co_names)}"


def _names(code: types.CodeType) -> set[str]:
    found = set(code.co_names) | set(code.co_freevars)
    for item in code.co_consts:
        if isinstance(item, types.CodeType):
            found |= _names(item)
    return found


def _collect(value: Any, seen: set[str], parts: list[str]) -> None:
    """Append the source of `value`, then of what it uses from its own module, each once, in the order of names."""
    seen.add(value.__qualname__)
    parts.append(_source(value))
    functions = [item for item in vars(value).values() if isinstance(item, types.FunctionType)] if inspect.isclass(value) else [value]
    module = sys.modules.get(value.__module__)
    namespace = dict(getattr(value, "__globals__", None) or (vars(module) if module is not None else {}))
    if isinstance(value, types.FunctionType):
        namespace |= inspect.getclosurevars(value).nonlocals
    names: set[str] = {base.__qualname__ for base in value.__mro__[1:] if base.__module__ == value.__module__} if inspect.isclass(value) else set()
    for function in functions:
        code = getattr(function, "__code__", None)
        names |= _names(code) if code is not None else set()
    for name in sorted(names):
        used = namespace.get(name)
        if isinstance(used, (types.FunctionType, type)):
            if used.__module__ == value.__module__ and used.__qualname__ not in seen:
                _collect(used, seen, parts)
        elif isinstance(used, (int, float, str, bool)):
            parts.append(f"{name}={json.dumps(used)}")


def architecture_hash(module: torch.nn.Module) -> str:
    """A SHA-256 over a module's classes, plain attributes, user sources and the bytes of its weights."""
    import torch

    digest = hashlib.sha256()
    for name, part in module.named_modules():
        cls = type(part)
        plain = {key: value for key, value in sorted(vars(part).items()) if isinstance(value, (int, float, str, bool, tuple)) and key != "training"}
        shown = json.dumps(plain, sort_keys=True, default=lambda value: type(value).__name__)
        digest.update(f"{name} {cls.__module__}.{cls.__qualname__} {shown}\0".encode())
        if cls.__module__.partition(".")[0] != "torch":
            digest.update(_class_text(cls).encode())
    for name, tensor in module.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\0".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
