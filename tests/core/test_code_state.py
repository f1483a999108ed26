"""State that a hash must see, wherever it is kept: in plain tensors, in packages' objects, behind `__wrapped__`, in scripts, at the end of long chains."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import subprocess
import sys
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekd.data import Arrays, make_split
from edgekd.errors import ConfigError
from edgekd.identity.code_text import source_of, steps_of
from edgekd.identity.provenance import code_hash
from edgekd.tasks import Classification, MultiTask


class Dotted(dict):  # type: ignore[type-arg]
    """A dictionary that has every attribute."""

    __getattr__ = dict.get


class Decorated:
    """A decorator of the user's own."""

    def __init__(self, function: Callable[..., Any], times: int) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.times = times

    def __call__(self, *values: Any) -> Any:
        return [self.function(*values) for _ in range(self.times)]


def plain(x: Any) -> Any:
    return x


@functools.cache
def kept(x: Any) -> Any:
    return x


def reading(value: Any) -> Callable[[], Any]:
    return lambda: value


@pytest.mark.parametrize(
    "make",
    [
        lambda n: Dotted(width=n),
        lambda n: Decorated(plain, n),
        lambda n: compile(f"{n} + x", "typed in", "eval"),
        lambda n: typing.ForwardRef(f"Net{n}"),
        lambda n: list[f"Net{n}"],  # type: ignore[misc]
        lambda n: functools.lru_cache(Decorated(plain, n)),
    ],
    ids=["dictionary", "decorator", "code", "reference", "generic", "cached"],
)
def test_state_of_unusual_objects_counts(make: Callable[[int], Any]) -> None:
    first, again, other = (code_hash(reading(make(n))) for n in (1, 1, 2))
    assert first == again != other


def test_a_librarys_cache_counts_as_what_it_wraps() -> None:
    used = code_hash(kept)
    kept(1)
    assert code_hash(kept) == used


