"""The error tree: the drawing equals the classes, and a message says what, found, allowed and next step."""

from __future__ import annotations

import re

import pytest

from edgekd import errors
from edgekd.errors import EdgekdError, MissingDependency, near_names


def drawn_tree() -> dict[str, str]:
    """Class to parent, as drawn in the module's docstring."""
    parents: dict[str, str] = {}
    stack: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^([│├└─ ]*)([A-Z]\w+)(?:\s{2,}(\S.*))?$", line)
        if not match or match[2] not in vars(errors):
            continue
        depth = len(match[1]) // 4
        stack = [*stack[:depth], match[2]]
        parents[match[2]] = stack[depth - 1] if depth else ""
    return parents


def real_tree() -> dict[str, str]:
    def walk(cls: type[EdgekdError], parent: str) -> dict[str, str]:
        found = {cls.__name__: parent}
        for child in cls.__subclasses__():
            if child.__module__ == errors.__name__:
                found |= walk(child, cls.__name__)
        return found

    return walk(EdgekdError, "")


def test_the_drawn_tree_is_the_real_one() -> None:
    assert len(real_tree()) > 15
    assert drawn_tree() == real_tree()


def test_every_error_has_a_docstring_and_exits_with_3_unless_it_is_a_refusal() -> None:
    for name in real_tree():
        cls = getattr(errors, name)
        assert cls.__doc__, name
        assert cls.exit_code == (errors.EXIT_REFUSE if name == "MeasurementInvalid" else errors.EXIT_ERROR), name


def test_exit_codes_are_those_promised() -> None:
    assert (errors.EXIT_PASS, errors.EXIT_FAIL, errors.EXIT_REFUSE, errors.EXIT_ERROR, errors.EXIT_INTERRUPTED) == (0, 1, 2, 3, 130)


def test_a_message_has_its_four_parts_and_its_subject() -> None:
    error = EdgekdError("the box is shut.", found="a lid", allowed="no lid", hint="open it", subject="box")
    assert str(error) == "the box is shut; found: a lid; allowed: no lid; next step: open it"
    assert (error.what, error.found, error.allowed, error.hint, error.subject) == ("the box is shut.", "a lid", "no lid", "open it", "box")
    assert str(EdgekdError("short")) == "short"


def test_a_found_zero_is_shown() -> None:
    assert "found: 0" in str(EdgekdError("w", found=0))


def test_a_missing_package_tells_the_line_that_installs_it() -> None:
    error = MissingDependency("onnxruntime", "x86", purpose="the runtime")
    assert error.hint == 'pip install "edgekd[x86]"'
    assert (error.package, error.extra) == ("onnxruntime", "x86")


@pytest.mark.parametrize(
    ("name", "known", "text"),
    [
        ("locl", ["null", "local"], "local (did you mean this?), null"),
        ("zzz", ["null", "local"], "local, null"),
        ("x", [], "(none)"),
    ],
)
def test_near_names_come_first(name: str, known: list[str], text: str) -> None:
    assert near_names(name, known) == text
