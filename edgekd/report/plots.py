"""The report's figures as inline SVG whose colours are CSS variables, so that they follow light and dark."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.records import Launch, Measurement, Point
from edgekd.report.data import Curve
from edgekd.report.words import ms_text, percentile_text
from edgekd.stats import percentile_of

_VARIABLES = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--grid)",
    "#040404": "var(--teacher)",
    "#050505": "var(--student)",
    "#060606": "var(--candidate)",
    "#070707": "var(--limit)",
    "#080808": "var(--panel)",
}
"""Colours that matplotlib draws with, and the CSS variables that take their place."""
_INK, _MUTED, _GRID, _TEACHER, _STUDENT, _CANDIDATE, _LIMIT, _PANEL = _VARIABLES
_WIDTH_IN = 6.2
_CDF_POINTS = 400


@dataclass(frozen=True)
class Plot:
    """An inline SVG, its title, and the same in words for those who do not see it."""

    svg: str
    title: str
    text: str


def _figure(height_in: float, panels: int = 1) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained")
    axes = [figure.add_subplot(1, panels, index + 1) for index in range(panels)]
    figure.patch.set_alpha(0.0)
    for axis in axes:
        axis.patch.set_alpha(0.0)
        axis.grid(True, color=_GRID, linewidth=0.7)
        axis.set_axisbelow(True)
        for side in axis.spines.values():
            side.set_color(_MUTED)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=_INK)
    return figure, axes


def _style(salt: str) -> dict[str, Any]:
    return {
        "svg.hashsalt": f"edgekd-{salt}",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 10.5,
        "text.parse_math": False,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _MUTED,
        "legend.frameon": False,
        "path.simplify": False,
    }


def _draw(name: str, title: str, text: str, height_in: float, paint: Any, panels: int = 1) -> Plot:
    """The plot that `paint(axes)` draws; the same data give the same bytes."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        settings: Any = matplotlib.rcParams
        settings.update(_style(name))
        figure, axes = _figure(height_in, panels)
        paint(axes)
        stream = io.StringIO()
        canvas: Any = FigureCanvasSVG(figure)
        canvas.print_svg(stream, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return Plot(_inline(stream.getvalue(), name, title, text), title, text)


def _inline(svg: str, name: str, title: str, text: str) -> str:
    """The SVG element for use inside HTML: own ids, CSS colours, a title and a description."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    box = re.search(r'viewBox="[^"]+"', svg)
    head = f'<svg {box.group(0) if box else ""} class="plot" role="img" aria-labelledby="{name}-title {name}-desc">'
    head += f'<title id="{name}-title">{html.escape(title)}</title><desc id="{name}-desc">{html.escape(text)}</desc>'
    return re.sub(r"\s*\n\s*", "\n", head + svg[svg.index(">") + 1 :].strip())


def _limit_line(axis: Any, limit_ms: float, label: str = "budget") -> None:
    axis.axvline(limit_ms, color=_LIMIT, linewidth=1.8, linestyle=(0, (5, 3)), label=f"{label} {ms_text(limit_ms)}")


def _legend(axis: Any, columns: int = 2) -> None:
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, handletextpad=0.5, columnspacing=1.2, borderaxespad=0.2)


_ROLES = (("candidate", "o", _CANDIDATE, 5.0), ("teacher", "s", _TEACHER, 8.0), ("student", "D", _STUDENT, 8.0))


def pareto(points: Sequence[Point], limit_ms: float | None, metric: str) -> Plot | None:
    """Latency against the metric, a point with its interval for each candidate; without any point, `None`.

    Candidates that were never trained have no metric; they stand in a rug along the bottom.
    """
    if not points:
        return None
    scored = [point for point in points if point.accuracy is not None]
    rug = [point for point in points if point.accuracy is None]

    def paint(axes: list[Any]) -> None:
        axis = axes[0]
        for role, marker, colour, size in _ROLES:
            chosen = [point for point in scored if point.role == role or (role == "candidate" and point.role not in ("teacher", "student"))]
            if not chosen:
                continue
            x = np.array([point.latency_ms for point in chosen])
            error = np.array([[max(0.0, p.latency_ms - p.lower_ms) for p in chosen], [max(0.0, p.upper_ms - p.latency_ms) for p in chosen]])
            axis.errorbar(
                x,
                [point.accuracy for point in chosen],
                xerr=error,
                fmt=marker,
                color=colour,
                markersize=size,
                capsize=3,
                linewidth=1.2,
                label=role if role != "candidate" else "candidates",
                zorder=4 if role != "candidate" else 3,
            )
            for point in chosen if role != "candidate" else ():
                axis.annotate(point.precision, (point.latency_ms, point.accuracy), xytext=(6, 6), textcoords="offset points", fontsize=9, color=colour)
        if rug:
            base = 0.02
            axis.plot(
                [point.latency_ms for point in rug],
                [base] * len(rug),
                "|",
                color=_CANDIDATE,
                markersize=12,
                transform=axis.get_xaxis_transform(),
                label="measured, not trained",
            )
        if limit_ms is not None:
            _limit_line(axis, limit_ms)
        latencies = [point.latency_ms for point in points]
        if max(latencies) > 8 * max(min(latencies), 1e-9) and min(latencies) > 0:
            _log_axis(axis, latencies, limit_ms)
        else:
            axis.set_xlim(left=0)
        axis.set_xlabel("latency (ms)")
        axis.set_ylabel(f"{metric}, validation" if scored else "")
        if not scored:
            axis.set_yticks([])
            axis.set_ylim(0, 1)
        elif len({point.accuracy for point in scored}) == 1:
            axis.set_ylim(float(scored[0].accuracy or 0) - 0.05, float(scored[0].accuracy or 0) + 0.05)
        _legend(axis)

    described = "; ".join(_point_text(point, metric) for point in points if point.role in ("teacher", "student"))
    text = f"{len(points)} measured points, {len(scored)} of them with {metric}. {described}. Bars are the confidence limits of the latency."
    return _draw("pareto", f"Latency against {metric}", text, 4.0, paint)


def _point_text(point: Point, metric: str) -> str:
    name = point.role if point.label == point.role else f"{point.role} {point.label}"
    scored = "" if point.accuracy is None else f" {metric} {point.accuracy:.4f}"
    return f"{name} {point.precision} {ms_text(point.latency_ms)}{scored}"


def _log_axis(axis: Any, latencies: Sequence[float], limit_ms: float | None) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_xscale("log")
    values = [*latencies, *([limit_ms] if limit_ms else [])]
    low, high = min(values) / 1.3, max(values) * 1.3
    axis.set_xlim(low, high)
    steps = (1, 2, 5) if high / low < 300 else (1,)
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    axis.xaxis.set_major_locator(FixedLocator([step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def launch_ms(launch: Launch, percentile: float) -> float | None:
    """A launch's percentile in milliseconds; of a summary its largest value; `None` when it holds no times."""
    if launch.samples_ns:
        return percentile_of(launch.samples_ns, percentile) / 1e6
    return launch.summary_ns["max"] / 1e6 if "max" in launch.summary_ns else None


def _colours(count: int) -> list[str]:
    return [_STUDENT] if count == 1 else [_TEACHER, _STUDENT, *[_CANDIDATE] * (count - 2)][:count]


def launches(measurements: Sequence[Measurement], percentile: float, limit_ms: float | None) -> Plot | None:
    """One mark per launch at its percentile, a row per measurement; launches that were rejected are crosses."""

    def times(group: Sequence[Launch]) -> list[float | None]:
        return [launch_ms(launch, percentile) for launch in group]

    rows = [(item, times(item.launches), times(item.rejected)) for item in measurements]
    if not any(value is not None for _, kept, rejected in rows for value in (*kept, *rejected)):
        return None

    def paint(axes: list[Any]) -> None:
        axis = axes[0]
        shown: list[float] = []
        for row, ((_, kept, rejected), colour) in enumerate(zip(rows, _colours(len(rows)), strict=True)):
            for values, marker, fill in ((kept, "o", colour), (rejected, "x", _MUTED)):
                found = [value for value in values if value is not None]
                shown += found
                spread = [row + (index % 5 - 2) * 0.09 for index in range(len(found))]
                axis.plot(found, spread, marker, color=fill, markersize=5, alpha=0.85, linestyle="none")
        if limit_ms is not None:
            _limit_line(axis, limit_ms)
            _legend(axis, 1)
        if min(shown) > 0 and max(shown) > 8 * min(shown):
            _log_axis(axis, shown, limit_ms)
        axis.set_yticks(range(len(rows)), [item.label for item, _, _ in rows])
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_xlabel(f"{percentile_text(percentile)} of a launch (ms)")

    text = ". ".join(_spread_text(item.label, kept, len(item.rejected), percentile) for item, kept, _ in rows) + "."
    return _draw("launches", f"{percentile_text(percentile)} latency of every launch", text, 1.5 + 0.55 * len(rows), paint)


def _spread_text(label: str, kept: Sequence[float | None], rejected: int, percentile: float) -> str:
    values = [value for value in kept if value is not None]
    spread = f"{percentile_text(percentile)} from {ms_text(min(values))} to {ms_text(max(values))}" if values else "no valid times"
    return f"{label}: {len(values)} valid launches, {spread}; {rejected} rejected"


def _pooled_ms(measurement: Measurement) -> NDArray[np.float64]:
    return np.sort(np.array([value for launch in measurement.launches for value in launch.samples_ns], dtype=np.float64)) / 1e6


def distribution(measurements: Sequence[Measurement], limit_ms: float | None) -> Plot | None:
    """The share of inferences that finish within a time, pooled over valid launches; `None` where devices gave summaries only.

    The curve runs from the first to the 99.9th percentile on at most 400 points; the largest value is in the words.
    """
    pooled = [(item.label, _pooled_ms(item), colour) for item, colour in zip(measurements, _colours(len(measurements)), strict=True)]
    pooled = [row for row in pooled if row[1].size]
    if not pooled:
        return None
    shares = np.linspace(0.0, 0.999, _CDF_POINTS)

    def paint(axes: list[Any]) -> None:
        axis = axes[0]
        shown: list[float] = []
        for label, values, colour in pooled:
            curve = values[np.minimum((shares * values.size).astype(int), values.size - 1)]
            shown += [float(curve[0]), float(curve[-1])]
            axis.plot(curve, shares * 100, color=colour, linewidth=2.2, label=label)
        if limit_ms is not None:
            _limit_line(axis, limit_ms)
        if min(shown) > 0 and max(shown) > 8 * min(shown):
            _log_axis(axis, shown, limit_ms)
        axis.set_ylim(0, 102)
        axis.set_xlabel("latency of one inference (ms)")
        axis.set_ylabel("inferences within (%)")
        _legend(axis, 3)

    text = ". ".join(
        f"{label}: {values.size} inferences, "
        + ", ".join(f"{percentile_text(q)} {ms_text(percentile_of(values, q))}" for q in (50.0, 90.0, 99.0))
        + f", largest {ms_text(float(values[-1]))}"
        for label, values, _ in pooled
    )
    return _draw("distribution", "Share of inferences within a time", f"{text}.", 3.2, paint)


def training(curve: Curve, index: int) -> Plot | None:
    """Training loss and validation metric per epoch, side by side; `None` when neither was recorded."""
    panels = [(name, values) for name, values in (("training loss", curve.train_loss), (f"validation {curve.metric}", curve.validation)) if values]
    if not panels:
        return None

    def paint(axes: list[Any]) -> None:
        for axis, (name, values), colour in zip(axes, panels, (_CANDIDATE, _STUDENT), strict=False):
            axis.plot(range(1, len(values) + 1), values, color=colour, linewidth=2.0, marker="o" if len(values) < 15 else "", markersize=4)
            axis.set_title(name, fontsize=10.5)
            axis.set_xlabel("epoch")
            axis.xaxis.get_major_locator().set_params(integer=True, nbins=5)

    text = ". ".join(f"{name}: {values[0]:.4g} in the first of {len(values)} epochs, {values[-1]:.4g} in the last" for name, values in panels)
    return _draw(f"training{index}", f"Training of {curve.label}", f"{text}.", 2.7, paint, len(panels))
