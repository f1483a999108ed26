"""Options of the tests that need a converter's environment: where the environments lie, and that a skip is a failure."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--environments FOLDER` and `--no-skips`."""
    parser.addoption("--environments", type=Path, default=None, help="the folder that holds the environments of converters")
    parser.addoption("--no-skips", action="store_true", help="a skipped test fails")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """With `--no-skips` a skipped test is a failed one."""
    report = yield
    if report.skipped and item.config.getoption("--no-skips", default=False):
        report.outcome = "failed"
        report.longrepr = f"skipped, which --no-skips forbids: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def home(pytestconfig: pytest.Config) -> Path | None:
    """The folder of the environments; nothing: the user's cache."""
    told = pytestconfig.getoption("--environments", default=None)
    return None if told is None else Path(told).absolute()


@pytest.fixture(scope="session")
def need(home: Path | None) -> Any:
    """A function that gives the options of a request for an environment, or skips the test where it was not made."""
    from edgekd.conversion.environments import environment_state, spec_of

    def options(name: str) -> dict[str, str]:
        state = environment_state(spec_of(name), home)
        if state.state != "ready":
            pytest.skip(f"the environment {name} is {state.state}: {state.remedy}")
        return {"environments": str(Path(state.folder).parent)}

    return options
