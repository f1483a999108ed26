"""Where user code comes from: whether it can be imported again, and hashes that change when it changes."""

from __future__ import annotations

import hashlib
import inspect
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from edgekd.errors import ConfigError, ModelError, Rejected
from edgekd.identity.code_state import Walk
from edgekd.identity.code_text import is_library, source_of

if TYPE_CHECKING:
    import torch

    from edgekd.contracts import StudentSpace


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


def code_hash(function: Any, *, generators: bool = True) -> str:
    """A SHA-256 that changes when a callable, or what it depends on, changes; equal in every process.

    It covers the sources of the functions and classes of the user's own modules that it leads to, the module-level values that they read, default
    arguments, closures, the bound arguments of a `functools.partial`, and the class and state of an object. Packages count by name.
    Without `generators`, a random generator (numpy, torch, `random`) counts by its class: for an augmentation, which is given a seeded one with
    each item; one of its own that nobody seeded would give another hash in each process, and one with another seed gives the same.

    Raises:
        ConfigError: a value on the way cannot be identified (an open file, a session, an iterator), or objects lie some hundred deep; it is named.
    """
    found, hidden = examine(function, generators=generators)
    if hidden:
        raise ConfigError(
            f"{_name(function)} depends on something whose content cannot be told, so that a stored result might be taken for another's",
            found="; ".join(hidden),
            allowed="functions, classes, numbers, texts, arrays, tensors, containers and objects that copy.deepcopy can copy",
            hint="create it inside the function, or leave it out of the object's state with a __getstate__",
            subject=hidden[0],
        )
    return found


def examine(function: Any, *, generators: bool = True) -> tuple[str, tuple[str, ...]]:
    """The hash of `code_hash`, and the names of what it cannot cover, which counts by its type only."""
    kind = function if isinstance(function, (type, types.FunctionType)) else type(function)
    code = function.__func__ if isinstance(function, types.MethodType) else function
    module = str(code.__globals__.get("__name__", "") if isinstance(code, types.FunctionType) else kind.__module__)
    walk = Walk(module, generators=generators)
    text = walk.text(function, _name(function))
    if kind is function and is_library(module):  # a package's own factory: by its file
        text = hashlib.sha256((text + _file_text(function)).encode()).hexdigest()
    return text, tuple(walk.hidden)


def _name(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _file_text(function: Any) -> str:
    try:
        return Path(inspect.getfile(function)).read_text(encoding="utf-8")
    except (OSError, TypeError):
        return source_of(function)


def architecture_hash(module: torch.nn.Module, *, weights: bool = True) -> str:
    """A SHA-256 over the classes of all parts of a module, with their sources where they are the user's own and with what those read, over the
    parts' attributes, and over the names, shapes, types and (with `weights`) bytes of the tensors, registered or not.

    An object of a package's class that `copy` cannot take apart counts by its type, a random generator by its class.

    Raises:
        ModelError: a weight or an attribute cannot be read.
    """
    walk = Walk("", shallow=True, weights=weights, generators=False)
    text = walk.text(module, type(module).__name__)
    if walk.hidden:
        raise ModelError("a part of the network cannot be identified", found="; ".join(walk.hidden), hint="keep it out of the module", subject=walk.hidden[0])
    return text


def built_hash(space: StudentSpace, seed: int) -> str:
    """A hash of what a space builds, which sees a changed factory even where `source_hash` does not: the first and the last candidate, as networks.

    Initial weights count if two builds with one seed draw the same. Empty for a student that is a file.
    """
    specs = space.candidates(seed)
    if specs and specs[0].kind == "fixed-onnx":
        return ""
    found = []
    for spec in dict.fromkeys((0, len(specs) - 1)) if specs else ():
        try:
            first, again = (space.build(specs[spec], seed) for _ in range(2))
        except Rejected:
            found.append("rejected")
            continue
        with_weights = architecture_hash(first)
        found.append(with_weights if architecture_hash(again) == with_weights else architecture_hash(first, weights=False))
    return hashlib.sha256(" ".join(found).encode()).hexdigest()
