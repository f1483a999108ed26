"""Gives the helpers that several test files share pytest's readable assertions."""

import sys
from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite("tests.contracts.tiny_models", "tests.core.fake_device", "tests.pipeline.bundle_kit", "tests.pipeline.pipeline_kit")


@pytest.fixture
def fresh_example_modules() -> Iterator[None]:
    """The example job's `data` and `model` are loaded anew for the test, and are forgotten behind it: a copy of the job has modules of the same names."""
    names = ("data", "model")
    for name in names:
        sys.modules.pop(name, None)
    yield
    for name in names:
        sys.modules.pop(name, None)
