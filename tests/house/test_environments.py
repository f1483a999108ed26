"""Environments of converters: made whole from a hashed list or not at all, one creator at a time, stale ones refused with the line that helps."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from edgekd.conversion import environments
from edgekd.conversion.environments import (
    EnvironmentSpec,
    create_environment,
    environment_python,
    environment_state,
    environments_folder,
    find_python,
    known_environments,
    list_environments,
    parse_list,
    remove_environment,
    spec_of,
)
from edgekd.errors import ConfigError, EnvironmentFailed, InputError, MissingEnvironment, StorageError

HEAD = f"# purpose: a test\n# python: 3.{sys.version_info[1]} to 3.{sys.version_info[1]}\n# machines: {platform.machine()}\n# size_mb: 20\n"


def write_wheel(folder: Path) -> str:
    """A wheel of a package `edgekd_toy` with one module and one script, written by hand; its SHA-256."""
    folder.mkdir(parents=True, exist_ok=True)
    info = "edgekd_toy-1.0.dist-info"
    files = {
        "edgekd_toy.py": "def main():\n    print('toy runs')\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: edgekd-toy\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[console_scripts]\nedgekd-toy = edgekd_toy:main\n",
    }
    lines = [
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b'=').decode()},{len(text)}" for name, text in files.items()
    ]
    files[f"{info}/RECORD"] = "\n".join([*lines, f"{info}/RECORD,,"]) + "\n"
    path = folder / "edgekd_toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name), text)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The hash of a wheel that pip finds without a network."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "elsewhere"))
    return write_wheel(tmp_path / "wheels")


def toy(digest: str, note: str = "") -> EnvironmentSpec:
    return parse_list("toy", f"{HEAD}{note}edgekd-toy==1.0 \\\n    --hash=sha256:{digest}\n")


def left_over(home: Path) -> list[str]:
    return sorted(path.name for path in home.iterdir() if not path.name.endswith(".lock"))


@pytest.mark.slow
def test_an_environment_is_made_once_and_used_replaced_when_stale_and_removed(wheels: str, tmp_path: Path) -> None:
    home, said = tmp_path / "home", list[str]()
    spec = toy(wheels)
    threads = [threading.Thread(target=create_environment, args=(spec, home), kwargs={"say": said.append}) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    state = environment_state(spec, home)
    assert (state.state, state.problem, state.remedy) == ("ready", "", "")
    assert state.size_bytes > 1_000_000
    assert state.seconds > 0
    assert sum(line.startswith("making toy") for line in said) == 1
    assert any("waiting" in line for line in said)
    assert left_over(home) == ["toy"]

    script = home / "toy" / "bin" / "edgekd-toy"
    assert subprocess.run([script], capture_output=True, text=True, check=True).stdout == "toy runs\n"
    assert not [path for path in (home / "toy" / "bin").iterdir() if path.is_file() and b"/.toy." in path.read_bytes()[:4096]]
    assert not (tmp_path / "elsewhere").exists()

    newer = toy(wheels, "# another list\n")
    stale = environment_state(newer, home)
    assert stale.state == "stale"
    assert stale.remedy == f"edgekd env create toy --path {home}"
    made = create_environment(newer, home)
    assert made.state == "ready"
    assert environment_state(spec, home).state == "stale"
    assert left_over(home) == ["toy"]

    (home / "toy" / "bin" / "python").unlink()
    assert environment_state(newer, home).state == "broken"
    assert remove_environment(newer, home) == made.size_bytes
    assert left_over(home) == []
    assert remove_environment(newer, home) == 0


@pytest.mark.slow
def test_a_package_with_another_hash_is_refused_and_nothing_stays(wheels: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / ".toy.killed").mkdir()
    with pytest.raises(EnvironmentFailed, match="DO NOT MATCH") as raised:
        create_environment(toy("0" * 64), home)
    assert "not the one that was tested" in str(raised.value)
    assert left_over(home) == []
    assert environment_state(toy(wheels), home).state == "absent"


def test_a_folder_that_edgekd_did_not_make_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "mine").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="stands in the way"):
        create_environment(toy("0" * 64), tmp_path)
    with pytest.raises(ConfigError, match="was not made by"):
        remove_environment(toy("0" * 64), tmp_path)
    assert (tmp_path / "toy" / "mine").read_text(encoding="utf-8") == "mine"
    assert environment_state(toy("0" * 64), tmp_path).state == "broken"


def test_a_missing_environment_is_refused_with_the_line_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(MissingEnvironment, match="edgekd env create onnx2tf") as raised:
        environment_python("onnx2tf", purpose="a test", path=tmp_path)
    assert raised.value.environment == "onnx2tf"
    with pytest.raises(ConfigError, match="did you mean"):
        spec_of("onx2tf")


def test_another_machine_another_python_and_a_small_disk_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    text = toy("0" * 64).requirements
    with pytest.raises(ConfigError, match="no wheels for this machine"):
        create_environment(parse_list("toy", re.sub("machines: .*", "machines: pdp11", text)), tmp_path)
    with pytest.raises(ConfigError, match="no Python fits") as raised:
        create_environment(parse_list("toy", re.sub("python: .*", "python: 3.2 to 3.3", text)), tmp_path)
    assert "--python" in str(raised.value)
    with pytest.raises(StorageError, match="not enough room"):
        create_environment(parse_list("toy", re.sub("size_mb: .*", "size_mb: 900000000", text)), tmp_path)
    assert left_over(tmp_path) == []


def test_the_python_that_is_named_must_fit() -> None:
    spec = toy("0" * 64)
    assert find_python(spec, sys.executable) == Path(sys.executable)
    with pytest.raises(ConfigError, match="not there"):
        find_python(spec, "/no/such/python")


@pytest.mark.parametrize("head", ["", "# python: 3.10 to 3.11\n", HEAD.replace("3.", "4."), HEAD.replace("size_mb: 20", "size_mb: much")])
def test_a_list_without_a_proper_head_is_refused(head: str) -> None:
    with pytest.raises(InputError, match="head"):
        parse_list("toy", f"{head}edgekd-toy==1.0\n")


def test_every_shipped_list_pins_and_hashes_everything_and_names_no_host() -> None:
    known = known_environments()
    assert set(known) == {"onnx2tf", "onnx-tf", "tensorflow"}
    for spec in known.values():
        body = "\n".join(line for line in spec.requirements.splitlines() if not line.startswith("#"))
        entries = [entry for entry in re.split(r"\n(?=\S)", body) if entry.strip()]
        assert len(entries) > 30
        for entry in entries:
            assert re.match(r"^[a-z0-9.-]+==[\w.]+( ; [^\\]+)? \\$", entry.splitlines()[0]), entry
            assert all(re.match(r"^    --hash=sha256:[0-9a-f]{64}( \\)?$", line) for line in entry.splitlines()[1:]), entry
            assert len(entry.splitlines()) > 1, entry
        assert "://" not in spec.requirements
        assert "--" not in re.sub(r"--hash=", "", body)
    assert "onnx2tf==1.29.24" in known["onnx2tf"].requirements
    assert "onnx-tf==1.10.0" in known["onnx-tf"].requirements
    assert "aarch64" in known["tensorflow"].machines


def test_environments_lie_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert environments_folder() == tmp_path / "edgekd" / "environments"
    assert {state.state for state in list_environments()} == {"absent"}
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert environments.cache_folder() == Path.home() / ".cache" / "edgekd"
    assert environments_folder(Path("here")) == Path("here").absolute()


def test_the_command_line_lists_removes_and_refuses(tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        variables = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
        return subprocess.run([sys.executable, "-m", "edgekd", *words], capture_output=True, text=True, env=variables, timeout=400, check=False)

    listed = json.loads(run("env", "list", "--json").stdout)
    assert [row["name"] for row in listed] == ["onnx-tf", "onnx2tf", "tensorflow"]
    assert {row["state"] for row in listed} == {"absent"}
    assert "edgekd env create onnx2tf" in run("env", "list").stdout
    assert "is not there" in run("env", "remove", "onnx2tf").stdout
    refused = run("env", "create", "onnx2")
    assert refused.returncode == 3
    assert "did you mean" in refused.stderr
