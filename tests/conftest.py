"""Gives the helpers that several test files share pytest's readable assertions."""

import pytest

pytest.register_assert_rewrite("tests.contracts.tiny_models", "tests.core.fake_device", "tests.pipeline.bundle_kit", "tests.pipeline.pipeline_kit")
