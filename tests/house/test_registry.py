"""Names to plug-ins: what ships is there, third parties are equal, and what is wrong is found when it is registered."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edgekd import registry
from edgekd.contracts import Converter, Runtime, Transport
from edgekd.errors import RegistryError

ROOT = Path(__file__).resolve().parents[2]

WHOLE = """
class Echo:
    name = "echo"
    source = "onnx"
    target = "onnx"
    precisions = ()
    def convert(self, request):
        return request.source
"""
LACKING = """
class Echo:
    name = "echo"
    source = "onnx"
    target = "onnx"
    precisions = ()
"""


def install(folder: Path, module: str, source: str, entry_points: str) -> None:
    """A distribution on disk as pip leaves it: the module, METADATA and entry_points.txt."""
    (folder / f"{module}.py").write_text(source, encoding="utf-8")
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(entry_points, encoding="utf-8")


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    text = f"import sys\nsys.path.insert(0, {str(folder)!r})\nfrom edgekd import registry\nfrom edgekd.errors import RegistryError\n{code}"
    return subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=60)


def refused(code: str, folder: Path) -> str:
    done = run(f"try:\n    {code}\nexcept RegistryError as error:\n    print(error)\nelse:\n    sys.exit('was accepted')", folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", ["transports", "runtimes", "converters"])
def test_everything_that_ships_can_be_loaded(kind: str) -> None:
    for name in registry.table(kind):
        found = registry.load(kind, name)
        assert found.name == name


def test_a_third_party_plug_in_is_found_by_its_entry_point(tmp_path: Path) -> None:
    install(tmp_path, "echo_plugin", WHOLE, "[edgekd.converters]\necho = echo_plugin:Echo\n")
    done = run("print(registry.load('converters', 'echo').__module__, 'qdq-from-onnx' in registry.table('converters'))", tmp_path)
    assert done.stdout.split() == ["echo_plugin", "True"], done.stderr


def test_a_taken_name_is_refused(tmp_path: Path) -> None:
    install(tmp_path, "echo_plugin", WHOLE, "[edgekd.converters]\nqdq-from-onnx = echo_plugin:Echo\n")
    message = refused("registry.load('converters', 'qdq-from-onnx')", tmp_path)
    assert "echo_plugin:Echo" in message
    assert "rename" in message


def test_a_name_that_two_third_parties_want_is_refused(tmp_path: Path) -> None:
    install(tmp_path, "echo_one", WHOLE, "[edgekd.converters]\necho = echo_one:Echo\n")
    install(tmp_path, "echo_two", WHOLE, "[edgekd.converters]\necho = echo_two:Echo\n")
    message = refused("registry.table('converters')", tmp_path)
    assert "echo_one:Echo" in message
    assert "echo_two:Echo" in message


def test_a_plug_in_that_lacks_a_method_is_refused(tmp_path: Path) -> None:
    install(tmp_path, "echo_plugin", LACKING, "[edgekd.converters]\necho = echo_plugin:Echo\n")
    assert "missing: convert" in refused("registry.load('converters', 'echo')", tmp_path)


def test_a_plug_in_that_cannot_be_imported_is_refused(tmp_path: Path) -> None:
    install(tmp_path, "echo_plugin", "import no_such_module_anywhere\n", "[edgekd.runtimes]\necho = echo_plugin:Echo\n")
    assert "no_such_module_anywhere" in refused("registry.load('runtimes', 'echo')", tmp_path)


def test_a_plug_in_without_its_attribute_is_refused(tmp_path: Path) -> None:
    install(tmp_path, "echo_plugin", "", "[edgekd.runtimes]\necho = echo_plugin:Echo\n")
    assert "Echo" in refused("registry.load('runtimes', 'echo')", tmp_path)


def test_an_unknown_name_offers_near_names() -> None:
    with pytest.raises(RegistryError, match="onnxruntime") as caught:
        registry.load("runtimes", "onxruntime")
    assert "did you mean" in str(caught.value)
    assert caught.value.subject == "onxruntime"


def test_an_unknown_kind_offers_near_names() -> None:
    with pytest.raises(RegistryError, match=r"runtimes \(did you mean"):
        registry.table("runtime")


@pytest.mark.parametrize(
    ("contract", "some"),
    [
        (Transport, {"open", "close", "run", "push", "pull", "start", "poll", "kill"}),
        (Runtime, {"benchmark", "infer", "op_times"}),
        (Converter, {"convert", "source", "target"}),
    ],
)
def test_required_members_are_the_public_names_of_the_contract(contract: type, some: set[str]) -> None:
    members = registry.required_members(contract)
    assert some | {"name"} <= set(members)
    assert not [name for name in members if name.startswith("_")]
