"""A run's record as one HTML file that needs no network, no scripts and no edgekd to be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from edgekd import __version__
from edgekd.records import Check, Fingerprint, HopParity, Launch, Limits, Measurement, Outcome, Snapshot
from edgekd.report import plots
from edgekd.report.data import ReportData
from edgekd.report.ladder import ladder
from edgekd.report.words import budget_text, change_cells, interval_text, ms_text, outcome_text, percentile_text, tolerance_text, unit_text
from edgekd.storage import write_atomic

_SIMULATED_WORDS = {
    "null": "the null target makes latencies up from the graph; nothing was timed",
    "emulated": "an emulator ran the model; its times are not those of the device",
    "fake": "a stand-in for a device answered",
}


@dataclass(frozen=True)
class Table:
    """A table for the template: columns, rows of texts, the caption, and which columns hold numbers."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[int, ...] = ()
    classes: tuple[str, ...] = ()


def write_report(data: ReportData, path: Path) -> None:
    """Write the report, whole or not at all. The same data give the same bytes.

    Raises:
        StorageError: the file could not be written.
    """
    write_atomic(path, render_report(data).encode())


def render_report(data: ReportData) -> str:
    """The report as HTML text. Everything from outside is escaped."""
    return fill("report.html.j2", {**run_context(data), "level": 1})


