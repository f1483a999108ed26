"""What a callable depends on, as text that is equal in every process: sources, the values that it reads, the state of objects."""

from __future__ import annotations

import builtins
import copyreg
import dis
import enum
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
import textwrap
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

_ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD")
_REFUSED = (TypeError, ValueError, AttributeError, RuntimeError)
"""What an object raises that cannot be taken apart."""
_PLAIN = (type(None), type(...), type(NotImplemented), bool, int, float, complex, str, bytes)
_MADE_IN_PYTHON = 1 << 9  # Py_TPFLAGS_HEAPTYPE
_SLOTS = (types.MemberDescriptorType, types.GetSetDescriptorType)


def digest(kind: str, parts: Iterable[str]) -> str:
    """`kind:` and the SHA-256 over the parts, each with its length."""
    made = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        made.update(b"%d:" % len(data))
        made.update(data)
    return f"{kind}:{made.hexdigest()}"


def is_library(module: str) -> bool:
    """Whether a module belongs to the standard library, to an installed package or to edgekd: known by its name, not by its source."""
    top = module.partition(".")[0]
    if module in ("__main__", "__mp_main__"):
        return False
    if top in ("", "edgekd") or top in sys.stdlib_module_names:
        return True
    folders = Path(_file_of(module) or _file_of(top) or "").parts
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


def source_of(value: Any) -> str:
    """A class' or function's own source without its indentation, its byte code where there is no source; a class without source has none."""
    code = getattr(value, "__code__", None)
    try:
        return textwrap.dedent(inspect.getsource(code if code is not None else value))
    except (OSError, TypeError):
        return _code_text(code) if code is not None else ""


def _code_text(code: types.CodeType) -> str:
    constants = [_code_text(item) if isinstance(item, types.CodeType) else Walk("").token(item) for item in code.co_consts]
    return digest("code", [code.co_code.hex(), *constants, *code.co_names])


