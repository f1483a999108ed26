"""The null runtime passes the suite of all runtimes."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekd import registry
from edgekd.contracts import Runtime
from edgekd.settings.profile_file import load_profile
from edgekd.testing import RuntimeContract

pytest.importorskip("onnxruntime")


class TestNullRuntime(RuntimeContract):
    def make(self, tmp_path: Path) -> Runtime:
        profile = load_profile("null")
        transport = registry.load("transports", "local")(profile)
        runtime: Runtime = registry.load("runtimes", "null")(profile, transport)
        return runtime
