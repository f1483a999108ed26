"""Who may import whom, read from the source text of every module, and checked again in a process that imports them all."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = "edgekd"
FOLDERS = ("targets", "converters", "profiles")
RUNNERS = sorted((ROOT / "targets").glob("runner*.py"))
WORKERS = tuple(path for path in sorted((ROOT / "converters" / "workers").glob("*.py")) if path.name != "__init__.py")
MAY_IMPORT_BY_TEXT = {ROOT / "edgekd" / "registry.py", ROOT / "edgekd" / "__init__.py"}
PLUG_IN_MODULE = re.compile(r"^edgekd\.(targets|converters)\.[\w.:]+$")
FORBIDDEN_MODULES = ("targets", "converters", "profiles", "tests", "edgekd.edgekd", "edgekd.tests")


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def every_source() -> list[Path]:
    return [path for folder in (CORE, *FOLDERS) for path in sources(folder)]


def module_of(path: Path) -> str:
    """The name a file is imported under."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] != CORE:
        parts.insert(0, CORE)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Every module that the tree imports, relative ones resolved; `from a import b` counts as `a` and as `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".") if is_package else module.split(".")[:-1]
                parts = parts[: len(parts) - (node.level - 1)]
                base = ".".join([*parts, base] if base else parts)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def broken_arrows(path: Path, text: str) -> list[str]:
    """What a source file imports and must not."""
    tree, module = ast.parse(text), module_of(path)
    own = path.relative_to(ROOT).parts[0]
    broken = []
    for name in imported(tree, module, path.name == "__init__.py"):
        top, _, rest = name.partition(".")
        second = rest.partition(".")[0]
        if top in FOLDERS:
            broken.append(f"{module} imports {name}: a plug-in folder is reached as edgekd.{name}, by name")
        if top == CORE and second in FOLDERS and second != own:
            broken.append(f"{module} imports {name}: the core and other folders reach a plug-in by the registry")
        if top == CORE and second in ("edgekd", "tests"):
            broken.append(f"{module} imports {name}")
        if (top == "pytest" or name.startswith("edgekd.testing")) and not module.startswith("edgekd.testing"):
            broken.append(f"{module} imports {name}: pytest is for the suites of edgekd.testing, and those are for tests")
        if name.startswith("edgekd.targets.runner"):
            broken.append(f"{module} imports the program that runs on devices")
        if name.startswith("edgekd.converters.workers"):
            broken.append(f"{module} imports a program that runs in an environment of its own")
    if path not in MAY_IMPORT_BY_TEXT:
        broken += [f"{module} imports by text: {ast.unparse(node)}" for node in ast.walk(tree) if plug_in_by_text(node)]
        broken += [f"{module} names a plug-in module in a text: {text}" for text in texts(tree) if PLUG_IN_MODULE.match(text)]
    return broken


def plug_in_by_text(node: ast.AST) -> bool:
    """Whether a call imports a module of ours that it names by a text; a name that a user gave is a variable and passes."""
    if not isinstance(node, ast.Call):
        return False
    called = ast.unparse(node.func)
    if called not in ("importlib.import_module", "import_module", "__import__", "importlib.__import__", "runpy.run_module"):
        return False
    argument = node.args[0] if node.args else None
    if isinstance(argument, ast.JoinedStr) and argument.values:
        argument = argument.values[0]
    if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
        return argument.value.split(".")[0] in (CORE, *FOLDERS) or argument.value.startswith(".")
    return False


def texts(tree: ast.AST) -> Iterator[str]:
    """Every text in the source, docstrings left out."""
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
            yield node.value


@pytest.mark.parametrize("path", every_source(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_keeps_the_arrows(path: Path) -> None:
    assert broken_arrows(path, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("edgekd/pipeline.py", "from edgekd.targets.runtimes import null"),
        ("edgekd/pipeline.py", "def f():\n    import edgekd.converters.onnx_from_torch"),
        ("edgekd/pipeline.py", "from edgekd import profiles"),
        ("edgekd/pipeline.py", "from . import targets"),
        ("edgekd/search/x.py", "from .. import converters"),
        ("edgekd/pipeline.py", "import targets"),
        ("edgekd/pipeline.py", "import importlib\nimportlib.import_module('edgekd.targets.runtimes.null')"),
        ("targets/runtimes/x.py", "from edgekd.converters import onnx_from_torch"),
        ("targets/runtimes/x.py", "from targets.runtimes import null"),
        ("targets/runtimes/x.py", "from ...converters import onnx_from_torch"),
        ("targets/transports/x.py", "from .. import runner"),
        ("targets/runtimes/x.py", "from .. import runner_onnxruntime"),
        ("converters/x.py", "import edgekd.profiles"),
        ("converters/x.py", "__import__('converters.y')"),
        ("edgekd/x.py", "import importlib\nNAME = 'edgekd.converters.y:Y'\nimportlib.import_module(NAME.partition(':')[0])"),
        ("edgekd/x.py", "import importlib\nimportlib.import_module(f'edgekd.{kind}.y')"),
        ("edgekd/x.py", "import edgekd.edgekd.errors"),
        ("edgekd/x.py", "import pytest"),
        ("edgekd/x.py", "from edgekd import testing"),
    ],
)
def test_a_broken_arrow_is_found(where: str, text: str) -> None:
    assert broken_arrows(ROOT / where, text)


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("edgekd/pipeline.py", "from edgekd.registry import load"),
        ("edgekd/pipeline.py", "import importlib.resources\nimportlib.resources.files('edgekd.profiles')"),
        ("targets/runtimes/x.py", "from .null import NullRuntime\nfrom edgekd.errors import DeviceError"),
        ("converters/x.py", "from . import y"),
        ("edgekd/testing/x.py", "import pytest\nfrom edgekd.testing.models import two_inputs"),
        ("edgekd/x.py", "import importlib\nimportlib.import_module(users_module)"),
    ],
)
def test_an_allowed_import_is_not_reported(where: str, text: str) -> None:
    assert broken_arrows(ROOT / where, text) == []


def test_profiles_are_reached_as_data_only_by_the_profile_reader() -> None:
    naming = [path.name for path in sources(CORE) if "edgekd.profiles" in path.read_text(encoding="utf-8")]
    assert naming == ["profile_file.py"]
    text = (ROOT / "edgekd" / "settings" / "profile_file.py").read_text(encoding="utf-8")
    assert text.count("edgekd.profiles") == text.count('importlib.resources.files("edgekd.profiles")')


@pytest.mark.parametrize("path", RUNNERS, ids=lambda path: str(path.name))
def test_the_runner_imports_the_standard_library_only(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))
    top_level = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    names = {name.partition(".")[0] for name in imported(top_level, "runner", False) if name}
    assert names
    assert names <= set(sys.stdlib_module_names) | {"__future__"}
    assert not {name for name in imported(tree, "runner", False) if name.partition(".")[0] in (CORE, *FOLDERS)}


@pytest.mark.parametrize("path", WORKERS, ids=lambda path: path.name)
def test_a_worker_imports_nothing_of_edgekd_and_its_environment_only_late(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))
    top_level = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    assert {name.partition(".")[0] for name in imported(top_level, path.stem, False) if name} <= set(sys.stdlib_module_names) | {"numpy"}
    assert not {name for name in imported(tree, path.stem, False) if name.partition(".")[0] in (CORE, *FOLDERS)}


def test_every_package_folder_has_its_row_in_setup_cfg() -> None:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    rows = parser["options"]["packages"].split()
    folders = {module_of(path / "__init__.py") for folder in (CORE, *FOLDERS) for path in {source.parent for source in sources(folder)}}
    assert set(rows) == folders
    assert len(rows) == len(set(rows))
    for folder in (CORE, *FOLDERS):
        for path in {source.parent for source in sources(folder)}:
            assert (path / "__init__.py").is_file(), f"{path} holds Python and is no package"


def test_no_module_is_ever_imported_under_a_second_name() -> None:
    """Every module of the package is imported in one process; then none of the forbidden names is there."""
    names = [module_of(path) for path in every_source() if path not in (*RUNNERS, *WORKERS) and path.name != "__main__.py"]
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        f"print([name for name in {FORBIDDEN_MODULES!r} if name in sys.modules])\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('targets', 'converters', 'profiles')])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]
