"""What a report shows, as one record: whoever ran the stages fills it in, the renderer adds nothing of its own."""

from __future__ import annotations

from edgekd.records import Budget, Fingerprint, HopParity, Ledger, Measurement, Point, Record, Verdict
from edgekd.records.model import NonNegative


class Curve(Record, tag="edgekd.curve/1", frozen=True, kw_only=True):
    """One training: values per epoch, epoch 1 first. `validation` is in the task's metric `metric`; both may be empty."""

    label: str
    metric: str
    train_loss: tuple[float, ...] = ()
    validation: tuple[float, ...] = ()


class ClassRow(Record, tag="edgekd.class_row/1", frozen=True, kw_only=True):
    """One class of the test split: `n` items, and the mean score (0 to 1 for accuracy) of teacher and student on them."""

    name: str
    n: NonNegative
    teacher_accuracy: float
    student_accuracy: float


class ReportData(Record, tag="edgekd.report_data/1", frozen=True, kw_only=True):
    """Everything in a report.

    `limit_ms` is the latency limit that was judged (a share already resolved). `measurements` are verdict grade, the
    teacher first and then the student; the label tells which. `points` have the roles `candidate`, `teacher`, `student`
    (the one that was chosen). `paths` are shown as they are, for example `{"bundle": "runs/digits/bundle"}`. `search_counts`
    are for example `{"proposed": 12, "measured": 10, "rejected": 2}`. `shipped` says what the bundle holds, part by part, as name and text; `training_notes`
    stand with the training's curves. A part that a run does not have stays empty; the
    report then says that it is absent.
    """

    title: str
    created_at: str
    verdict: Verdict | None
    budget: Budget
    limit_ms: float | None
    target: str
    profile_text: str
    simulated: str = ""
    fingerprint: Fingerprint
    proven_on_hardware: bool
    ledger: Ledger
    points: tuple[Point, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    curves: tuple[Curve, ...] = ()
    per_class: tuple[ClassRow, ...] = ()
    parity: tuple[HopParity, ...] = ()
    versions: dict[str, str] = {}
    paths: dict[str, str] = {}
    notes: tuple[str, ...] = ()
    training_notes: tuple[str, ...] = ()
    shipped: tuple[tuple[str, str], ...] = ()
    seed: int = 0
    task: str = ""
    metric: str = "accuracy"
    search_counts: dict[str, int] = {}
