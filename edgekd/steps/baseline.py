"""The baseline stage: what the teacher costs and reaches on this target, and whether quantizing it alone would do."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from edgekd.artifact import StoredArtifact
from edgekd.contracts import Tensors
from edgekd.errors import BudgetError, MeasurementInvalid, Rejected
from edgekd.measuring.measure import Screened, Subject, calibrate_limits
from edgekd.records import Artifact, HopParity, LedgerRow, Limits, Point, Precision, QuantRecipe, Record
from edgekd.steps.checks import check_splits, check_teacher
from edgekd.steps.context import Context, checked_outputs, point, row, score
from edgekd.steps.quantizing import recipe_facts, to_int8, tried_rows
from edgekd.steps.standing import standing
from edgekd.tasks import has_bounded_scores
from edgekd.teachers import OnnxTeacher
from edgekd.verdict import check_plausible, check_scores


class BaselineOut(Record, tag="edgekd.stage_baseline/1", frozen=True, kw_only=True):
    """`limit_ms` is the latency limit that the search works against; `None` artifacts do not exist for this teacher.

    `teacher_recipe` is that of the quantized teacher. `teacher_int8_fits`: on screen-grade evidence the quantized teacher meets the whole budget.
    """

    teacher: Artifact | None
    teacher_int8: Artifact | None
    limits: Limits
    limit_ms: float
    teacher_accuracy: float
    points: tuple[Point, ...]
    parity: tuple[HopParity, ...]
    rows: tuple[LedgerRow, ...]
    teacher_int8_fits: bool = False
    teacher_recipe: QuantRecipe | None = None


def run_baseline(context: Context, folder: Path, scratch: Path) -> BaselineOut:
    """Measure the teacher; resolve the latency limit.

    Raises:
        BudgetError: the limit is not plausible, or relative to a teacher that cannot be measured.
        DataError, ModelError: data, labels and teacher do not fit, splits overlap, the teacher knows nothing, or its scores are not what
            the task says of them.
        MeasurementInvalid: the device is too disturbed to measure the teacher.
    """
    rows = check_splits(context)
    validation = context.validation.all()
    outputs = checked_outputs(context, context.validation, what="validation")
    _save(folder / "teacher_validation", outputs)
    _save(folder / "teacher_test", checked_outputs(context, context.test, what="test"))
    sample = context.train.all(256)
    context.task.check(context.teacher.outputs(sample.inputs), sample.targets, "train")
    teacher_scores = check_scores(
        context.task.scores(outputs, validation.targets),
        context.task.binary,
        bounded=has_bounded_scores(context.task),
        items=len(next(iter(validation.inputs.values()))),
    )
    check_teacher(context, teacher_scores, validation.targets)
    points: list[Point] = []
    parity: list[HopParity] = []
    limits = context.target.profile.measure.limits
    exported = _export_teacher(context, folder, rows)
    screened: Screened | None = None
    int8: StoredArtifact | None = None
    if exported is not None:
        limits = calibrate_limits(context.target, Subject("teacher", exported, context.probe_inputs()), cache_dir=context.cache_dir, seed=context.seed)
        context.limits = limits
        device = context.device_outputs(exported, {name: value[: context.options.parity_samples] for name, value in validation.inputs.items()})
        part = {name: value[: context.options.parity_samples] for name, value in outputs.items()}
        parity.append(context.hop(f"teacher -> {context.toolchain.name}", part, device, Precision.FP32))
        if not parity[0].passed:
            rows.append(
                row(context, "baseline", parity[0].hop, "noted", _diverges(parity[0], "its latency stands for another network, and it does not compete"))
            )
        screened = context.screen({"teacher": exported})["teacher"]
        if not screened.measurement.valid:
            raise MeasurementInvalid(
                "the teacher could not be measured",
                found=screened.measurement.reason,
                hint="end other work on the device and run the same command again",
                subject="teacher",
            )
        points.append(point(screened, precision=Precision.FP32, role="teacher", accuracy=float(teacher_scores.mean())))
        rows.append(row(context, "baseline", "teacher as it is", "noted", "the reference", after=score(screened, exported, teacher_scores)))
    limit_ms = _limit(context, screened)
    own_file = getattr(context.space, "onnx", None) is not None  # quantizing the file is then the road itself
    fits, recipe = False, None
    if exported is not None and screened is not None and parity[0].passed and context.wants(Precision.INT8) and not own_file:
        int8, fits, recipe = _quantized_teacher(context, exported, screened, folder, scratch, limit_ms, rows, points, parity)
    return BaselineOut(
        teacher=None if exported is None else exported.record,
        teacher_int8=None if int8 is None else int8.record,
        limits=limits,
        limit_ms=limit_ms,
        teacher_accuracy=float(teacher_scores.mean()),
        points=tuple(points),
        parity=tuple(parity),
        rows=tuple(rows),
        teacher_int8_fits=fits,
        teacher_recipe=recipe,
    )


def _diverges(parity: HopParity, consequence: str) -> str:
    bad = next(tensor for tensor in parity.tensors if not tensor.passed)
    return f"diverges at the hop {parity.hop!r}, {bad.name}: {bad.reason}; {consequence}"


def _limit(context: Context, screened: Screened | None) -> float:
    budget = context.budget
    if budget.latency_ms is not None:
        limit_ms = budget.latency_ms
    elif screened is None:
        raise BudgetError(
            "a latency relative to the teacher's needs a teacher that runs on the target",
            found=f"latency_share={budget.latency_share}, teacher {context.teacher.name}",
            hint=f"give latency_ms=, or a teacher that can be exported to {context.toolchain.name}",
        )
    else:
        assert budget.latency_share is not None
        limit_ms = budget.latency_share * screened.latency_ms
    if screened is not None:
        check_plausible(limit_ms, screened.latency_ms, budget.percentile, allow_extreme=context.options.allow_extreme)
    return limit_ms


def _export_teacher(context: Context, folder: Path, rows: list[LedgerRow]) -> StoredArtifact | None:
    place = folder / "teacher"
    place.mkdir()
    if context.teacher.module is not None:
        return context.export(context.teacher.module, place)
    if isinstance(context.teacher, OnnxTeacher):
        return context.take_onnx(context.teacher.path, place)
    rows.append(row(context, "baseline", "export the teacher", "skipped", "the teacher is a callable: it gives outputs, but cannot be measured on the target"))
    return None


def _quantized_teacher(
    context: Context,
    exported: StoredArtifact,
    screened: Screened,
    folder: Path,
    scratch: Path,
    limit_ms: float,
    rows: list[LedgerRow],
    points: list[Point],
    parity: list[HopParity],
) -> tuple[StoredArtifact | None, bool, QuantRecipe | None]:
    """The int8 teacher, if it can be made, whether it fits the budget, and its recipe: an answer that needs no training, and a contender for the bundle."""
    validation = context.validation.all()
    device = context.device_outputs(exported, validation.inputs)
    options = msgspec.structs.replace(context.options.quantize, methods=("minmax",))
    try:
        made = to_int8(
            context,
            exported,
            scratch / "teacher-int8",
            label="teacher",
            validation=validation,
            reference=device,
            options=options,
            allowed_drop=float("inf"),
        )
    except Rejected as error:
        rows.append(row(context, "baseline", "quantize the teacher alone", "skipped", str(error), before=score(screened, exported, None)))
        return None, False, None
    rows.extend(tried_rows(context, "baseline", made.result, of="teacher"))
    seen = made.after
    kept = made.result.artifact.copy_to(folder / "teacher-int8")
    scores = np.asarray(made.result.scores)
    teacher_scores = context.task.scores(device, validation.targets)
    place = standing(kept, seen, scores, teacher_scores, context.budget, limit_ms, student="teacher")
    points.append(point(seen, precision=Precision.INT8, role="teacher", accuracy=float(scores.mean())))
    samples = context.options.parity_samples
    part = {name: value[:samples] for name, value in device.items()}
    int8_part = context.device_outputs(kept, {name: value[:samples] for name, value in validation.inputs.items()})
    hop = context.hop(f"teacher {context.toolchain.quantize_hop}", part, int8_part, Precision.INT8, kept)
    parity.append(hop)
    reason = (
        "within the budget without any training: it competes with the student" if place.meets_budget else f"not enough alone: the limit is {limit_ms:.4g} ms"
    )
    rows.append(
        row(
            context,
            "baseline",
            "quantize the teacher alone",
            "noted" if hop.passed else "rolled back",
            reason if hop.passed else _diverges(hop, "it does not compete"),
            before=score(made.before, exported, teacher_scores),
            after=score(seen, kept, scores),
            details=recipe_facts(made.result),
        )
    )
    return (kept, place.meets_budget, made.result.recipe) if hop.passed else (None, False, None)


def _save(folder: Path, outputs: Tensors) -> None:
    folder.mkdir()
    for position, (name, value) in enumerate(outputs.items()):
        np.save(folder / f"{position:03d}.npy", value, allow_pickle=False)
        (folder / f"{position:03d}.name").write_text(name, encoding="utf-8")


def load_outputs(folder: Path) -> dict[str, np.ndarray]:
    """The teacher's outputs that the baseline stage stored."""
    return {path.with_suffix(".name").read_text(encoding="utf-8"): np.load(path, allow_pickle=False) for path in sorted(folder.glob("*.npy"))}
