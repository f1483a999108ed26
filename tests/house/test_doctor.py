"""The doctor: what is there, what is missing, the line that helps, and which targets open."""

from __future__ import annotations

import configparser
import importlib.metadata
from pathlib import Path

import pytest

from edgekd import doctor
from edgekd.errors import ConfigError
from edgekd.records import Fingerprint
from edgekd.settings.profile_file import load_profile

ROOT = Path(__file__).resolve().parents[2]


def test_extras_are_those_of_setup_cfg_without_development() -> None:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    assert set(doctor.declared_extras()) == set(parser["options.extras_require"]) - {"dev", "testing"}


def test_an_installed_package_is_shown_with_its_version() -> None:
    row = doctor.check_package("msgspec>=0.1")
    assert (row.version, row.problem) == (importlib.metadata.version("msgspec"), "")


@pytest.mark.parametrize(
    ("requirement", "problem"),
    [
        ("edgekd-no-such-package>=1", "not installed"),
        ("msgspec>=999", "does not fit >=999"),
        ("msgspec<0.1", "does not fit <0.1"),
        ("numpy >=999 ; extra == 'x86'", "does not fit >=999"),
    ],
)
def test_a_missing_or_old_package_is_a_problem_with_a_remedy(requirement: str, problem: str) -> None:
    (row,) = doctor.check_extras({"toys": (requirement, "msgspec")})
    assert problem in row.packages[0].problem
    assert not row.packages[1].problem
    assert not row.complete
    assert "-m pip install" in row.remedy
    assert "[toys]" in row.remedy


def test_an_extra_without_gaps_needs_no_remedy() -> None:
    (row,) = doctor.check_extras({"toys": ("msgspec>=0.1", "click")})
    assert row.complete


def test_a_text_that_is_no_requirement_is_refused() -> None:
    with pytest.raises(ConfigError):
        doctor.check_package("=== what")
    with pytest.raises(ConfigError, match="not understood"):
        doctor.check_package("msgspec~=0.1")


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [
        ("1.32.0", ">=1.20", True),
        ("1.9", ">=1.10", False),
        ("2.13.0+cpu", ">=2.13", True),
        ("2.0rc1", ">=2", True),
        ("2.0", "<2", False),
        ("1.9", ">=1,<2", True),
        ("1.0", "==1", True),
        ("1.0.1", "==1", False),
        ("1.5", "!=1.5", False),
        ("3", ">3", False),
        ("3", "<=3", True),
        ("3", "", True),
    ],
)
def test_versions_are_compared_number_by_number(version: str, wanted: str, fits: bool) -> None:
    assert doctor.version_fits(version, wanted) is fits


@pytest.mark.parametrize(("system", "machine"), [("Linux", "x86_64"), ("Linux", "aarch64")])
def test_supported_architectures_have_no_problem(system: str, machine: str) -> None:
    assert doctor.architecture_problem(system, machine) == ""


@pytest.mark.parametrize(("system", "machine"), [("Linux", "armv7l"), ("Linux", "riscv64"), ("Windows", "AMD64"), ("Darwin", "arm64")])
def test_an_architecture_without_wheels_is_named_with_what_to_do(system: str, machine: str) -> None:
    text = doctor.architecture_problem(system, machine)
    assert machine in text
    assert "aarch64" in text
    assert "next step" in text


def test_targets_are_opened_or_say_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "profiles"
    folder.mkdir()
    (folder / "broken.toml").write_text('description = "d"\nthread = 1\n', encoding="utf-8")
    (folder / "gone.toml").write_text('description = "d"\nruntime.kind = "onnxruntim"\n', encoding="utf-8")
    (folder / "picky.toml").write_text('description = "d"\nruntime = { kind = "null", options = { noise = 9.0 } }\n', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    rows = {row.profile: row for row in doctor.check_targets()}
    assert rows["null"].ready
    assert rows["null"].simulated == "null"
    assert not rows["null"].proven_on_hardware
    assert rows["null"].device["runtime"] == "null"
    assert rows["local"].proven_on_hardware is load_profile("local").proven_here(Fingerprint(fields=rows["local"].device))
    assert rows["local"].hardware.startswith("yes: " if rows["local"].proven_on_hardware else "never ran on real hardware of this kind")
    untried = {row.profile: row for row in doctor.check_targets(open_them=False)}
    assert (untried["local"].proven_on_hardware, untried["null"].hardware) == (None, "never ran on real hardware")
    assert untried["local"].hardware.startswith("on x86_64 avx512 vnni")
    for name, says in (("broken", "thread"), ("gone", "onnxruntime (did you mean this?)"), ("picky", "noise")):
        assert not rows[name].ready
        assert says in rows[name].problem
    assert rows["broken"].remedy == f"correct {Path('profiles') / 'broken.toml'}"
    assert rows["gone"].remedy


def test_targets_can_be_listed_without_opening_them() -> None:
    rows = doctor.check_targets(open_them=False)
    assert {"local", "null"} <= {row.profile for row in rows}
    assert not [row for row in rows if row.tried or row.ready or row.device]


def test_the_whole_account_is_read_back_as_json() -> None:
    found = doctor.diagnose()
    assert doctor.Diagnosis.from_json(found.to_json()) == found
    assert found.edgekd
    assert found.python.count(".") >= 1
