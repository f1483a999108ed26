"""What holds for all tests: readable assertions in the helpers that several files share, and examples that neither chance nor a slow machine changes."""

import sys
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("edgekd", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("edgekd")
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