def fill(template: str, values: dict[str, Any]) -> str:
    """A template of this folder with values; a name that is missing is an error."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("edgekd.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)


def run_context(data: ReportData) -> dict[str, Any]:
    """What `run.html.j2` shows of a run, but for the `level` of its headings."""
    percentile = data.budget.percentile
    drawn = {
        "pareto": plots.pareto(data.points, data.limit_ms, data.metric),
        "launches": plots.launches(data.measurements, percentile, data.limit_ms),
        "distribution": plots.distribution(data.measurements, data.limit_ms),
        "ladder": ladder(data.parity),
    }
    training = [plot for plot in (plots.training(curve, index) for index, curve in enumerate(data.curves)) if plot is not None]
    return {
        "data": data,
        "version": __version__,
        "heading": "NO VERDICT: the run did not come that far" if data.verdict is None else outcome_text(data.verdict),
        "outcome": "none" if data.verdict is None else data.verdict.outcome.value,
        "simulated": _simulated(data),
        "budget": budget_text(data.budget, data.limit_ms),
        "facts": _facts(data),
        "checks": _checks(data),
        "figures": {name: plot and {"svg": Markup(plot.svg), "title": plot.title, "text": plot.text} for name, plot in drawn.items()},
        "training": [{"svg": Markup(plot.svg), "title": plot.title, "text": plot.text} for plot in training],
        "percentiles": _percentiles(data.measurements, percentile),
        "ledger": _ledger(data),
        "classes": _classes(data),
        "parity": _parity(data.parity),
        "conditions": _conditions(data.measurements),
        "rejected": _rejected(data.measurements),
        "device": _pairs("Device fingerprint", data.fingerprint.fields),
        "versions": _pairs("Versions", data.versions),
        "paths": _pairs("Files", data.paths),
        "search": ", ".join(f"{data.search_counts[name]} {name}" for name in sorted(data.search_counts, key=_search_order)),
        "launch_summary_only": [item.label for item in data.measurements if item.launches and not any(launch.samples_ns for launch in item.launches)],
    }


def _search_order(name: str) -> tuple[int, str]:
    order = ("proposed", "measured", "rejected")
    return (order.index(name) if name in order else len(order), name)


def _simulated(data: ReportData) -> str:
    kinds = [data.simulated, *([data.verdict.simulated] if data.verdict else []), *(item.simulated for item in data.measurements)]
    kind = next((kind for kind in kinds if kind), "")
    return f"{kind}: {_SIMULATED_WORDS.get(kind, 'the numbers do not come from a device')}" if kind else ""


def _facts(data: ReportData) -> tuple[tuple[str, str], ...]:
    """What ships, or was judged only, at a glance, and the verdict-grade latency of teacher and student."""
    ships = data.verdict is not None and data.verdict.outcome is Outcome.PASS
    rows = [("Target", data.target), ("Budget", budget_text(data.budget, data.limit_ms)), ("Task", data.task or "not stated")]
    rows += [(f"{'Ships' if ships else 'Judged'}: {name}", text) for name, text in data.shipped]
    for item in data.measurements:
        values = [value for value in (plots.launch_ms(launch, data.budget.percentile) for launch in item.launches) if value is not None]
        if values:
            middle = sorted(values)[len(values) // 2]
            rows.append((item.label, f"{ms_text(middle)} ({percentile_text(data.budget.percentile)}, median of {len(values)} launches)"))
    return tuple(rows)


def _pairs(caption: str, pairs: dict[str, str]) -> Table | None:
    return Table(caption, ("name", "value"), tuple((key, value) for key, value in sorted(pairs.items()))) if pairs else None


def _checks(data: ReportData) -> Table | None:
    if data.verdict is None or not data.verdict.checks:
        return None

    def cells(check: Check) -> tuple[str, ...]:
        value, limit = unit_text(check.value, check.unit), unit_text(check.limit, check.unit)
        return check.name, check.outcome.value, value, limit, interval_text(check), str(check.n), check.reason or "-"

    checks = data.verdict.checks
    columns = ("check", "outcome", "value", "limit", "interval (confidence)", "n", "note")
    return Table("Checks against the budget", columns, tuple(map(cells, checks)), (2, 3, 4, 5), tuple(check.outcome.value for check in checks))


def _percentiles(measurements: Sequence[Measurement], percentile: float) -> Table | None:
    from edgekd.stats import min_samples, percentile_of

    shown = sorted({50.0, 90.0, 99.0, percentile})
    rows = []
    for item in measurements:
        samples = [value for launch in item.launches for value in launch.samples_ns]
        if not samples:
            continue
        cells = [ms_text(percentile_of(samples, q) / 1e6) if len(samples) >= min_samples(q) else "too few" for q in shown]
        rows.append((item.label, *cells, ms_text(max(samples) / 1e6), _median_ms(item, "init_ns"), _median_ms(item, "first_ns"), str(len(samples))))
    columns = ("measurement", *map(percentile_text, shown), "largest", "initialization", "first inference", "inferences")
    return (
        Table(
            "Latency, pooled over valid launches; initialization and first inference are medians over launches",
            columns,
            tuple(rows),
            tuple(range(1, len(columns))),
        )
        if rows
        else None
    )


def _median_ms(item: Measurement, name: str) -> str:
    values = sorted(getattr(launch, name) for launch in item.launches)
    return ms_text(values[len(values) // 2] / 1e6) if values and values[-1] > 0 else "not measured"


def _ledger(data: ReportData) -> Table | None:
    rows = data.ledger.rows
    if not rows:
        return None
    kinds = {row.simulated for row in rows}
    everywhere = kinds.pop() if len(kinds) == 1 else ""
    marked = tuple(
        (
            row.stage,
            row.step if row.simulated == everywhere else f"{row.step} [simulated: {row.simulated or 'no'}]",
            row.decision,
            *change_cells(row),
            row.reason,
        )
        for row in rows
    )
    caption = f"Every step, before → after{f'; SIMULATED: {everywhere}' if everywhere else ''}"
    columns = ("stage", "step", "decision", "latency", data.metric, "size", "precision", "reason")
    return Table(caption, columns, marked, (3, 4, 5), tuple(row.decision.replace(" ", "-") for row in rows))


def _classes(data: ReportData) -> Table | None:
    rows = tuple(
        (row.name, str(row.n), f"{row.teacher_accuracy:.4f}", f"{row.student_accuracy:.4f}", f"{row.student_accuracy - row.teacher_accuracy:+.4f}")
        for row in data.per_class
    )
    return Table("Test split by class", ("class", "items", "teacher", "student", "difference"), rows, (1, 2, 3, 4)) if rows else None


def _parity(hops: Sequence[HopParity]) -> Table | None:
    rows, classes = [], []
    for hop in hops:
        for tensor in hop.tensors:
            found = [tensor.reason, *hop.findings] if tensor.reason else []
            found += [f"{tensor.nonfinite} values not finite"] if tensor.nonfinite else []
            found += ["output is constant"] if tensor.constant else []
            found += [f"first differs at {hop.first_bad}"] if hop.first_bad and not tensor.passed else []
            agreement = "-" if hop.agreement is None else f"{hop.agreement:.4f}"
            verdict = "same" if tensor.passed else "differs"
            errors = (f"{tensor.max_abs:.3g}", f"{tensor.max_rel:.1e}", f"{tensor.sqnr_db:.1f} dB")
            shares = ["-" if share is None else f"{share:.4f}" for share in (tensor.top1, tensor.saturation)]
            numbers = (*errors, tolerance_text(tensor), f"{tensor.cosine:.6f}", agreement, *shares, str(hop.samples))
            rows.append((hop.hop, tensor.name, verdict, *numbers, "; ".join(found) or "-"))
            classes.append("kept" if tensor.passed else "broken")
    errors_named = ("largest error", "of the largest value", "signal to error", "asked", "cosine")
    columns = ("hop", "output", "result", *errors_named, "agreement", "top-1", "saturated", "samples", "note")
    caption = "Each hop against the one before it, on real inputs; agreement is the task's, top-1 the same largest value, saturated the share at int8's ends"
    return Table(caption, columns, tuple(rows), (3, 4, 5, 7, 8, 9, 10, 11), tuple(classes)) if rows else None


def _range(values: Sequence[float | None], unit: str, digits: int) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "not readable on this device"
    low, high = f"{min(known):.{digits}f}", f"{max(known):.{digits}f}"
    return f"{low} {unit}".rstrip() if low == high else f"{low} to {high} {unit}".rstrip()


def _texts(values: Sequence[str | None]) -> str:
    return ", ".join(sorted({value for value in values if value})) or "not readable on this device"


def _limits_text(limits: Limits) -> str:
    parts = []
    for name in limits.__struct_fields__:
        value = getattr(limits, name)
        parts.append(f"{name.replace('_', ' ')} {'not checked' if value is None else format(value, '.3g')}")
    return "; ".join(parts)


def _conditions(measurements: Sequence[Measurement]) -> Table | None:
    """One column per measurement: what was run, how, and in which state the device was."""
    if not measurements:
        return None
    columns = []
    for item in measurements:
        shots: list[Snapshot] = [shot for launch in item.launches for shot in (launch.before, launch.after)]
        columns.append(
            (
                ("grade, mode", f"{item.grade.value}, {item.mode}"),
                ("valid", "yes" if item.valid else f"no: {item.reason}"),
                ("simulated", item.simulated or "no"),
                ("date", item.taken_at or "not recorded"),
                ("artifact SHA-256", item.artifact),
                ("runtime", _device_text(item.fingerprint)),
                ("launches", f"{len(item.launches)} valid, {len(item.rejected)} rejected; each a fresh process"),
                ("inferences", _inferences_text(item)),
                ("protocol", _protocol_text(item)),
                ("limits of validity", _limits_text(item.limits)),
                ("warm-up", _warmup_text(item.launches)),
                ("governor", _texts([shot.governor for shot in shots])),
                ("power mode", _texts([shot.power_mode for shot in shots])),
                ("clock", _range([shot.frequency_mhz for shot in shots], "MHz", 0)),
                ("load, 1 min", _range([shot.load_1m for shot in shots], "", 2)),
                ("stolen CPU time", _range([None if shot.steal_share is None else shot.steal_share * 100 for shot in shots], "%", 2)),
                ("temperature", _range([shot.temperature_c for shot in shots], "°C", 1)),
                ("CPU time over wall time", _range([launch.cpu_share for launch in item.launches], "", 3)),
                ("peak memory", _range([None if launch.peak_memory_bytes is None else launch.peak_memory_bytes / 1e6 for launch in item.launches], "MB", 1)),
            )
        )
    names = [name for name, _ in columns[0]]
    rows = tuple((name, *(column[index][1] for column in columns)) for index, name in enumerate(names))
    return Table("How each measurement was taken", ("condition", *(item.label for item in measurements)), rows)


def _device_text(fingerprint: Fingerprint) -> str:
    fields = fingerprint.fields
    parts = [f"{fields.get('runtime', 'unknown runtime')} {fields.get('runtime_version', '')}".strip(), f"{fields.get('threads', '?')} thread(s)"]
    return ", ".join([*parts, *([fields["cpu_model"]] if "cpu_model" in fields else [])])


def _protocol_text(item: Measurement) -> str:
    protocol = item.protocol
    return (
        f"at least {protocol.min_samples} inferences and {protocol.min_time_s:g} s, at most {protocol.max_time_s:g} s per launch; "
        f"inputs rotate over {protocol.rotation}; SHA-256 {protocol.digest()[:12]}"
    )


def _inferences_text(item: Measurement) -> str:
    taken, aside = sum(len(launch.samples_ns) for launch in item.launches), sum(launch.set_aside for launch in item.launches)
    looked = item.protocol.look_s > 0 and any(launch.sentinel_ns is not None for launch in item.launches)
    return f"{taken} counted, {aside} set aside beside a slow sentinel" if looked else f"{taken} counted"


def _warmup_text(launches: Sequence[Launch]) -> str:
    if not launches:
        return "no valid launch"
    return f"{_range([float(launch.warmup_runs) for launch in launches], 'inferences', 0)}, {_range([launch.warmup_s for launch in launches], 's', 2)}"


def _rejected(measurements: Sequence[Measurement]) -> Table | None:
    rows = tuple((item.label, str(launch.index), launch.invalid or "no reason recorded") for item in measurements for launch in item.rejected)
    return Table("Launches that do not count", ("measurement", "launch", "reason"), rows, (1,)) if rows else None