def test_functions_that_exec_made_count_though_they_name_no_module() -> None:
    made = []
    for text in ("def f(x):\n    return A", "def f(x):\n    return A + 1"):
        for value in (1, 2):
            space: dict[str, Any] = {"A": value}
            exec(text, space)
            made.append(code_hash(space["f"]))
    assert len(set(made)) == 4


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    lines = [f"def f{n}(x):\n    return f{n + 1}(x)\n" for n in range(600)]
    (tmp_path / "cs_chain.py").write_text("".join(lines) + "def f600(x):\n    return x * LAST\n\nLAST = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "cs_chain", raising=False)
    return __import__("cs_chain")


def test_long_chains_of_functions_are_followed_to_the_end(chain: Any) -> None:
    before = code_hash(chain.f0)
    chain.LAST = 2
    assert code_hash(chain.f0) != before


def test_objects_that_lie_too_deep_are_refused_by_name() -> None:
    deep: Any = None
    for _ in range(2000):
        deep = Dotted(inner=deep)
    with pytest.raises(ConfigError, match="too deep in each other"):
        code_hash(reading(deep))


def test_source_is_read_once_per_code_object_and_steps_are_those_of_the_code() -> None:
    assert source_of(plain) is source_of(plain)
    assert "def plain" in source_of(plain)
    assert steps_of(plain.__code__) == ()
    assert [step.name for step in steps_of(source_of.__code__)] == ["getattr", "_source", "isinstance", "types"]


class Noise:
    """An augmentation that brings a generator of its own."""

    def __init__(self, generator: Any, width: int = 1) -> None:
        self.generator = generator
        self.width = width

    def __call__(self, x: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        return x


@pytest.mark.parametrize("make", [np.random.default_rng, np.random.RandomState, random.Random])
def test_unseeded_generator_of_an_augmentation_does_not_make_another_split(make: Callable[[], Any]) -> None:
    data = Arrays(np.zeros((4, 3), dtype=np.float32), np.zeros(4, dtype=np.int64))

    def fingerprint(noise: Noise) -> str:
        return make_split(data, Classification(), name="train", augment=noise).fingerprint()

    assert fingerprint(Noise(make())) == fingerprint(Noise(make())) != fingerprint(Noise(make(), width=2))
    assert code_hash(Noise(np.random.default_rng(0))) != code_hash(Noise(np.random.default_rng(1)))


def test_a_task_that_was_used_is_still_the_same_task() -> None:
    for task, name in ((Classification(), "output"), (MultiTask({"mask": Classification()}), "mask")):
        new = code_hash(task)
        labels: Any = np.zeros((2, 5), dtype=np.int64)
        task.check({name: np.zeros((2, 3, 5), dtype=np.float32)}, {name: labels} if isinstance(task, MultiTask) else labels)
        assert code_hash(task) == new


def asks_for_the_script() -> Any:
    import __main__

    return getattr(__main__, "__file__", None)


def test_what_a_script_goes_on_to_define_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    before = code_hash(asks_for_the_script)
    monkeypatch.setattr(sys.modules["__main__"], "counter", 1, raising=False)
    assert code_hash(asks_for_the_script) == before


# ---------------------------------------------------------------------------------------------- networks

NET = """
import argparse, collections, logging, threading, types
import numpy as np
import torch

class Config(dict):
    __getattr__ = dict.get

MAKERS = {
    "tensor": lambda n: torch.tensor([1.0, n]),
    "namespace": lambda n: types.SimpleNamespace(a=n),
    "ordered": lambda n: collections.OrderedDict(a=n),
    "arguments": lambda n: argparse.Namespace(a=n),
    "own": lambda n: Config(a=n),
    "distribution": lambda n: torch.distributions.Normal(torch.tensor(n), 1.0),
    "deep": lambda n: types.SimpleNamespace(a=[{"b": torch.tensor(n)}], lock=threading.Lock(), log=logging.getLogger("x"), rest=(item for item in ())),
}

class Net(torch.nn.Module):
    def __init__(self, held):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 2)
        self.held = held
        self.generator = np.random.default_rng()

    def forward(self, x):
        self.last = self.layer(x)
        return self.last

def make(kind, n):
    return Net(MAKERS[kind](n))

class Scripted(torch.nn.Module):
    def __init__(self, n):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 2)
        self.factor = n

    def forward(self, x):
        return self.layer(x) * self.factor

@torch.jit.script
def two(x):
    return x * 2

@torch.jit.script
def three(x):
    return x * 3

@torch.jit.script
def calls_two(x):
    return two(x) + 1
"""
KINDS = ("arguments", "deep", "distribution", "namespace", "ordered", "own", "tensor")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Torch calls its scripts deprecated; users have them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.", category=DeprecationWarning)
        yield


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterable[Any]:
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    (tmp_path / "cs_net.py").write_text(NET)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    with quiet():
        module = __import__("cs_net")
    yield module
    sys.modules.pop("cs_net", None)


@pytest.mark.torch
@pytest.mark.parametrize("kind", KINDS)
def test_attributes_of_a_network_count_by_value(nets: Any, kind: str) -> None:
    from edgekd.identity.provenance import architecture_hash, built_hash
    from edgekd.spaces import Fixed

    first, again, other = (architecture_hash(nets.make(kind, n)) for n in (1.0, 1.0, 9.0))
    assert first == again != other
    spaces = [Fixed(nets.make(kind, n)) for n in (1.0, 9.0)]
    assert len({space.source_hash() for space in spaces}) == 2
    if kind != "deep":  # a lock and an iterator cannot be copied
        assert len({built_hash(space, 0) for space in spaces}) == 2
    if kind == "tensor":
        assert len({architecture_hash(nets.make(kind, n), weights=False) for n in (1.0, 9.0)}) == 1


@pytest.mark.torch
def test_scripts_count_by_their_graph_and_state(nets: Any) -> None:
    import torch

    from edgekd.identity.provenance import architecture_hash

    trace: Any = torch.jit.trace
    with quiet(), pytest.warns(Warning, match="torch.tensor results are registered"):
        traced = [trace(lambda x, n=n: x + torch.tensor([1.0, n]), torch.zeros(2)) for n in (1.0, 1.0, 2.0)]
    first, again, other = (code_hash(reading(function)) for function in traced)
    assert first == again != other
    assert code_hash(reading(nets.two)) != code_hash(reading(nets.three))
    before = code_hash(reading(nets.calls_two))
    with quiet():
        nets.two = nets.three
        scripted = [torch.jit.script(nets.Scripted(n)) for n in (1.0, 1.0, 2.0)]
        changed = torch.jit.script(nets.Scripted(1.0))
    assert code_hash(reading(nets.calls_two)) == before
    with torch.no_grad():
        changed.layer.bias.add_(1e-6)
    hashes = [architecture_hash(module) for module in (*scripted, changed)]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3
    assert architecture_hash(changed, weights=False) == architecture_hash(scripted[0], weights=False)
    assert code_hash(reading(scripted[0])) == code_hash(reading(scripted[1])) != code_hash(reading(scripted[2]))


@pytest.mark.torch
def test_networks_with_held_state_have_the_same_identity_in_other_processes(nets: Any, tmp_path: Path) -> None:
    import torch

    from edgekd.teachers import AnsweringTeacher, as_teacher

    items = {"x": np.linspace(0.0, 1.0, 24, dtype=np.float32).reshape(8, 3)}

    def identity(kind: str) -> str:
        teacher = as_teacher(nets.make(kind, 1.0))
        assert isinstance(teacher, AnsweringTeacher)
        teacher.answer(items)
        teacher.outputs(items)
        return teacher.weights_hash()

    script = f"""
import json, warnings
import numpy as np
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import cs_net
from edgekd.identity.provenance import code_hash
from edgekd.teachers import as_teacher
found = {{}}
for kind in {tuple(reversed(KINDS))!r}:
    teacher = as_teacher(cs_net.make(kind, 1.0))
    teacher.answer({{"x": np.linspace(0.0, 1.0, 24, dtype=np.float32).reshape(8, 3)}})
    found[kind] = teacher.weights_hash()
print(json.dumps([found, code_hash(cs_net.calls_two)]))
"""
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONHASHSEED": "5", "PYTHONPATH": os.pathsep.join([str(tmp_path), root]), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert json.loads(done.stdout) == [{kind: identity(kind) for kind in KINDS}, code_hash(nets.calls_two)]
    assert torch.get_num_threads() == 1


@pytest.mark.torch
def test_answers_tell_teachers_apart_whose_difference_nothing_else_shows(nets: Any) -> None:
    import torch

    from edgekd.teachers import AnsweringTeacher, as_teacher

    class Hiding(torch.nn.Module):
        def __init__(self, n: float) -> None:
            super().__init__()
            self.numbers = (n for _ in range(1000))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * next(self.numbers) + torch.rand(3)

    teachers = [as_teacher(Hiding(n)) for n in (1.0, 1.0, 2.0)]
    assert len({teacher.weights_hash() for teacher in teachers}) == 1
    for teacher in teachers:
        assert isinstance(teacher, AnsweringTeacher)
        teacher.answer({"x": np.ones((2, 3), dtype=np.float32)})
    first, again, other = (teacher.weights_hash() for teacher in teachers)
    assert first == again != other
