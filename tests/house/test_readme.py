"""The README is true: its commands run, its script and files work, its paths and names exist. Texts are taken from the README itself.

Commands run as they are written, with the null target in place of the device at hand. Not run, and checked otherwise: `make` (dry run),
`pip` (its requirements are known), pytest (collects) and the demo (minutes long; its own tests run it).
"""

from __future__ import annotations

import configparser
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

from edgekd import registry, testing
from edgekd.cli.main import cli
from edgekd.settings.profile_file import load_profile

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
LANGUAGES = {"sh", "python", "toml", "yaml", "text"}

SIMULATED = {
    "bench": "--target null",
    "compress job.toml": "--set target=null --set options.accept_simulated=true --set options.train.threads=1",
    "compress --quantize-only": "--target null --accept-simulated",
    "convert model.onnx --to onnx --precision int8 --plan": "",
    "convert": "--target null",
    "doctor": "null",
    "validate": "--target null --accept-simulated",
    "gate": "--target null --accept-simulated",
}
"""Command to the words that make it run on the null target."""


def lines(language: str) -> list[str]:
    """Every line of the blocks of one language."""
    return [line for found, text in BLOCKS if found == language for line in text.splitlines() if line.strip()]


def gate_lines() -> list[str]:
    """The calls of `edgekd` inside the CI snippets."""
    found = [re.search(r"(edgekd (?:gate|validate|doctor)\b.*)$", line) for line in lines("yaml")]
    return [match.group(1) for match in found if match]


def install_lines() -> list[str]:
    """Every requirement that the README tells pip or uv to install, with its whole line."""
    return [line for line in [*lines("sh"), *lines("yaml")] if "pip install" in line]


def block(language: str, marker: str) -> str:
    """The only block of a language that holds `marker`."""
    (found,) = [text for kind, text in BLOCKS if kind == language and marker in text]
    return str(found)


COMMANDS = [line for line in lines("sh") if line.startswith("edgekd ")] + gate_lines()


