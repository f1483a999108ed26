"""The wheel: built from the tree, holding all of it, installed into an environment with nothing but what it declares, used from another folder."""

from __future__ import annotations

import configparser
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import edgekd
from edgekd.testing import ConverterContract, RuntimeContract, TransportContract

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"edgekd": "edgekd", "targets": "edgekd/targets", "converters": "edgekd/converters", "profiles": "edgekd/profiles"}
README = (ROOT / "README.md").read_text(encoding="utf-8")
PLUG_INS = """
from edgekd import registry


class MyRuntime(registry.load("runtimes", "null")):
    name = "my-npu"


class MyTransport(registry.load("transports", "local")):
    name = "my-bus"


class MyConverter(registry.load("converters", "prepare-onnx")):
    name = "my-tidying"
"""
PROJECT = """
[project]
name = "my-package"
version = "1.0"

[project.entry-points."edgekd.runtimes"]
my-npu = "my_package:MyRuntime"

[project.entry-points."edgekd.transports"]
my-bus = "my_package:MyTransport"

[project.entry-points."edgekd.converters"]
my-tidying = "my_package:MyConverter"
"""
PLUG_IN_TESTS = """
from edgekd.contracts import ConvertRequest
from edgekd.settings.profile_file import load_profile
from edgekd.registry import load
from edgekd.testing import ConverterContract, TransportContract, two_headed, two_inputs


class TestMyTransport(TransportContract):
    def make(self, tmp_path):
        workdir = tmp_path / "device"
        return load("transports", "my-bus")(load_profile("local", overrides=[f"transport.workdir={workdir}"]))


class TestMyConverter(ConverterContract):
    converter_name = "my-tidying"

    def request(self, folder):
        model = two_headed(folder.parent / "model")
        return ConvertRequest(source=model, folder=folder, iospec=model.record.iospec, example=two_inputs(2))

    def unusable_source(self, folder):
        return object()
"""
FORBIDDEN = ("targets", "converters", "profiles", "tests", "edgekd.edgekd", "edgekd.tests")

pytestmark = [pytest.mark.slow, pytest.mark.installs]


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def run(argv: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """A finished command, with no variable of ours in its environment that could lead it back to the tree."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PIP_", "VIRTUAL_ENV"))}
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def dependencies(requirements: list[str]) -> set[str]:
    """The names of the distributions that these requirements lead to, extras left out."""
    found: set[str] = set()
    todo = [Requirement(text) for text in requirements]
    while todo:
        requirement = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = importlib.metadata.distribution(requirement.name).metadata["Name"]
        if name not in found:
            found.add(name)
            todo += [Requirement(text) for text in importlib.metadata.requires(name) or []]
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without a network from a copy of the tree."""
    source = tmp_path_factory.mktemp("source")
    for name in (*FOLDERS, "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, source / path.name)
    return built(source, tmp_path_factory.mktemp("wheel"))


def built(source: Path, out: Path) -> Path:
    """The wheel of a source tree, in `out`."""
    run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(source)], out)
    (wheel,) = out.glob("*.whl")
    return wheel


def environment(home: Path, requirements: list[str], *wheels: Path) -> Path:
    """The `bin` of an environment that holds the wheels and what these requirements lead to, linked from here."""
    venv.create(home, with_pip=False, symlinks=True)
    (site,) = home.glob("lib/python*/site-packages")
    for name in dependencies(requirements):
        for file in importlib.metadata.distribution(name).files or []:
            top = file.parts[0]
            if top != ".." and not (site / top).exists():
                (site / top).symlink_to(Path(str(importlib.metadata.distribution(name).locate_file(top))))
    python = home / "bin" / "python"
    run([sys.executable, "-m", "pip", "--quiet", "--python", str(python), "install", "--no-index", "--no-deps", *map(str, wheels)], home)
    return home / "bin"


