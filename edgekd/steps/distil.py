"""The distil stage: the chosen student, trained with the full schedule, with what is needed to rebuild it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgekd.distill.record import TrainRecord
from edgekd.records import LedgerRow, Record, StudentSpec
from edgekd.steps.baseline import BaselineOut
from edgekd.steps.context import Context, row
from edgekd.steps.training import train_student


class DistilOut(Record, tag="edgekd.stage_distil/1", frozen=True, kw_only=True):
    """The trained student: `spec` rebuilds it with `weights.safetensors`; `curve` is absent when nothing was trained."""

    spec: StudentSpec
    accuracy: float | None
    curve: TrainRecord | None
    rows: tuple[LedgerRow, ...]


def run_distil(context: Context, folder: Path, scratch: Path, baseline: BaselineOut, spec: StudentSpec) -> DistilOut:
    """Train one student.

    Raises:
        TrainingDiverged: the loss left the finite numbers.
    """
    if spec.kind == "fixed-onnx":
        return DistilOut(spec=spec, accuracy=None, curve=None, rows=(row(context, "distil", "training", "skipped", "the student is a file"),))
    from edgekd.rebuild import complete_spec, save_weights
    from edgekd.teachers import TorchTeacher

    result = train_student(context, spec, scratch, label=spec.label())
    validation = context.validation.all()
    scores = context.task.scores(TorchTeacher(result.module).outputs(validation.inputs), validation.targets)
    save_weights(result.module, folder / "weights.safetensors")
    full = complete_spec(spec, result.module, context.validation.all(1).inputs, seed=context.seed)
    reached = f"{context.task.metric} {float(np.mean(scores)):.4f} on validation"
    reason = f"{len(result.record.epochs)} epochs, {reached}; the teacher's is {baseline.teacher_accuracy:.4f}"
    return DistilOut(
        spec=full,
        accuracy=float(np.mean(scores)),
        curve=result.record,
        rows=(row(context, "distil", spec.label(), "kept", reason, details={"accuracy": float(np.mean(scores))}),),
    )
