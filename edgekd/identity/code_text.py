"""The text of code, read once per class and function of a process: where it comes from, its source, and the names that it reads."""

from __future__ import annotations

import dis
import functools
import hashlib
import importlib.util
import inspect
import sys
import textwrap
import types
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

_ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD")

T = TypeVar("T")


def digest(kind: str, parts: Iterable[str]) -> str:
    """`kind:` and the SHA-256 over the parts, each with its length."""
    made = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        made.update(b"%d:" % len(data))
        made.update(data)
    return f"{kind}:{made.hexdigest()}"


def is_library(module: str) -> bool:
    """Whether a module belongs to the standard library, to an installed package or to edgekd: known by its name, not by its source.

    Code without a module's name, such as what `exec` ran, belongs to the user.
    """
    top = module.partition(".")[0]
    if module in ("", "__main__", "__mp_main__"):
        return False
    return top == "edgekd" or top in sys.stdlib_module_names or _is_installed(_file_of(module) or _file_of(top) or "")


@functools.cache
def _is_installed(file: str) -> bool:
    folders = Path(file).parts
    return "site-packages" in folders or "dist-packages" in folders


def _spec_file(module: str) -> str | None:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return None if spec is None else spec.origin or next(iter(spec.submodule_search_locations or ()), None)


def _file_of(module: str) -> str | None:
    loaded = sys.modules.get(module)
    return getattr(loaded, "__file__", None) or _spec_file(module)


def _once_each(make: Callable[[Any], T]) -> Callable[[Any], T]:
    """Remember what `make` gives for each class or code object as long as that lives. By identity: equal code may stand in two files."""
    known: dict[int, tuple[weakref.ref[Any], T]] = {}

    @functools.wraps(make)
    def found(item: Any) -> T:
        kept = known.get(id(item))
        if kept is None or kept[0]() is not item:
            kept = known[id(item)] = (weakref.ref(item), make(item))
        return kept[1]

    return found


def source_of(value: Any) -> str:
    """A class' or function's own source without its indentation, its byte code where there is no source; a class without source has none."""
    code = getattr(value, "__code__", None)
    return _source(code if isinstance(code, types.CodeType) else value)


@_once_each
def _source(item: type | types.CodeType) -> str:
    try:
        return textwrap.dedent(inspect.getsource(item))
    except (OSError, TypeError):
        return code_text(item) if isinstance(item, types.CodeType) else ""


def code_text(code: types.CodeType) -> str:
    """A hash of what code does: its instructions, constants and names, without its file and lines."""
    return digest("code", [code.co_code.hex(), *map(_constant, code.co_consts), *code.co_names])


def _constant(value: Any) -> str:
    if isinstance(value, types.CodeType):
        return code_text(value)
    if isinstance(value, (tuple, frozenset)):
        parts = [_constant(item) for item in value]
        return digest(type(value).__name__, parts if isinstance(value, tuple) else sorted(parts))
    return f"{type(value).__name__} {value!r}"


class Step(NamedTuple):
    """A module-level name that code reads with the attributes read of it; or, with `level` 0 and more, a module it imports and the names from it."""

    name: str
    parts: tuple[str, ...]
    level: int = -1


@_once_each
def steps_of(code: types.CodeType) -> tuple[Step, ...]:
    """Every module-level name that the code, or code inside it, reads, and every module that it imports, in order."""
    found: list[Step] = []
    steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
    for position, step in enumerate(steps):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and isinstance(step.argval, str):
            found.append(Step(step.argval, tuple(later.argval if later.opname in _ATTRIBUTE else "" for later in steps[position + 1 : position + 6])))
        elif step.opname == "IMPORT_NAME":
            level, wanted = (steps[back].argval for back in (position - 2, position - 1))
            found.append(Step(str(step.argval), tuple(wanted or ()), int(level or 0)))
    for item in code.co_consts:
        if isinstance(item, types.CodeType):
            found.extend(steps_of(item))
    return tuple(found)