def simulated(command: str) -> list[str]:
    """The words of a command after `edgekd`, led to the null target."""
    words = command.removeprefix("edgekd ")
    more = next((extra for start, extra in SIMULATED.items() if words.startswith(start)), "")
    return shlex.split(f"{words} {more}")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the README speaks of, made from its own blocks: `own_model.py`, `job.toml`, a run of the script in
    `runs/own`, its bundle copied as the README copies it, the student's float file as `model.onnx` and its inputs in `folder`."""
    pytest.importorskip("torch")
    pytest.importorskip("onnxruntime")
    place = tmp_path_factory.mktemp("readme")
    (place / "own_model.py").write_text(block("python", "edgekd.compress"), encoding="utf-8")
    (place / "job.toml").write_text(block("toml", "teacher ="), encoding="utf-8")
    words = [sys.executable, "own_model.py", "--target", "null", "--accept-simulated"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # tests share their machine
    done = subprocess.run(words, cwd=place, env=one_thread, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("pass:")
    for line in lines("sh"):
        if line.startswith("mkdir "):
            for part in line.split(" && "):
                subprocess.run(shlex.split(part), cwd=place, check=True, timeout=60)
    shutil.copy(next((place / "runs/own/bundle/float").glob("*.onnx")), place / "model.onnx")
    (place / "folder").mkdir()
    np.save(place / "folder" / "inputs.npy", np.load(place / "runs/own/bundle/evaluation/inputs-000.npy", allow_pickle=False))
    return place


def test_every_block_has_a_language_that_is_tested() -> None:
    assert {language for language, _ in BLOCKS} == LANGUAGES


def test_the_first_commands_are_the_two_that_do_everything() -> None:
    assert lines("sh")[:2] == ["make demo", "make test"]


def test_every_line_of_a_shell_block_is_of_a_kind_that_is_tested() -> None:
    kinds = ("make ", "edgekd ", "mkdir ", "pip install ", "python own_model.py", ".venv/bin/python -m pytest ")
    assert [line for line in lines("sh") if not line.startswith(kinds)] == []
    assert len(COMMANDS) > 12


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("command", COMMANDS)
def test_command_ends_well_when_led_to_the_null_target(
    command: str, workspace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(sys, "path", [*sys.path])
    torch.set_num_threads(1)
    code = cli.main(args=simulated(command), prog_name="edgekd", standalone_mode=False)
    seen = capfd.readouterr()
    assert code == 0, seen.out + seen.err
    words = shlex.split(command)
    for option in {"--junit", "--json", "--markdown", "-o"} & set(words):
        assert (workspace / words[words.index(option) + 1]).stat().st_size > 0


@pytest.mark.slow
@pytest.mark.torch
def test_the_students_of_script_and_job_can_be_rebuilt_by_name(workspace: Path) -> None:
    text = (workspace / "runs/own/bundle/student/spec.json").read_text(encoding="utf-8")
    assert '"own_model:make_net"' in text


def test_the_script_is_the_one_in_examples() -> None:
    assert block("python", "edgekd.compress") == (ROOT / "examples" / "own_model.py").read_text(encoding="utf-8")


def test_the_profile_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "my_board.toml"
    path.write_text(block("toml", "[runtime]"), encoding="utf-8")
    found = load_profile(str(path))
    assert (found.name, found.runtime.threads) == ("my_board", 2)
    assert not found.proven_on


def test_toml_blocks_are_toml_and_entry_points_name_groups_of_the_registry() -> None:
    groups = set(re.findall(r"`edgekd\.(\w+)`", TEXT)) & {"transports", "runtimes", "converters"}
    assert groups == {"transports", "runtimes", "converters"}
    for group in groups:
        assert registry.table(group)
    for text in [text for language, text in BLOCKS if language == "toml"]:
        for name in tomllib.loads(text).get("project", {}).get("entry-points", {}):
            assert registry.table(name.removeprefix("edgekd."))


@pytest.mark.parametrize("line", [line for line in lines("sh") if line.startswith("make ")])
def test_make_knows_the_targets(line: str) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    done = subprocess.run([*shlex.split(line), "--dry-run"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_installed_extras_exist_and_cpu_wheels_come_from_a_flag() -> None:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = set(parser["options.extras_require"])
    found = install_lines()
    assert len(found) >= 5
    for line in found:
        wanted = re.findall(r'"(?:edgekd|\.)(\[[\w,]+\])"', line)
        assert len(wanted) == 1, line
        assert Requirement(f"edgekd{wanted[0]}").extras <= extras
    assert [line for line in found if "uv pip install --torch-backend=cpu " in line]
    assert "http" not in "".join(found)
    assert "--index" not in "".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in lines("sh") if "pytest" in line])
def test_test_command_collects_tests(line: str) -> None:
    words = shlex.split(line)[1:]
    done = subprocess.run([sys.executable, *words, "--collect-only"], cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr


def test_demo_is_a_command_with_the_options_that_its_text_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(args=["demo", "--help"], prog_name="edgekd", standalone_mode=False) == 0
    assert "--run-dir" in capsys.readouterr().out


def test_files_and_folders_that_are_named_exist() -> None:
    own = {"own_model.py", "job.toml", "my_board.toml"}
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL))
    paths = [span for span in spans if re.fullmatch(r"[\w./-]+(\.md|\.py|\.toml|\.txt|/)", span) and span not in own and "NAME" not in span]
    paths = [path for path in paths if not path.startswith("./") and path != "converters/TARGET_from_SOURCE.py"]
    places = [ROOT, ROOT / "targets", ROOT / "docs"]
    assert len(paths) > 15
    assert [path for path in paths if not any((place / path).exists() for place in places)] == []


def test_contracts_and_suites_that_are_named_exist() -> None:
    suites = set(re.findall(r"`(\w+Contract)`", TEXT))
    assert suites == {name for name in testing.__all__ if name.endswith("Contract")}
    for name in ("Transport", "Runtime", "Converter"):
        assert f"class {name}(Protocol)" in (ROOT / "edgekd" / "contracts.py").read_text(encoding="utf-8")


def test_commands_in_running_text_exist() -> None:
    named = set(re.findall(r"`edgekd (\w+)", TEXT))
    assert named
    assert named <= set(cli.list_commands(None))  # type: ignore[arg-type]
