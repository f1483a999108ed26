"""What changes a callable's hash, what does not, and that another process finds the same one."""

from __future__ import annotations

import functools
import importlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekd.errors import ConfigError
from edgekd.identity.provenance import code_hash, examine

MAIN = """
import collections, enum, functools, logging, re, threading
from dataclasses import dataclass
import numpy as np
import ak_helpers
from ak_helpers import widen
from ak_shift import Shift

SIZES = [8, 16]
TABLE = {"a": {"deep": (1, 2.5)}, "b": {3}}
NAMES = {"left", "right", "up", "down", "none"}
MEAN = np.array([0.5, 0.25], dtype=np.float32)
PATTERN = re.compile("x+")
LOG = logging.getLogger("ak")
LOCK = threading.Lock()
UNUSED = [1]

class Mode(enum.Enum):
    FAST = 1
    SLOW = 2

@dataclass
class Settings:
    depth: int = 2
    mode: Mode = Mode.FAST

SETTINGS = Settings()

@functools.cache
def inner():
    return SIZES[0]

def even(n):
    return n == 0 or odd(n - 1)

def odd(n):
    return n != 0 and even(n - 1)

def make(width=8):
    from ak_late import late
    with LOCK:
        LOG.info("%s", PATTERN)
    return inner(), TABLE, NAMES, MEAN, SETTINGS.depth, widen(width), ak_helpers.count(), late(), even(2)

class Net:
    factor = [2]

    def __init__(self):
        self.sizes = ak_helpers.count()

augment = Shift(2)
bound = functools.partial(make, width=3)
chained = [Shift(1).__call__, lambda x: x + len(SIZES)]

def adder(n):
    return lambda x: x + n

class Chain:
    def __init__(self, *parts):
        self.parts = parts
        self.owner = self

    def __call__(self, x):
        for part in self.parts:
            x = part(x)
        return x

chain = Chain(adder(1), adder(2), Shift(3), chained)
"""
HELPERS = """
STEPS = (4, 5)
OTHER = 1

def widen(width):
    return width * scale()

def scale():
    return 2

def count():
    return STEPS

def nobody():
    return OTHER
"""
LATE = "LIMIT = 3\n\ndef late():\n    return LIMIT\n"
SHIFT = """
class Base:
    step = 1

class Shift(Base):
    def __init__(self, pixels):
        self.pixels = pixels
        self.seen = {}

    def __call__(self, x):
        return x + self.pixels * self.step
"""
FILES = {"ak_main": MAIN, "ak_helpers": HELPERS, "ak_late": LATE, "ak_shift": SHIFT}
ROOTS = ("make", "Net", "augment", "bound", "chain")

Hashes = Callable[..., dict[str, str]]


