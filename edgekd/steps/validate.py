"""The validate stage: the artifact that would ship, at verdict grade, on the device, against the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edgekd.artifact import StoredArtifact
from edgekd.contracts import Tensors
from edgekd.measuring.launching import new_nonce
from edgekd.measuring.measure import Subject, measure_verdict
from edgekd.objective import best, prefer
from edgekd.parity.compare import require_parity
from edgekd.records import Artifact, HopParity, LedgerRow, Measurement, Outcome, Precision, Record, Verdict
from edgekd.steps.baseline import BaselineOut
from edgekd.steps.context import Context, row, score
from edgekd.steps.standing import standing
from edgekd.storage import write_atomic
from edgekd.tasks import has_bounded_scores
from edgekd.verdict import Limit, is_undecided, judge, resolve_limit, same_outputs


class ClassCount(Record, tag="edgekd.class_count/1", frozen=True, kw_only=True):
    """One class of the test split: items, and the mean score of teacher and student on them."""

    label: int
    items: int
    teacher: float
    student: float


class ValidateOut(Record, tag="edgekd.stage_validate/1", frozen=True, kw_only=True):
    """The verdict with its evidence. The artifact lies in the stage's folder `deployed`.

    `limit_ms` is what a pass had to stay below; `limit_upper_ms`, where the limit is a share of the teacher's latency, what a fail had to exceed.
    """

    artifact: Artifact
    chosen: str
    limit_ms: float
    limit_upper_ms: float | None = None
    verdict: Verdict
    measurements: tuple[Measurement, ...]
    teacher_accuracy: float
    student_accuracy: float
    agreement: float
    per_class: tuple[ClassCount, ...]
    parity: tuple[HopParity, ...]
    rows: tuple[LedgerRow, ...]


def choose(
    context: Context,
    baseline: BaselineOut,
    student: StoredArtifact | None,
    teacher_int8: StoredArtifact | None,
    teacher_validation: Tensors,
) -> tuple[str, StoredArtifact, list[LedgerRow]]:
    """The artifact that ships among the student and the quantized teacher, by the one objective.

    A quantized teacher that misses the budget does not compete: judging it would hide what the student reaches.
    """
    if student is None:
        assert teacher_int8 is not None  # one of the two is what validate is called for
        return "teacher int8", teacher_int8, []
    if teacher_int8 is None:
        return "student", student, []
    validation = context.validation.all()
    teacher_scores = context.task.scores(teacher_validation, validation.targets)
    screened = context.screen({"student": student, "teacher int8": teacher_int8})
    models = {"student": student, "teacher int8": teacher_int8}
    scores = {label: context.task.scores(context.device_outputs(model, validation.inputs), validation.targets) for label, model in models.items()}
    standings = [
        standing(model, screened[label], scores[label], teacher_scores, context.budget, baseline.limit_ms, student=label) for label, model in models.items()
    ]
    rival = standings[1]
    winner = best(standings if rival.meets_budget else standings[:1], context.task.binary)
    if rival.meets_budget or prefer(rival, winner, binary=context.task.binary).after_preferred:
        reason = prefer(next(one for one in standings if one is not winner), winner, binary=context.task.binary).reason
    else:
        reason = "the quantized teacher does not meet the budget: the student is judged"
    other = "teacher int8" if winner.label == "student" else "student"
    rows = [
        row(
            context,
            "validate",
            f"{winner.label} against {other}",
            "kept",
            reason,
            before=score(screened[other], models[other], scores[other]),
            after=score(screened[winner.label], models[winner.label], scores[winner.label]),
        )
    ]
    return winner.label, models[winner.label], rows


def run_validate(
    context: Context,
    folder: Path,
    baseline: BaselineOut,
    *,
    student: StoredArtifact | None,
    teacher: StoredArtifact | None,
    teacher_int8: StoredArtifact | None,
    teacher_validation: Tensors,
    teacher_test: Tensors,
    scratch: Path,
) -> ValidateOut:
    """Measure and judge; a pass, fail or refuse with everything it rests on. Without a student the quantized teacher is judged.

    `scratch` keeps the measurement's nonce: this stage of this run, killed and done again, finds its launches on the device; no other does.

    Raises:
        ParityRejected: what the target compiled computes something else than the portable file; the subject is the `HopParity`.
    """
    chosen, model, rows = choose(context, baseline, student, teacher_int8, teacher_validation)
    compiled = context.target.runtime.compile(model, folder / "compiled").copy_to(folder / "deployed")
    parity = _device_parity(context, model, compiled)
    require_parity(parity)
    test = context.test.all()
    outputs = context.device_outputs(compiled, test.inputs)
    context.task.check(outputs, test.targets, "test")
    scores = context.task.scores(outputs, test.targets)
    teacher_scores = context.task.scores(teacher_test, test.targets)
    inputs = context.probe_inputs()
    subjects = [Subject("student", compiled, inputs)]
    if teacher is not None:
        subjects.append(Subject("teacher", teacher, inputs))
    plan = context.target.profile.measure.verdict

    identical = same_outputs(outputs, teacher_test)

    def decide(seen: Mapping[str, Measurement]) -> tuple[Limit, Verdict]:
        reference = seen.get("teacher")
        measured = reference is not None and len(reference.launches) > 1  # without launches of the teacher a share refuses whatever the limit
        known = measured or context.budget.latency_ms is not None
        limit = resolve_limit(context.budget, plan, reference, allow_extreme=True) if known else Limit(baseline.limit_ms)
        verdict = judge(
            budget=context.budget,
            limit_ms=limit,
            measurement=seen["student"],
            plan=plan,
            student_scores=scores,
            teacher_scores=teacher_scores,
            binary=context.task.binary,
            bounded=has_bounded_scores(context.task),
            identical=identical,
            size_bytes=compiled.record.size_bytes,
            accept_simulated=context.options.accept_simulated,
            teacher_measurement=seen.get("teacher"),
        )
        return limit, verdict

    def undecided(seen: Mapping[str, Measurement]) -> bool:
        return is_undecided(decide(seen)[1])

    measured = measure_verdict(context.target, subjects, limits=context.limits, seed=context.seed, undecided=undecided, nonce=_nonce(scratch))
    limit, verdict = decide(measured)
    rows.append(
        row(
            context,
            "validate",
            f"verdict on the {chosen}",
            "kept" if verdict.outcome is Outcome.PASS else "noted",
            f"{verdict.outcome.value}: {verdict.reason}",
            details={"accuracy": float(scores.mean()), "teacher_accuracy": float(teacher_scores.mean())},
        )
    )
    return ValidateOut(
        artifact=compiled.record,
        chosen=chosen,
        limit_ms=limit.ms,
        limit_upper_ms=limit.upper_ms,
        verdict=verdict,
        measurements=tuple(measured.values()),
        teacher_accuracy=float(teacher_scores.mean()),
        student_accuracy=float(scores.mean()),
        agreement=float(context.task.agreement(outputs, teacher_test).mean()),
        per_class=_per_class(context, test.targets, teacher_scores, scores),
        parity=parity,
        rows=tuple(rows),
    )


def _nonce(scratch: Path) -> str:
    path = scratch / "nonce"
    if not path.is_file():
        write_atomic(path, new_nonce().encode())
    return path.read_text(encoding="utf-8")


def _device_parity(context: Context, model: StoredArtifact, compiled: StoredArtifact) -> tuple[HopParity, ...]:
    """What compiling on the target changed; empty where the runtime compiles nothing."""
    if model.record.content_hash() == compiled.record.content_hash():
        return ()
    inputs = context.validation.all(context.options.parity_samples).inputs
    reference = context.device_outputs(model, inputs)
    device = context.device_outputs(compiled, inputs)
    precision = Precision.FP32 if compiled.record.precision is Precision.FP32 else Precision.INT8
    return (context.hop("portable -> compiled", reference, device, precision),)


def _per_class(context: Context, targets: object, teacher: np.ndarray, student: np.ndarray) -> tuple[ClassCount, ...]:
    labels = context.task.classes(targets)
    if labels is None:
        return ()
    return tuple(
        ClassCount(
            label=int(label), items=int((labels == label).sum()), teacher=float(teacher[labels == label].mean()), student=float(student[labels == label].mean())
        )
        for label in np.unique(labels)
    )
