"""What a run leaves, as the one record that the report draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from edgekd.bundle import versions
from edgekd.measuring.launching import utc_now
from edgekd.records import HopParity, Ledger, LedgerRow, Measurement, Point, Verdict
from edgekd.report.data import ClassRow, Curve, ReportData
from edgekd.report.words import artifact_name, size_text
from edgekd.steps.context import Context
from edgekd.steps.distil import DistilOut
from edgekd.steps.search import SearchOut
from edgekd.steps.validate import ValidateOut


def mark_chosen(points: Sequence[Point], validated: ValidateOut) -> list[Point]:
    """The points with the role `student` for the one that was judged alone; what else was made of a student is `tried`."""
    chosen = validated.artifact.precision.value
    out = []
    judged: int | None = None
    for position, point in enumerate(points):
        is_student = point.role == "student"
        out.append(msgspec.structs.replace(point, role="tried") if is_student else point)
        if point.precision == chosen and (is_student if validated.chosen == "student" else point.role == "teacher"):
            judged = position
    if judged is not None:
        out[judged] = msgspec.structs.replace(points[judged], role="student")
    return out


def report_data(
    context: Context,
    rows: Sequence[LedgerRow],
    points: Sequence[Point],
    parity: Sequence[HopParity],
    found: SearchOut,
    distilled: DistilOut | None,
    validated: ValidateOut | None,
    *,
    paths: Mapping[str, str],
    verdict: Verdict | None = None,
    limit_ms: float | None = None,
) -> ReportData:
    """The report's data; without `validated` it is the report of a run that ended without an artifact."""
    measurements: tuple[Measurement, ...] = ()
    per_class: tuple[ClassRow, ...] = ()
    curves: tuple[Curve, ...] = ()
    notes: list[str] = []
    training_notes: list[str] = []
    shipped: tuple[tuple[str, str], ...] = ()
    if validated is not None:
        measurements = tuple(sorted(validated.measurements, key=lambda measurement: measurement.label != "teacher"))
        labels = getattr(context.task, "labels", ())
        per_class = tuple(
            ClassRow(
                name=labels[entry.label] if entry.label < len(labels) else str(entry.label),
                n=entry.items,
                teacher_accuracy=entry.teacher,
                student_accuracy=entry.student,
            )
            for entry in validated.per_class
        )
        notes.append(f"agreement of the artifact with the teacher on the test split: {validated.agreement:.4f}")
        verdict, limit_ms = validated.verdict, validated.limit_ms
        against = f"{validated.student_accuracy:.4f} (teacher {validated.teacher_accuracy:.4f}) on the test split"
        shipped = (
            ("artifact", artifact_name(distilled.spec if distilled is not None and validated.chosen == "student" else None)),
            ("format", validated.artifact.format.value),
            ("precision", validated.artifact.precision.value),
            ("size", size_text(validated.artifact.size_bytes)),
            (context.task.metric, against),
        )
    if distilled is not None and distilled.curve is not None:
        curve = distilled.curve
        curves = (
            Curve(
                label=curve.label,
                metric=context.task.metric,
                train_loss=tuple(entry.train_loss for entry in curve.epochs),
                validation=tuple(entry.validation for entry in curve.epochs),
            ),
        )
        if validated is not None and validated.chosen != "student":
            training_notes.append("the student that was trained here is not what was judged: the teacher in int8 was preferred")
        training_notes.extend(curve.notes)
    if found.predictor_error is not None:
        notes.append(f"the search's latency predictor was off by {found.predictor_error:.1%} on candidates it had not seen (median)")
    profile = context.target.profile
    return ReportData(
        title=f"{context.store.run_dir.name}: a student of {context.teacher.name} on {context.target.name}",
        created_at=utc_now(),
        verdict=verdict,
        budget=context.budget,
        limit_ms=limit_ms,
        target=context.target.name,
        profile_text=profile.description,
        simulated=context.simulated,
        fingerprint=context.target.fingerprint,
        proven_on_hardware=context.target.capabilities.proven_on_hardware,
        ledger=Ledger(rows=tuple(rows)),
        points=tuple(points),
        measurements=measurements,
        curves=curves,
        per_class=per_class,
        parity=tuple(parity),
        versions=versions(),
        paths=dict(paths),
        notes=tuple(notes),
        training_notes=tuple(training_notes),
        shipped=shipped,
        seed=context.seed,
        task=context.task.name,
        metric=context.task.metric,
        search_counts=found.counts,
    )