@pytest.fixture
def hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hashes]:
    """The hashes of the roots in modules of which one text is replaced."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(str(tmp_path))

    def found(old: str = "", new: str = "") -> dict[str, str]:
        assert not old or sum(text.count(old) for text in FILES.values()) == 1
        for name, text in FILES.items():
            (tmp_path / f"{name}.py").write_text(text.replace(old, new) if old else text)
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        module = importlib.import_module("ak_main")
        return {root: code_hash(getattr(module, root)) for root in ROOTS}

    yield found
    for name in FILES:
        sys.modules.pop(name, None)


CHANGES = {
    "list": ("SIZES = [8, 16]", "SIZES = [8, 32]", {"make", "bound", "chain"}),
    "dictionary": ('"deep": (1, 2.5)', '"deep": (1, 2.25)', {"make", "bound"}),
    "order of a dictionary": ('{"a": {"deep": (1, 2.5)}, "b": {3}}', '{"b": {3}, "a": {"deep": (1, 2.5)}}', {"make", "bound"}),
    "set": ('"none"}', '"nothing"}', {"make", "bound"}),
    "array": ("[0.5, 0.25]", "[0.5, 0.125]", {"make", "bound"}),
    "dtype": ("dtype=np.float32", "dtype=np.float64", {"make", "bound"}),
    "object": ("SETTINGS = Settings()", "SETTINGS = Settings(mode=Mode.SLOW)", {"make", "bound"}),
    "dataclass": ("depth: int = 2", "depth: int = 4", {"make", "bound"}),
    "pattern": ('"x+"', '"y+"', {"make", "bound"}),
    "cached function": ("SIZES[0]", "SIZES[1]", {"make", "bound"}),
    "default": ("width=8", "width=9", {"make", "bound"}),
    "function of another module": ("return width * scale()", "return 1 + width * scale()", {"make", "bound"}),
    "what that uses": ("    return 2", "    return 3", {"make", "bound"}),
    "what an attribute of a module uses": ("STEPS = (4, 5)", "STEPS = (4, 6)", {"make", "bound", "Net"}),
    "what is imported inside": ("LIMIT = 3", "LIMIT = 4", {"make", "bound"}),
    "recursion": ("n != 0 and", "n != 1 and", {"make", "bound"}),
    "class attribute": ("factor = [2]", "factor = [3]", {"Net"}),
    "state": ("Shift(2)", "Shift(5)", {"augment"}),
    "base class": ("step = 1", "step = 2", {"augment", "chain"}),
    "method": ("x + self.pixels", "x - self.pixels", {"augment", "chain"}),
    "bound argument": ("width=3", "width=4", {"bound"}),
    "state of a bound method": ("Shift(1)", "Shift(4)", {"chain"}),
    "closure": ("adder(1), adder(2)", "adder(2), adder(1)", {"chain"}),
    "unused value": ("UNUSED = [1]", "UNUSED = [2]", set()),
    "unused function": ("return OTHER", "return -OTHER", set()),
    "unused value elsewhere": ("OTHER = 1", "OTHER = 2", set()),
}


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_hash_changes_exactly_with_what_the_callable_depends_on(hashes: Hashes, name: str) -> None:
    old, new, expected = CHANGES[name]
    before, after = hashes(), hashes(old, new)
    assert {root for root in ROOTS if before[root] != after[root]} == expected
    assert len(set(before.values())) == len(ROOTS)


def elsewhere(script: str, folder: Path, seed: str) -> Any:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join([str(folder), str(root)]), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True, check=True, cwd=folder)
    return json.loads(done.stdout)


def test_hash_is_equal_in_other_processes(hashes: Hashes, tmp_path: Path) -> None:
    here = hashes()
    script = f"""
        import json
        import ak_main
        from edgekd.identity.provenance import code_hash
        pad = [object() for _ in range(1000)]
        print(json.dumps({{name: code_hash(getattr(ak_main, name)) for name in reversed({ROOTS!r})}}))
    """
    assert elsewhere(script, tmp_path, "1") == here
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in FILES:
        shutil.move(tmp_path / f"{name}.py", moved)
    assert elsewhere(script, moved, "2") == here


class Holder:
    """Applies a session-like thing that nothing can read."""

    def __init__(self) -> None:
        self.session = (item for item in range(3))

    def __call__(self, x: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        return x


class Stateless(Holder):
    def __getstate__(self) -> dict[str, Any]:
        return {}


def test_state_that_cannot_be_told_is_named_and_refused() -> None:
    with pytest.raises(ConfigError, match=r"Holder\.session \(builtins\.generator\).*__getstate__"):
        code_hash(Holder())
    with pytest.raises(ConfigError, match=r"\[1\]\.session"):
        code_hash(functools.partial(print, [0, Holder()]))
    text, hidden = examine(Holder())
    assert len(text) == 64
    assert hidden == ("Holder.session (builtins.generator)",)
    assert code_hash(Stateless()) == code_hash(Stateless())


EVENT = threading.local()


def reads_what_cannot_be_told() -> object:
    return EVENT


def test_module_level_value_that_cannot_be_told_is_named() -> None:
    with pytest.raises(ConfigError, match=r"reads_what_cannot_be_told EVENT \(_thread\._local\)"):
        code_hash(reads_what_cannot_be_told)


def test_two_lambdas_of_one_line_differ() -> None:
    first, second = (lambda x: x, lambda x: -x)
    assert code_hash(first) != code_hash(second)


def test_function_without_source_is_hashed_by_its_code() -> None:
    made = []
    for text in ("def f():\n    return A", "def f():\n    return A", "def f():\n    return A + 1"):
        space: dict[str, Any] = {"A": [1], "__name__": "typed_in"}
        exec(text, space)
        made.append(code_hash(space["f"]))
    assert made[0] == made[1] != made[2]
    space["A"] = [2]
    assert code_hash(space["f"]) != made[2]


@pytest.mark.torch
def test_architecture_hash_sees_code_and_attributes_and_is_equal_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from edgekd.identity.provenance import architecture_hash

    monkeypatch.syspath_prepend(str(tmp_path))
    text = """
import torch
GAIN = {"all": 1.0}

class Net(torch.nn.Module):
    def __init__(self, act=torch.relu, names=("b", "a", "c")):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)
        self.act = act
        self.options = {"tap": set(names)}

    def forward(self, x):
        self.last = self.act(self.layer(x)) * GAIN["all"]
        return self.last

def build(**options):
    torch.manual_seed(0)
    return torch.nn.Sequential(Net(**options), torch.nn.TransformerEncoderLayer(4, 2, 8, batch_first=True))
"""
    (tmp_path / "ak_net.py").write_text(text)
    module = importlib.import_module("ak_net")
    plain = architecture_hash(module.build())
    assert architecture_hash(module.build()) == plain
    others = [architecture_hash(module.build(act=torch.tanh)), architecture_hash(module.build(names=("a",)))]
    changed = module.build()
    with torch.no_grad():
        changed[0].layer.bias.add_(1.0)
    others.append(architecture_hash(changed))
    assert architecture_hash(changed, weights=False) == architecture_hash(module.build(), weights=False)
    module.GAIN["all"] = 2.0
    others.append(architecture_hash(module.build()))
    assert len({plain, *others}) == 5
    module.GAIN["all"] = 1.0
    used = module.build()
    used[0](torch.ones(1, 3))
    script = """
        import json
        import ak_net
        from edgekd.identity.provenance import architecture_hash
        print(json.dumps(architecture_hash(ak_net.build())))
    """
    assert elsewhere(script, tmp_path, "3") == plain
