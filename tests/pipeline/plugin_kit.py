"""Runtimes of another package, made from the null runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.contracts.plug_in import install

_HEAD = """import numpy as np

from edgekd.artifact import store_artifact
from edgekd.registry import load
from msgspec.structs import replace

Null = load("runtimes", "null")
"""


def install_runtimes(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str, names: Mapping[str, str]) -> None:
    """Runtimes by entry points until the test ends: `names` maps each to a class in `source`, where `Null` is the null runtime."""
    install(folder, monkeypatch, _HEAD + source, runtimes=names)
