"""The student spaces that ship: one given student, and a family made by the user's factory over named choices."""

from __future__ import annotations

import copy
import hashlib
import inspect
import itertools
import json
import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from edgekd.errors import ConfigError, ModelError, Rejected, near_names
from edgekd.identity.provenance import architecture_hash, code_hash, describe_factory
from edgekd.models.onnx_file import file_hash
from edgekd.records import StudentSpec

if TYPE_CHECKING:
    import torch

Choice: TypeAlias = int | float | str | bool
InitHook: TypeAlias = "Callable[[torch.nn.Module, torch.nn.Module], None]"

_LISTED = 200_000
"""Up to this many members the product is walked in order; a larger one is sampled by index."""


def _is_module(value: object) -> bool:
    torch = sys.modules.get("torch")  # a module cannot exist before torch is imported
    return torch is not None and isinstance(value, torch.nn.Module)


def call_factory(factory: Callable[..., Any], kwargs: Mapping[str, Choice], seed: int) -> torch.nn.Module:
    """The module that `factory(**kwargs)` makes with torch's generator seeded by `seed`, in training mode.

    The caller's random state is left as it was.

    Raises:
        Rejected: the factory raised; the message holds its arguments.
        ModelError: it gave something other than a `torch.nn.Module`.
    """
    import torch

    shown = ", ".join(f"{name}={value!r}" for name, value in kwargs.items())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            made = factory(**kwargs)
        except Exception as error:
            raise Rejected(
                f"the student's factory refuses ({shown})",
                found=f"{type(error).__name__}: {error}",
                hint="exclude these arguments with where=, or repair the factory",
                subject=dict(kwargs),
            ) from error
    if not isinstance(made, torch.nn.Module):
        raise ModelError(
            f"the student's factory gave no torch.nn.Module for ({shown})", found=type(made).__name__, hint="return the network itself", subject=dict(kwargs)
        )
    return made.train()


class Fixed:
    """The space of one student: a `torch.nn.Module`, a factory without arguments, or the path of an ONNX file.

    With a module, every build is a copy that keeps the module's own weights. With an ONNX file there is nothing to train:
    `onnx` is the path and `kind` is `fixed-onnx`; torch is not needed. `init(student, teacher)` may copy weights from the
    teacher before training.

    Raises:
        ConfigError: `model` is none of the three.
        ModelError: the ONNX file does not exist.
    """

    def __init__(self, model: torch.nn.Module | Callable[[], torch.nn.Module] | str | Path, *, init: InitHook | None = None) -> None:
        self.init = init
        self.onnx: Path | None = None
        self._module: torch.nn.Module | None = None
        self._factory: Callable[[], torch.nn.Module] | None = None
        if isinstance(model, (str, Path)):
            self.kind = "fixed-onnx"
            self.onnx = Path(model)
            if not self.onnx.is_file():
                raise ModelError(f"{self.onnx} does not exist", hint="give the path of an ONNX file", subject=self.onnx)
            if self.onnx.suffix != ".onnx":
                raise ModelError("a fixed student on file is an ONNX file", found=self.onnx.name, allowed="*.onnx", subject=self.onnx)
        elif _is_module(model):
            self.kind = "fixed"
            self._module = model  # type: ignore[assignment]
        elif callable(model):
            self.kind = "fixed"
            self._factory = model
        else:
            raise ConfigError(
                "Fixed takes a torch.nn.Module, a factory without arguments, or the path of an ONNX file", found=type(model).__name__, hint="Fixed(net)"
            )

    def candidates(self, seed: int) -> tuple[StudentSpec, ...]:
        """The one member."""
        if self.onnx is not None:
            return (StudentSpec(kind=self.kind, factory_hash=file_hash(self.onnx), rebuildable="an ONNX file was given: there is nothing to rebuild"),)
        if self._factory is None:
            return (StudentSpec(kind=self.kind, rebuildable="a module was given, not a factory that can be imported by name"),)
        origin = describe_factory(self._factory)
        return (StudentSpec(kind=self.kind, factory=origin.name, factory_hash=origin.hash, rebuildable=origin.rebuildable),)

    def build(self, spec: StudentSpec, seed: int) -> torch.nn.Module:
        """The student in training mode: a copy of the module, or what the factory makes with torch seeded.

        Raises:
            ModelError: the student is an ONNX file, or the factory gives no module.
            Rejected: the factory raised.
        """
        if self.onnx is not None:
            raise ModelError(
                "an ONNX student cannot be trained or rebuilt",
                found=str(self.onnx),
                hint="quantize it as it is (--quantize-only), or give the student as a torch module",
                subject=self.onnx,
            )
        if self._module is not None:
            return copy.deepcopy(self._module).train()
        assert self._factory is not None
        return call_factory(self._factory, {}, seed)

    def source_hash(self) -> str:
        """A hash of the file's bytes, of the factory's source, or of the module's structure and weights."""
        if self.onnx is not None:
            return hashlib.sha256(f"fixed-onnx {file_hash(self.onnx)}".encode()).hexdigest()
        if self._factory is not None:
            own = code_hash(self._factory)
        else:
            assert self._module is not None
            own = architecture_hash(self._module)
        hook = code_hash(self.init) if self.init is not None else ""
        return hashlib.sha256(f"fixed {own} {hook}".encode()).hexdigest()


