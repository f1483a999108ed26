"""The public face: its names agree, importing it is cheap, and neither it nor the command line needs torch."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import edgekd

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "tensorflow", "onnx", "onnxruntime", "scipy", "matplotlib", "sklearn", "lightning_fabric")


def face_table() -> dict[str, str]:
    return dict(vars(edgekd)["_FACE"])


def loaded_after(statement: str) -> set[str]:
    """The heavy modules in a fresh process after the statement."""
    code = f"import sys\n{statement}\nprint(' '.join(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_all_is_sorted_and_equals_the_table() -> None:
    names = list(edgekd.__all__)
    assert names == sorted(names)
    assert set(names) == set(face_table()) | {"__version__"}
    assert dir(edgekd) == names


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((ROOT / "edgekd" / "__init__.py").read_text(encoding="utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.asname: node.module for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == face_table()


@pytest.mark.parametrize("name", sorted(face_table()))
def test_every_name_resolves_to_where_the_table_says(name: str) -> None:
    found = getattr(edgekd, name)
    assert found is getattr(importlib.import_module(face_table()[name]), name)
    assert found.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="compres"):
        _ = edgekd.compres


def test_importing_edgekd_loads_nothing_heavy() -> None:
    assert loaded_after("import edgekd") == set()


@pytest.mark.parametrize("name", ["Budget", "EdgekdError", "connect"])
def test_the_first_names_of_a_script_load_nothing_heavy(name: str) -> None:
    assert loaded_after(f"import edgekd; edgekd.{name}") == set()


def test_the_command_line_starts_without_anything_heavy() -> None:
    assert loaded_after("import edgekd.cli.main") == set()


def test_the_doctor_loads_no_torch() -> None:
    assert "torch" not in loaded_after("from edgekd.doctor import diagnose; diagnose()")


def test_looking_at_profiles_loads_nothing_heavy() -> None:
    assert loaded_after("from edgekd.settings.profile_file import list_profiles; list_profiles()") == set()