class Walk:
    """One walk from a callable over all that it depends on. `home` is the module of the callable, whose name is no part of the text.

    Functions and classes of the user's own modules count with their source, and with the module-level names that they read: functions, classes,
    values. Objects count with their class and their state, as they tell it to `copy` and `pickle` (`__reduce_ex__`, `__getstate__`); nothing
    is pickled. Libraries count by name. `hidden` names what cannot be told: its token is its type.

    With `shallow`, tensors that are not part of a module's state and objects of library classes count by their type. Without `weights`, the bytes
    of a module's parameters and buffers do not count.
    """

    def __init__(self, home: str, *, shallow: bool = False, weights: bool = True) -> None:
        self.hidden: list[str] = []
        self._home = home
        self._shallow = shallow
        self._weights = weights
        self._names: dict[tuple[int, str], str] = {}
        self._known: dict[int, tuple[Any, str]] = {}
        self._open: set[int] = set()
        self._path: list[str] = []

    def text(self, root: Any, name: str) -> str:
        """The SHA-256 over `root` and everything that was met on the way, 64 hexadecimal digits."""
        found = self._at(name, root)
        return digest("walk", [found, *sorted(self._names.values())]).partition(":")[2]

    def _at(self, name: str, value: Any) -> str:
        self._path.append(name)
        try:
            return self.token(value)
        finally:
            self._path.pop()

    def token(self, value: Any) -> str:
        """The text of one value. What was met before has the text it had; a value inside itself counts as a cycle of its type."""
        if type(value) in _PLAIN:
            return f"{type(value).__name__} {value!r}"
        known = self._known.get(id(value))
        if known is not None:
            return known[1]
        if id(value) in self._open:
            return f"cycle {type(value).__qualname__}"
        self._open.add(id(value))
        try:
            made = self._made(value)
        finally:
            self._open.discard(id(value))
        self._known[id(value)] = (value, made)  # the value is kept alive: its id stays its own
        return made

    def _made(self, value: Any) -> str:
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.MethodType):
            return digest("method", [self._at(value.__name__, value.__self__), self.token(value.__func__)])
        if isinstance(value, types.ModuleType):
            return self._module(value)
        if type(value) in (list, tuple):
            return digest(type(value).__name__, (self._at(f"[{position}]", item) for position, item in enumerate(value)))
        if type(value) is dict or isinstance(value, types.MappingProxyType):
            return digest("dict", self._items(value.items()))
        if type(value) in (set, frozenset):
            return digest("set", sorted(self.token(item) for item in value))
        if isinstance(value, (staticmethod, classmethod)):
            return digest(type(value).__name__, [self.token(value.__func__)])
        if isinstance(value, property):
            return digest("property", [self.token(part) for part in (value.fget, value.fset, value.fdel)])
        if isinstance(value, (np.ndarray, np.generic)) and value.dtype.hasobject:
            return digest("array", [str(value.shape), self.token(value.tolist())])
        if isinstance(value, (np.ndarray, np.generic)):
            data = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
            return f"array {value.dtype.descr if value.dtype.fields else value.dtype.str} {value.shape} {data}"
        torch = sys.modules.get("torch")  # nothing is a tensor before torch is imported
        if torch is not None and isinstance(value, torch.Tensor):
            return "tensor" if self._shallow else self._tensor(value)
        if torch is not None and isinstance(value, torch.nn.Module):
            return self._network(value)
        return self._object(value)

    def _items(self, items: Iterable[tuple[Any, Any]]) -> Iterator[str]:
        for key, value in items:
            yield self.token(key)
            yield self._at(f"[{key!r}]" if isinstance(key, (str, int)) else "[...]", value)

    def _hide(self, what: str) -> str:
        self.hidden.append(f"{''.join(part if part.startswith(('.', '[')) else f' {part}' for part in self._path).strip()} ({what})")
        return f"hidden {what}"

    def _label(self, module: str) -> str:
        return "" if module == self._home else module

    # ------------------------------------------------------------------------------------------ code

    def _function(self, function: types.FunctionType) -> str:
        module = str(function.__globals__.get("__name__", ""))
        parts = [f"{self._label(module)}:{function.__qualname__}"]
        if is_library(module) and hasattr(function, "__wrapped__"):  # a library's decorator; its arguments stand in the source it decorates
            return digest("function", [*parts, self.token(function.__wrapped__)])
        if not is_library(module):
            parts.append(source_of(function))
            if function.__name__ == "<lambda>":
                parts.append(_code_text(function.__code__))  # one line may hold several
            parts.extend(self._items(sorted((name, value) for name, value in vars(function).items() if name != "__wrapped__")))
            self._reads(function.__code__, function.__globals__)
        parts.append(self.token(function.__defaults__))
        parts.append(self.token(function.__kwdefaults__))
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if name != "__class__":
                parts += [name, self._cell(name, cell)]
        return digest("function", parts)

    def _cell(self, name: str, cell: types.CellType) -> str:
        try:
            return self._at(name, cell.cell_contents)
        except ValueError:
            return "empty"

    def _class(self, cls: type) -> str:
        name = f"{self._label(cls.__module__)}:{cls.__qualname__}"
        if is_library(cls.__module__) or not cls.__flags__ & _MADE_IN_PYTHON:
            return f"class {name}"
        parts = [name, source_of(cls), *(self.token(base) for base in cls.__bases__)]
        members = vars(cls).items() if not issubclass(cls, enum.Enum) else ()  # an enumeration's members stand in its source
        for key, value in sorted(members, key=lambda item: item[0]):
            code = getattr(value, "__code__", None)
            made_by_library = code is not None and code.co_filename.startswith("<") and bool(parts[1])  # a dataclass' methods: its source tells
            hidden_name = key.startswith("_") and key.endswith("_") and code is None
            if not (made_by_library or hidden_name or key == "_abc_impl" or isinstance(value, _SLOTS)):
                parts += [key, self._at(f".{key}", value)]
        return digest("class", parts)

    def _reads(self, code: types.CodeType, space: Mapping[str, Any]) -> None:
        """Note every module-level name that the code, or code inside it, reads; and what it imports from the user's own modules."""
        steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
        for position, step in enumerate(steps):
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and isinstance(step.argval, str):
                self._read(space, step.argval, [later.argval if later.opname in _ATTRIBUTE else "" for later in steps[position + 1 : position + 6]])
            elif step.opname == "IMPORT_NAME":
                level, wanted = (steps[back].argval for back in (position - 2, position - 1))
                self._imports(str(step.argval), int(level or 0), wanted, space)
        for item in code.co_consts:
            if isinstance(item, types.CodeType):
                self._reads(item, space)

    def _read(self, space: Mapping[str, Any], name: str, attributes: list[str]) -> None:
        """Note one name of a module; of the user's own modules only the attribute that is read of them."""
        if name.startswith("__") or (name not in space and hasattr(builtins, name)):
            return
        value = space.get(name)
        if isinstance(value, types.ModuleType) and attributes and attributes[0] and not is_library(value.__name__):
            self._read(vars(value), attributes[0], attributes[1:])
            return
        key = (id(space), name)
        if key not in self._names:
            label = f"{self._label(str(space.get('__name__', '')))}.{name}"
            self._names[key] = label
            outer, self._path = self._path, [*self._path[:1], name]
            self._names[key] = f"{label} = {self.token(value) if name in space else 'absent'}"
            self._path = outer

    def _imports(self, name: str, level: int, wanted: Any, space: Mapping[str, Any]) -> None:
        package = str(space.get("__package__") or "")
        full = importlib.util.resolve_name("." * level + name, package) if level and package else name
        if is_library(full):
            return
        try:
            module = importlib.import_module(full)
        except ImportError:
            return
        for part in wanted or ():
            if part in vars(module):
                self._read(vars(module), part, [])
            else:
                self._imports(f"{full}.{part}", 0, None, space)
        if not wanted or "*" in wanted:
            self.token(module)

    def _module(self, module: types.ModuleType) -> str:
        """A module by its name; all that is in it is noted if it is the user's own and used as a whole."""
        if not is_library(module.__name__):
            for name in sorted(vars(module)):
                self._read(vars(module), name, [])
        return f"module {self._label(module.__name__)}"

    # ------------------------------------------------------------------------------------------ state

    def _object(self, value: Any) -> str:
        cls = type(value)
        shown = f"{cls.__module__}.{cls.__qualname__}"
        if isinstance(value, types.BuiltinFunctionType) and isinstance(value.__self__, (types.ModuleType, type, type(None))):
            return f"builtin {value.__module__}.{value.__qualname__}"
        if shown in ("_thread.lock", "_thread.RLock"):
            return f"lock {shown}"  # it holds nothing that a result could depend on
        if hasattr(value, "__wrapped__"):  # functools.cache and its like
            return digest(shown, [self.token(value.__wrapped__)])
        if self._shallow and is_library(cls.__module__) and not isinstance(value, functools.partial) and shown != "torch.dtype":
            return f"object {shown}"
        try:
            registered = copyreg.dispatch_table.get(cls)
            reduced = registered(value) if registered is not None else value.__reduce_ex__(4)
        except _REFUSED:
            return self._hide(shown)
        if isinstance(reduced, str):
            return f"global {shown} {reduced}"
        made, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
        parts = [self.token(cls), self.token(made), *(self._at(f"({position})", item) for position, item in enumerate(arguments))]
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict) and all(isinstance(key, str) for key in part):
                for key in sorted(part):
                    parts += [key, self._at(f".{key}", part[key])]
            else:
                parts.append(self.token(part))
        parts.extend(self._at(f"[{position}]", item) for position, item in enumerate(items or ()))
        parts.extend(self._items(pairs or ()))
        return digest("object", parts)

    def _tensor(self, tensor: Any) -> str:
        import torch

        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type == "meta":
            return self._hide(f"a {tensor.layout} tensor on {tensor.device}")
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"tensor {tuple(tensor.shape)} {tensor.dtype} {hashlib.sha256(data).hexdigest()}"

    def _network(self, module: Any) -> str:
        """A torch module: the classes and attributes of all its parts, and names, shapes, types and (with `weights`) bytes of its tensors."""
        import torch

        own = vars(torch.nn.Module()).keys()
        parts: list[str] = []
        for name, part in module.named_modules():
            parts += [name, self.token(type(part))]
            for key in sorted(vars(part).keys() - own):
                if not (isinstance(vars(part)[key], dict) and is_library(type(part).__module__)):  # what torch notes on a graph, places in files among it
                    parts += [key, self._at(f".{name}.{key}" if name else f".{key}", vars(part)[key])]
        tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
        for name, tensor in tensors.items():
            parts += [name, self._tensor(tensor) if self._weights else f"{tuple(tensor.shape)} {tensor.dtype}"]
        return digest("network", parts)
