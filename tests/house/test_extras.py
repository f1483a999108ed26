"""The extras: what each adds and its size, what is missing of it, the line that helps, and that each is enough for what it is for."""

from __future__ import annotations

import configparser
import importlib.metadata
from pathlib import Path

import pytest

from edgekd import extras
from edgekd.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def test_extras_are_those_of_setup_cfg_without_development() -> None:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    assert set(extras.declared_extras()) == set(parser["options.extras_require"]) - {"dev", "testing"}


def test_an_installed_package_is_shown_with_its_version() -> None:
    row = extras.check_package("msgspec>=0.1")
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
    (row,) = extras.check_extras({"toys": (requirement, "msgspec")})
    assert problem in row.packages[0].problem
    assert not row.packages[1].problem
    assert not row.complete
    assert "-m pip install" in row.remedy
    assert "[toys]" in row.remedy


def test_an_extra_without_gaps_needs_no_remedy() -> None:
    (row,) = extras.check_extras({"toys": ("msgspec>=0.1", "click")})
    assert row.complete


def test_a_text_that_is_no_requirement_is_refused() -> None:
    with pytest.raises(ConfigError):
        extras.check_package("=== what")
    with pytest.raises(ConfigError, match="not understood"):
        extras.check_package("msgspec~=0.1")


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
    assert extras.version_fits(version, wanted) is fits


def test_every_extra_says_what_it_adds_and_how_large_it_is() -> None:
    declared, sizes = set(extras.declared_extras()), extras.extra_sizes()
    assert set(extras.ABOUT) == declared
    assert set(sizes.extras) == declared
    assert all(0 < size.size_mb < sizes.extras["all"].size_mb + sizes.base_mb + 200 and size.packages > 0 for size in sizes.extras.values())
    assert sizes.extras["x86"].size_mb < sizes.extras["distill"].size_mb
    for row in extras.check_extras():
        assert row.about
        assert row.size_mb == sizes.extras[row.extra].size_mb


def test_an_extra_that_names_others_holds_their_packages() -> None:
    rows = {row.extra: {item.package for item in row.packages} for row in extras.check_extras()}
    whole = next(row for row in extras.check_extras() if row.extra == "all")
    assert len(whole.packages) == len(rows["all"]), "a package is listed once"
    assert rows["all"] == rows["android"] | rows["distill"] | rows["jetson"] | rows["litert"] | rows["tensorflow"] | rows["x86"]
    (row,) = (row for row in extras.check_extras({"both": ("edgekd[one, two]",), "one": ("msgspec",), "two": ("click", "msgspec")}) if row.extra == "both")
    assert [item.package for item in row.packages] == ["msgspec", "click"]


def test_no_extra_asks_for_tensorrt_whose_package_cannot_be_built_without_nvidias_index() -> None:
    assert not [text for texts in extras.declared_extras().values() for text in texts if text.startswith("tensorrt")]
