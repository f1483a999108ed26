"""The report of one teacher on several targets: every verdict side by side, then each run as its own report shows it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from edgekd import __version__
from edgekd.records import Check, Outcome
from edgekd.report.data import ReportData
from edgekd.report.render import Table, fill, run_context
from edgekd.report.words import interval_text, unit_text
from edgekd.storage import write_atomic
from edgekd.verdict import worst

_NONE = "-"


def write_fleet_report(reports: Sequence[ReportData], waiting: Sequence[str], path: Path) -> None:
    """Write the page, whole or not at all. `waiting` names the targets whose run has not ended. The same data give the same bytes.

    Raises:
        StorageError: the file could not be written.
    """
    write_atomic(path, render_fleet_report(reports, waiting).encode())


def render_fleet_report(reports: Sequence[ReportData], waiting: Sequence[str] = ()) -> str:
    """The page as HTML text, one section per run. Everything from outside is escaped."""
    sections = []
    for number, data in enumerate(reports):
        prefix = f"t{number}-"
        section = fill("run.html.j2", {**run_context(data), "level": 2})
        sections.append({"prefix": prefix, "data": data, "html": Markup(_scoped(section, prefix))})
    verdicts = [data.verdict for data in reports if data.verdict is not None]
    ended = not waiting and len(verdicts) == len(reports)
    outcome = worst(verdict.outcome for verdict in verdicts).value if verdicts and ended else "none"
    counted = ", ".join(f"{sum(verdict.outcome is kind for verdict in verdicts)} {kind.value}" for kind in (Outcome.PASS, Outcome.REFUSE, Outcome.FAIL))
    lines = [f"{data.target}: {_NONE if data.verdict is None else f'{data.verdict.outcome.value}: {data.verdict.reason}'}" for data in reports]
    return fill(
        "fleet.html.j2",
        {
            "title": f"One teacher, {len(reports) + len(waiting)} targets",
            "created_at": max((data.created_at for data in reports), default="no run has ended"),
            "version": __version__,
            "outcome": outcome,
            "heading": f"{outcome.upper()}: {counted}" if ended else f"NOT FINISHED: {counted}, {len(waiting)} to come",
            "reasons": [*lines, *(f"{name}: not finished" for name in waiting)],
            "simulated": [data.target for data in reports if data.simulated],
            "summary": _summary(reports, waiting),
            "sections": sections,
        },
    )


def _summary(reports: Sequence[ReportData], waiting: Sequence[str]) -> Table:
    columns = ("target", "verdict", "artifact", "format", "precision", "latency", "limit", "size", "score", "drop, interval (confidence)")
    rows = [_row(data) for data in reports]
    rows += [(name, "not finished", *[_NONE] * (len(columns) - 2)) for name in waiting]
    classes = [_NONE if data.verdict is None else data.verdict.outcome.value for data in reports] + ["none"] * len(waiting)
    return Table("What each target was given, and its verdict; latency and drop as judged, on the target", columns, tuple(rows), (5, 6, 7), tuple(classes))


def _row(data: ReportData) -> tuple[str, ...]:
    told = dict(data.shipped)
    checks = {check.name: check for check in (data.verdict.checks if data.verdict else ())}
    latency, drop = checks.get("latency"), next((check for name, check in checks.items() if name.startswith("accuracy")), None)
    mark = f" (simulated: {data.simulated})" if data.simulated else ""
    return (
        data.target + mark,
        "none" if data.verdict is None else data.verdict.outcome.value,
        told.get("artifact", "none"),
        told.get("format", _NONE),
        told.get("precision", _NONE),
        _value(latency),
        _NONE if latency is None else unit_text(latency.limit, latency.unit),
        told.get("size", _NONE),
        told.get(data.metric, _NONE),
        _NONE if drop is None else f"{_value(drop)}, {interval_text(drop)}",
    )


def _value(check: Check | None) -> str:
    return _NONE if check is None else unit_text(check.value, check.unit)


def _scoped(section: str, prefix: str) -> str:
    """The section with ids of its own, so that several fit into one page. Text from outside is escaped already and holds no quotes."""
    section = re.sub(r'\b(id|for)="([^"]+)"', rf'\1="{prefix}\2"', section)
    section = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}\1"', section)
    section = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}\1)", section)
    return re.sub(r'aria-labelledby="([^"]+)"', lambda match: 'aria-labelledby="' + " ".join(prefix + name for name in match.group(1).split()) + '"', section)