class Family:
    """The space of what `factory(**choices)` makes: `Family(make_net, width=[8, 16, 24], depth=[1, 2])`.

    `where(**kwargs)` gives False for combinations to leave out. `init(student, teacher)` may copy weights from the teacher
    before training. Choices are lists of int, float, str or bool. A space of more than `max_candidates` members is
    sampled by seed, and `note` says so in the ledger.

    Raises:
        ConfigError: no choices, an empty or repeated choice, a value of another type, or a name that the factory does not take.
    """

    kind = "family"

    def __init__(
        self,
        factory: Callable[..., torch.nn.Module],
        *,
        init: InitHook | None = None,
        where: Callable[..., bool] | None = None,
        max_candidates: int = 512,
        **choices: Sequence[Choice],
    ) -> None:
        if not callable(factory) or _is_module(factory):
            raise ConfigError("Family needs a factory that makes a module", found=type(factory).__name__, hint="Family(make_net, width=[8, 16]), or Fixed(net)")
        if not choices:
            raise ConfigError("Family needs at least one choice", hint="Family(make_net, width=[8, 16]); use Fixed(make_net) for a single student")
        if max_candidates < 1:
            raise ConfigError("max_candidates must be positive", found=max_candidates)
        self.factory = factory
        self.init = init
        self.where = where
        self.max_candidates = max_candidates
        self.choices: dict[str, tuple[Choice, ...]] = {name: _check_choice(name, values) for name, values in choices.items()}
        _check_signature(factory, self.choices)

    @property
    def size(self) -> int:
        """The number of combinations before `where` is asked."""
        return math.prod(len(values) for values in self.choices.values())

    def _at(self, index: int) -> dict[str, Choice]:
        picked: dict[str, Choice] = {}
        for name in reversed(self.choices):
            index, position = divmod(index, len(self.choices[name]))
            picked[name] = self.choices[name][position]
        return {name: picked[name] for name in self.choices}

    def _allowed(self, kwargs: dict[str, Choice]) -> bool:
        return self.where is None or bool(self.where(**kwargs))

    def _corners(self) -> Iterator[dict[str, Choice]]:
        ordered = {name: values if any(isinstance(v, str) for v in values) else sorted(values, key=float) for name, values in self.choices.items()}
        yield {name: values[0] for name, values in ordered.items()}
        yield {name: values[-1] for name, values in ordered.items()}

    def _members(self, seed: int) -> tuple[list[dict[str, Choice]], bool]:
        """The members that `candidates` gives, and whether they are a sample."""
        limit = self.max_candidates
        if self.size <= _LISTED:
            members = [kwargs for kwargs in map(self._at, range(self.size)) if self._allowed(kwargs)]
            if len(members) <= limit:
                return members, False
            chosen = set(random.Random(seed).sample(range(len(members)), limit))
            kept = [kwargs for position, kwargs in enumerate(members) if position in chosen]
        else:
            tries = random.Random(seed).sample(range(self.size), min(self.size, max(20 * limit, 10_000)))
            good = itertools.islice((index for index in tries if self._allowed(self._at(index))), limit)
            kept = [self._at(index) for index in sorted(good)]
        corners = [kwargs for kwargs in self._corners() if self._allowed(kwargs) and kwargs not in kept]
        return corners + kept[: max(0, limit - len(corners))], True

    def candidates(self, seed: int) -> tuple[StudentSpec, ...]:
        """Every member in the order of the choices, or a seeded sample of at most `max_candidates`.

        A sample holds the smallest and the largest combination where they are allowed.

        Raises:
            ConfigError: `where` leaves nothing.
        """
        members, _ = self._members(seed)
        if not members:
            raise ConfigError("where= excludes every combination of the choices", found=f"{self.size} combinations", hint="relax where=, or widen the choices")
        origin = describe_factory(self.factory)
        return tuple(
            StudentSpec(kind=self.kind, factory=origin.name, factory_hash=origin.hash, rebuildable=origin.rebuildable, kwargs=kwargs) for kwargs in members
        )

    def note(self, seed: int) -> str:
        """What `candidates` leaves out: `512 of 8100 combinations, sampled with seed 0: ...`; empty where it is nothing or only what `where` excludes."""
        members, sampled = self._members(seed)
        return "" if not sampled else f"{len(members)} of {self.size} combinations, sampled with seed {seed}: raise max_candidates to try more"

    def build(self, spec: StudentSpec, seed: int) -> torch.nn.Module:
        """The candidate with torch-seeded initial weights, in training mode.

        Raises:
            Rejected: the factory refuses these arguments.
            ModelError: the factory gives no module.
        """
        return call_factory(self.factory, spec.kwargs, seed)

    def source_hash(self) -> str:
        """A hash of the sources of factory, `where` and `init`, and of the choices."""
        parts = [code_hash(function) if function is not None else "" for function in (self.factory, self.where, self.init)]
        text = json.dumps({"parts": parts, "choices": self.choices, "max": self.max_candidates}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _check_choice(name: str, values: Sequence[Choice]) -> tuple[Choice, ...]:
    if isinstance(values, (str, bytes)) or not isinstance(values, (Sequence, range)):
        raise ConfigError(f"the choice {name!r} must be a list of values", found=repr(values)[:80], hint=f"{name}=[8, 16, 24]", subject=name)
    if not values:
        raise ConfigError(f"the choice {name!r} is empty", hint="give at least one value", subject=name)
    for value in values:
        if type(value) not in (int, float, str, bool) or (isinstance(value, float) and not math.isfinite(value)):
            raise ConfigError(
                f"the choice {name!r} holds a value that cannot be stored as JSON",
                found=f"{value!r} ({type(value).__name__})",
                allowed="int, finite float, str, bool",
                hint="name the variant by a string and let the factory look it up",
                subject=name,
            )
    if len({(type(value), value) for value in values}) != len(values):
        raise ConfigError(f"the choice {name!r} repeats a value", found=list(values), subject=name)
    return tuple(values)


def _check_signature(factory: Callable[..., Any], choices: Mapping[str, Sequence[Choice]]) -> None:
    try:
        parameters = inspect.signature(factory).parameters
    except (ValueError, TypeError):
        return  # some callables written in C have no signature; building them tells
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        known = set(parameters) | set(choices)
    else:
        known = {name for name, parameter in parameters.items() if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)}
    for name in choices:
        if name not in known:
            raise ConfigError(f"the factory takes no argument {name!r}", found=name, allowed=near_names(name, known), subject=name)
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    missing = [name for name, p in parameters.items() if p.default is p.empty and p.kind not in kinds and name not in choices]
    if missing:
        raise ConfigError(
            "the factory needs arguments that are no choice", found=", ".join(missing), hint=f"add {missing[0]}=[...], or give it a default", subject=missing[0]
        )
