"""The doctor: what is there, what is missing, the line that helps, and which targets open."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekd import doctor
from edgekd.records import Fingerprint
from edgekd.settings.profile_file import load_profile


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
