"""A runtime plug-in as pip would leave it: a module and its entry points in a folder on `sys.path`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import pytest

_HEAD = """import numpy as np

from edgekd.artifact import store_artifact
from edgekd.registry import load
from msgspec.structs import replace

Null = load("runtimes", "null")
"""
_numbers = itertools.count()


def install_runtimes(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str, names: Mapping[str, str]) -> None:
    """Runtimes by entry points until the test ends: `names` maps each to a class in `source`, where `Null` is the null runtime."""
    module = f"edgekd_plugin_under_test_{next(_numbers)}"
    folder.mkdir()
    (folder / f"{module}.py").write_text(_HEAD + source, encoding="utf-8")
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n", encoding="utf-8")
    lines = "".join(f"{name} = {module}:{attribute}\n" for name, attribute in names.items())
    (info / "entry_points.txt").write_text(f"[edgekd.runtimes]\n{lines}", encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
