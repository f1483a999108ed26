"""edgekd: from a trained teacher to the most accurate student that meets a latency budget, measured on the device."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "setup.cfg").is_file():  # a checkout: `edgekd.targets` and its neighbours lie beside this package
    __path__.append(str(_ROOT))

__version__ = "0.1.0"

_FACE = {
    "Arrays": "edgekd.data",
    "Budget": "edgekd.records",
    "Classification": "edgekd.tasks",
    "EdgekdError": "edgekd.errors",
    "Family": "edgekd.spaces",
    "Fixed": "edgekd.spaces",
    "MultiTask": "edgekd.tasks",
    "Options": "edgekd.options",
    "Regression": "edgekd.tasks",
    "Result": "edgekd.result",
    "bench": "edgekd.benching",
    "compress": "edgekd.pipeline",
    "compress_for": "edgekd.fleet",
    "connect": "edgekd.target",
    "convert": "edgekd.conversion.convert",
    "gate": "edgekd.gating",
    "preflight": "edgekd.operators.preflight",
    "validate": "edgekd.gating",
}

__all__ = [
    "Arrays",
    "Budget",
    "Classification",
    "EdgekdError",
    "Family",
    "Fixed",
    "MultiTask",
    "Options",
    "Regression",
    "Result",
    "__version__",
    "bench",
    "compress",
    "compress_for",
    "connect",
    "convert",
    "gate",
    "preflight",
    "validate",
]

if TYPE_CHECKING:
    from edgekd.benching import bench as bench
    from edgekd.conversion.convert import convert as convert
    from edgekd.data import Arrays as Arrays
    from edgekd.errors import EdgekdError as EdgekdError
    from edgekd.fleet import compress_for as compress_for
    from edgekd.gating import gate as gate
    from edgekd.gating import validate as validate
    from edgekd.operators.preflight import preflight as preflight
    from edgekd.options import Options as Options
    from edgekd.pipeline import compress as compress
    from edgekd.records import Budget as Budget
    from edgekd.result import Result as Result
    from edgekd.spaces import Family as Family
    from edgekd.spaces import Fixed as Fixed
    from edgekd.target import connect as connect
    from edgekd.tasks import Classification as Classification
    from edgekd.tasks import MultiTask as MultiTask
    from edgekd.tasks import Regression as Regression


def __getattr__(name: str) -> Any:
    if name in _FACE:
        return getattr(importlib.import_module(_FACE[name]), name)
    raise AttributeError(f"module 'edgekd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
