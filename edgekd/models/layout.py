"""Layout operators of a model, counted: those that move a whole tensor through memory, and those that only rename axes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

MOVING = frozenset({"Transpose", "TRANSPOSE"})
"""Operators that change the order of axes (ONNX, TFLite): every value moves."""

RENAMING = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "RESHAPE", "SQUEEZE", "EXPAND_DIMS"})
"""Operators that change the shape and leave the order of the values."""


@dataclass(frozen=True)
class LayoutOps:
    """Names of the layout operators of a model, in its order."""

    moving: tuple[str, ...]
    renaming: tuple[str, ...]

    def metadata(self) -> dict[str, str]:
        """As every artifact's metadata tell it: `layout_ops` counts both kinds, `transposes` those that move data."""
        return {"layout_ops": str(len(self.moving) + len(self.renaming)), "transposes": str(len(self.moving))}


def layout_ops(ops: Iterable[tuple[str, str]]) -> LayoutOps:
    """The layout operators among `ops`, pairs of name and kind in ONNX's or TFLite's words."""
    known = [(name, kind) for name, kind in ops if kind in MOVING | RENAMING]
    return LayoutOps(tuple(name for name, kind in known if kind in MOVING), tuple(name for name, kind in known if kind in RENAMING))
