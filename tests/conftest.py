"""Lets tests import the abstract suites of `tests/contracts` as `contracts.…`, with pytest's readable assertions."""

import pytest

pytest.register_assert_rewrite("contracts.transport_contract", "contracts.runtime_contract")
