"""What a callable depends on, as text that is equal in every process: sources, the values that it reads, the state of objects."""

from __future__ import annotations

import builtins
import copyreg
import enum
import hashlib
import importlib
import importlib.util
import pickle
import random
import re
import sys
import types
import typing
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from edgekd.identity.code_text import code_text, digest, is_library, source_of, steps_of

_REFUSED = (TypeError, ValueError, AttributeError, RuntimeError, pickle.PickleError)
"""What an object raises that cannot be taken apart."""
_PLAIN = (type(None), type(...), type(NotImplemented), bool, int, float, complex, str, bytes)
_MADE_IN_PYTHON = 1 << 9  # Py_TPFLAGS_HEAPTYPE
_SLOTS = (types.MemberDescriptorType, types.GetSetDescriptorType)
_GENERATORS = (np.random.Generator, np.random.RandomState, np.random.BitGenerator, random.Random)
_NOTES = ("torch.fx.", "torch.export.", "torch._")
"""Where torch keeps what it notes on a graph: places in files, links between nodes. The graph's code is another attribute."""
_SCRIPTED = {"_c", "_concrete_type", "_initializing", "forward"}
"""What a scripted module holds beside its code and its state."""
_PLACES = re.compile(r"(?m) # .*$| object at 0x[0-9a-f]+|___torch_mangle_\d+\.?")
"""What differs in the text of equal scripts."""


