"""A plug-in package as pip would leave it: a module and its entry points in a folder on `sys.path`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import pytest

_numbers = itertools.count()


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str, **groups: Mapping[str, str]) -> None:
    """The module `source` with its plug-ins until the test ends: `converters={"fake": "Fake"}` registers the class `Fake` under that name."""
    module = f"edgekd_plugin_under_test_{next(_numbers)}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{module}.py").write_text(source, encoding="utf-8")
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n", encoding="utf-8")
    lines: list[str] = []
    for group, names in groups.items():
        lines += [f"[edgekd.{group}]", *(f"{name} = {module}:{attribute}" for name, attribute in names.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