def required(*extras: str) -> list[str]:
    """What the metadata require, and what these extras add."""
    parser = setup_cfg()
    texts = [parser["options"]["install_requires"], *(parser["options.extras_require"][extra] for extra in extras)]
    return [line for text in texts for line in text.strip().splitlines()]


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment that holds the wheel and what its metadata require: no torch, no onnx."""
    return environment(tmp_path_factory.mktemp("clean"), required(), wheel)


def test_the_wheel_holds_the_tree_and_nothing_else(wheel: Path) -> None:
    expected = {
        str(Path(inside) / path.relative_to(ROOT / folder))
        for folder, inside in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == expected


def test_the_metadata_say_what_setup_cfg_says(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode("utf-8"))
    assert set(metadata.get_all("Provides-Extra") or []) == set(setup_cfg()["options.extras_require"])
    assert metadata["Version"] == edgekd.__version__
    assert "torch" not in {Requirement(text).name for text in metadata.get_all("Requires-Dist") or [] if "extra ==" not in text}


def test_the_installed_package_loads_profiles_and_plug_ins_from_another_folder(clean: Path, tmp_path: Path) -> None:
    code = (
        "import sys, edgekd\n"
        "from edgekd import registry\n"
        "from edgekd.settings.profile_file import list_profiles, load_profile\n"
        "assert load_profile('local').runtime.kind == 'onnxruntime'\n"
        "assert {row.name for row in list_profiles()} >= {'local', 'null'}\n"
        "for kind in ('transports', 'runtimes', 'converters'):\n"
        "    for name in registry.table(kind):\n"
        "        registry.load(kind, name)\n"
        f"assert not [name for name in {FORBIDDEN!r} if name in sys.modules]\n"
        "assert 'torch' not in sys.modules\n"
        "print(edgekd.__file__)\n"
    )
    printed = run([str(clean / "python"), "-c", code], tmp_path).stdout.strip()
    assert Path(printed).is_relative_to(clean.parent)


def test_the_installed_command_starts_without_torch_and_onnx(clean: Path, tmp_path: Path) -> None:
    printed = run([str(clean / "edgekd"), "--help"], tmp_path).stdout
    for command in ("bench", "compress", "doctor", "gate", "report", "targets", "validate"):
        assert command in printed
    assert run([str(clean / "edgekd"), "--version"], tmp_path).stdout.strip()


def test_the_installed_doctor_says_what_is_missing_and_the_line_that_helps(clean: Path, tmp_path: Path) -> None:
    code = (
        "from edgekd.doctor import diagnose\n"
        "found = diagnose()\n"
        "extras = {row.extra: row for row in found.extras}\n"
        "assert not {'dev', 'testing'} & set(extras), extras\n"
        "missing = {row.package for row in extras['x86'].packages if row.problem}\n"
        "assert missing == {'onnx', 'onnxruntime'}, missing\n"
        "assert extras['x86'].remedy.endswith('-m pip install \"edgekd[x86]\"'), extras['x86'].remedy\n"
        "for row in found.targets:\n"
        "    extra = 'litert' if row.runtime == 'litert' else 'x86'\n"
        "    assert row.tried and not row.ready and f'edgekd[{extra}]' in row.remedy, row\n"
    )
    run([str(clean / "python"), "-c", code], tmp_path)


def test_a_plug_in_package_passes_the_shipped_suites_against_the_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    """The runtime's test and its profile are those in the README."""
    package, home, project = tmp_path / "package", tmp_path / "home", tmp_path / "project"
    for folder in (package, home, project / "profiles"):
        folder.mkdir(parents=True)
    (package / "my_package.py").write_text(PLUG_INS, encoding="utf-8")
    (package / "pyproject.toml").write_text(f"{PROJECT}\n{(ROOT / 'pyproject.toml').read_text(encoding='utf-8')}", encoding="utf-8")
    (board,) = re.findall(r"^```toml\n(# profiles/my_board\.toml\n.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    (project / "profiles" / "my_board.toml").write_text(board.replace('kind = "onnxruntime"', 'kind = "my-npu"'), encoding="utf-8")
    (suite,) = re.findall(r"^```python\n([^`]*\(RuntimeContract\):.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    (project / "test_my_runtime.py").write_text(suite, encoding="utf-8")
    (project / "test_my_others.py").write_text(PLUG_IN_TESTS, encoding="utf-8")
    bin_folder = environment(home, required("x86", "testing"), wheel, built(package, tmp_path))
    said = run([str(bin_folder / "python"), "-m", "pytest", "-p", "no:cacheprovider", "-W", "error", "-rA", "."], project).stdout
    passed = set(re.findall(r"^PASSED \S+::(\w+)::(\w+)", said, flags=re.MULTILINE))
    suites = {"TestMyRuntime": RuntimeContract, "TestMyTransport": TransportContract, "TestMyConverter": ConverterContract}
    assert passed == {(name, test) for name, contract in suites.items() for test in vars(contract) if test.startswith("test_")}