class Walk:
    """One walk from a callable over all that it depends on. `home` is the module of the callable, whose name is no part of the text.

    Functions and classes of the user's own modules count with their source, and with the module-level names that they read: functions, classes,
    values. Objects count with their class and their state, as they tell it to `copy` and `pickle` (`__reduce_ex__`, `__getstate__`); nothing
    is pickled. Libraries count by name. `hidden` names what cannot be told: its token is its type.

    With `shallow`, objects of library classes that cannot be taken apart count by their type. Without `weights`, tensors count by shape and type.
    Without `generators`, random generators count by their class.
    """

    def __init__(self, home: str, *, shallow: bool = False, weights: bool = True, generators: bool = True) -> None:
        self.hidden: list[str] = []
        self._home = home
        self._shallow = shallow
        self._weights = weights
        self._generators = generators
        self._names: dict[tuple[int, str], str] = {}
        self._waiting: deque[tuple[tuple[int, str], Mapping[str, Any], list[str]]] = deque()
        self._known: dict[int, tuple[Any, str]] = {}
        self._open: set[int] = set()
        self._path: list[str] = []

    def text(self, root: Any, name: str) -> str:
        """The SHA-256 over `root` and everything that was met on the way, 64 hexadecimal digits."""
        try:
            found = self._at(name, root)
            while self._waiting:
                key, space, self._path = self._waiting.popleft()
                self._names[key] += f" = {self.token(space[key[1]]) if key[1] in space else 'absent'}"
        except RecursionError:
            self.hidden.append(f"{name} (objects that lie too deep in each other)")
            found = ""
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
        if isinstance(value, types.CodeType):
            return code_text(value)
        if isinstance(value, typing.ForwardRef):
            return f"reference {value.__forward_arg__}"
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
            return self._tensor(value, plain=True)
        if torch is not None and isinstance(value, torch.jit.ScriptFunction):
            return self._script(value)
        if not self._generators and isinstance(value, _GENERATORS if torch is None else (*_GENERATORS, torch.Generator)):
            return f"generator {type(value).__qualname__}"
        if torch is not None and isinstance(value, torch.nn.Module):
            return self._network(value)
        return self._object(value)

    def _items(self, items: Iterable[tuple[Any, Any]]) -> Iterator[str]:
        for key, value in list(items):
            yield self.token(key)
            yield self._at(f"[{key!r}]" if isinstance(key, (str, int)) else "[...]", value)

    def _hide(self, what: str, library: bool = False) -> str:
        if self._shallow and library:
            return f"object {what}"
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
                parts.append(code_text(function.__code__))  # one line may hold several
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
            held = cell.cell_contents
        except ValueError:
            return "empty"
        return self._at(name, held)

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
        """Note every module-level name that the code reads, and what it imports from the user's own modules."""
        for step in steps_of(code):
            if step.level < 0:
                self._read(space, step.name, list(step.parts))
            else:
                self._imports(step.name, step.level, step.parts, space)

    def _read(self, space: Mapping[str, Any], name: str, attributes: list[str]) -> None:
        """Note one name of a module; of the user's own modules only the attribute that is read of them."""
        if name.startswith("__") or (name not in space and hasattr(builtins, name)):
            return
        value = space.get(name)
        if isinstance(value, types.ModuleType) and attributes and attributes[0] and not is_library(value.__name__):
            self._read(vars(value), attributes[0], attributes[1:])
            return
        key = (id(space), name)
        if key not in self._names:  # its value is read later: a chain of functions is as long as it likes
            self._names[key] = f"{self._label(str(space.get('__name__', '')))}.{name}"
            self._waiting.append((key, space, [*self._path[:1], name]))

    def _imports(self, name: str, level: int, wanted: Iterable[str], space: Mapping[str, Any]) -> None:
        package = str(space.get("__package__") or "")
        full = importlib.util.resolve_name("." * level + name, package) if level and package else name
        if not full or is_library(full):
            return
        try:
            module = importlib.import_module(full)
        except ImportError:
            return
        for part in wanted:
            if part in vars(module):
                self._read(vars(module), part, [])
            else:
                self._imports(f"{full}.{part}", 0, (), space)
        if not wanted or "*" in wanted:
            self.token(module)

    def _module(self, module: types.ModuleType) -> str:
        """A module by its name; all that is in it is noted if it is the user's own and used as a whole. The script that is run is not: it goes on changing."""
        if not is_library(module.__name__) and module.__name__ not in ("__main__", "__mp_main__"):
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
        library = is_library(cls.__module__)
        if library and ("__wrapped__" in getattr(value, "__dict__", ()) or any("__wrapped__" in vars(base) for base in cls.__mro__)):
            return digest(shown, [self.token(value.__wrapped__)])  # functools.cache and its like
        if self._shallow and cls.__module__.startswith(_NOTES):
            return f"object {shown}"
        try:
            registered = copyreg.dispatch_table.get(cls)
            reduced = registered(value) if registered is not None else value.__reduce_ex__(4)
        except RecursionError:
            raise
        except _REFUSED:
            return self._container(value) if isinstance(value, (dict, list, tuple, set, frozenset)) else self._hide(shown, library)
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

    def _container(self, value: Any) -> str:
        """A container of the user's own class that cannot be taken apart, such as a dictionary that gives `None` for every attribute."""
        kind = next(base for base in (dict, list, tuple, set, frozenset) if isinstance(value, base))
        held = dict(object.__getattribute__(value, "__dict__")) if type(value).__dictoffset__ else {}
        content = dict(dict.items(value)) if kind is dict else kind(kind.__iter__(value))
        return digest("container", [self.token(type(value)), self.token(content), self.token(held)])

    def _tensor(self, tensor: Any, plain: bool = False) -> str:
        import torch

        if not self._weights:
            return f"tensor {tuple(tensor.shape)} {tensor.dtype}"
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type == "meta":
            return self._hide(f"a {tensor.layout} tensor on {tensor.device}", plain)
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"tensor {tuple(tensor.shape)} {tensor.dtype} {hashlib.sha256(data).hexdigest()}"

    def _network(self, module: Any) -> str:
        """A torch module: the classes and attributes of all its parts, and names, shapes, types and (with `weights`) bytes of its tensors."""
        import torch

        own = vars(torch.nn.Module()).keys()
        parts: list[str] = []
        for name, part in module.named_modules():
            parts += [name, self.token(type(part))]
            kept = vars(part).keys() - own
            if isinstance(part, torch.jit.ScriptModule):
                parts.append(_PLACES.sub("", part._c.dump_to_str(True, self._weights, False)))
                kept -= _SCRIPTED
            for key in sorted(kept):
                if not (isinstance(vars(part)[key], dict) and type(part).__module__.startswith(_NOTES)):
                    parts += [key, self._at(f".{name}.{key}" if name else f".{key}", vars(part)[key])]
        tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
        for name, tensor in tensors.items():
            parts += [name, self._tensor(tensor)]
        return digest("network", parts)

    def _script(self, function: Any) -> str:
        """A scripted function: its graph with all that it calls, and the tensors in it."""
        graph = function.inlined_graph
        constants = [node for node in graph.findAllNodes("prim::Constant") if node.hasAttribute("value") and node.kindOf("value") == "t"]
        return digest("script", [_PLACES.sub("", str(graph)), *(self._tensor(node.t("value")) for node in constants)])
