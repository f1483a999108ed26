"""The parity ladder as a figure: one row per hop, with a bar of signal to error for each output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgekd.parity.measures import SQNR_CAP_DB
from edgekd.records import HopParity, TensorParity
from edgekd.report.plots import _INK, _LIMIT, _MUTED, _PANEL, _STUDENT, Plot, _draw, _legend

_AXIS_END_DB = 150.0
_AXIS_START_DB = -20.0
_MOST_BARS = 4
_BAR_IN, _ROW_IN, _FRAME_IN = 0.24, 0.16, 1.1


def ladder(hops: Sequence[HopParity]) -> Plot | None:
    """The hops of the road from top to bottom. A hop with more than four outputs shows the four with the least signal to error.

    Bars end at -20 and 150 dB; the number beside each is the measured one. `None` without hops.
    """
    rows = [(hop, sorted(hop.tensors, key=lambda row: (row.passed, row.sqnr_db))[:_MOST_BARS]) for hop in hops if hop.tensors]
    if not rows:
        return None
    several = any(len(shown) > 1 for _, shown in rows)
    total = sum(len(shown) for _, shown in rows)

    def paint(axes: list[Any]) -> None:
        axis, at, ticks, labels, asked = axes[0], 0.0, [], [], False
        said: set[str] = set()
        for hop, shown in rows:
            ticks.append(at + (len(shown) - 1) / 2)
            labels.append(hop.hop)
            for row in shown:
                word = "same" if row.passed else "differs"
                colour = _STUDENT if row.passed else _LIMIT
                length = min(max(row.sqnr_db, _AXIS_START_DB), _AXIS_END_DB)
                axis.barh(at, length, height=0.72, color=colour, label=None if word in said else word)
                said.add(word)
                inside = length > 0.6 * _AXIS_END_DB
                mark = row.tolerance if row.tolerance_kind == "sqnr" else 0.0
                text = (f"{row.name} " if several else "") + _measured(row) + ("" if row.passed else ", differs")
                place, side, ink = (length - 2, "right", _PANEL) if inside else (max(length, mark, 0.0) + 2, "left", _INK)
                axis.text(place, at, text, va="center", ha=side, fontsize=9, color=ink)
                if row.tolerance_kind == "sqnr":
                    axis.plot([row.tolerance] * 2, [at - 0.45, at + 0.45], color=_MUTED, linewidth=2.0, label=None if asked else "asked of int8")
                    asked = True
                at += 1
            at += _ROW_IN / _BAR_IN
        axis.axvline(0, color=_MUTED, linewidth=1.0)
        axis.set_yticks(ticks, labels)
        axis.set_ylim(at - _ROW_IN / _BAR_IN - 0.4, -0.6)
        axis.set_xlim(min(0.0, *(max(row.sqnr_db, _AXIS_START_DB) for _, shown in rows for row in shown)), _AXIS_END_DB)
        axis.set_xlabel("signal to error, dB")
        axis.grid(False, axis="y")
        _legend(axis, 3)

    bad = next((hop for hop, _ in rows if not hop.passed), None)
    text = "; ".join(f"{hop.hop}: {', '.join(f'{row.name} {_measured(row)}' for row in shown)}" for hop, shown in rows)
    text += f". The first hop that differs is {bad.hop}" if bad is not None else ". No hop differs beyond its tolerance"
    return _draw("ladder", "Parity ladder", f"{text}.", _FRAME_IN + total * _BAR_IN + len(rows) * _ROW_IN, paint)


def _measured(row: TensorParity) -> str:
    """The signal to error in words: `exact`, no number, or decibel; with the layout in which it was taken, if it was swapped."""
    if row.nonfinite:
        return "NaN or Inf"
    if row.sqnr_db <= -SQNR_CAP_DB:
        return "not comparable"
    text = "exact" if row.sqnr_db >= SQNR_CAP_DB else f"{row.sqnr_db:.1f} dB"
    return f"{text} after {row.layout}" if row.layout else text
