"""The quantize stage: int8 where it is faster and accurate enough, else the float artifact; the ledger says why."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgekd.artifact import StoredArtifact
from edgekd.errors import Rejected
from edgekd.measuring.measure import Screened
from edgekd.objective import prefer
from edgekd.records import Artifact, HopParity, LedgerRow, Point, Precision, QuantRecipe, Record
from edgekd.steps.baseline import BaselineOut
from edgekd.steps.context import Context, point, row, score
from edgekd.steps.quantizing import recipe_facts, to_int8, tried_rows
from edgekd.steps.standing import standing


class QuantizeOut(Record, tag="edgekd.stage_quantize/1", frozen=True, kw_only=True):
    """The artifact that goes on, stored in the stage's folder `chosen`."""

    artifact: Artifact
    recipe: QuantRecipe | None
    points: tuple[Point, ...]
    parity: tuple[HopParity, ...]
    rows: tuple[LedgerRow, ...]


def run_quantize(context: Context, folder: Path, scratch: Path, baseline: BaselineOut, source: StoredArtifact, teacher_scores: np.ndarray) -> QuantizeOut:
    """Quantize the float artifact, and keep the result only if the objective prefers it."""
    validation = context.validation.all()
    reference = context.device_outputs(source, validation.inputs)
    context.task.check(reference, validation.targets, "validation")
    scores = context.task.scores(reference, validation.targets)

    def float_point(seen: Screened) -> Point:
        return point(seen, precision=Precision.FP32, role="student", accuracy=float(scores.mean()))

    def stay(
        decision: str, reason: str, *more: LedgerRow, seen: Screened | None = None, points: tuple[Point, ...] = (), parity: tuple[HopParity, ...] = ()
    ) -> QuantizeOut:
        seen = seen or context.screen({"student": source})["student"]
        kept = source.copy_to(folder / "chosen")
        return QuantizeOut(
            artifact=kept.record,
            recipe=None,
            points=(float_point(seen), *points),
            parity=parity,
            rows=(*more, row(context, "quantize", "int8", decision, reason, before=score(seen, source, scores))),
        )

    if not context.wants(Precision.INT8):
        return stay("skipped", "int8 is not among the precisions of the target profile")
    try:
        made = to_int8(
            context,
            source,
            scratch / "int8",
            label="student",
            validation=validation,
            reference=reference,
            options=context.options.quantize,
            allowed_drop=context.budget.max_drop if context.budget.max_drop is not None else 0.01,
        )
    except Rejected as error:
        if not context.wants(Precision.FP32):
            raise
        return stay("rolled back", str(error))
    result, seen = made.result, made.after
    tried = tuple(tried_rows(context, "quantize", result))
    int8_scores = np.asarray(result.scores)
    after = standing(result.artifact, seen, int8_scores, teacher_scores, context.budget, baseline.limit_ms)
    int8_point = point(seen, precision=Precision.INT8, role="student", accuracy=float(int8_scores.mean()))
    choice = prefer(standing(source, made.before, scores, teacher_scores, context.budget, baseline.limit_ms), after, binary=context.task.binary)
    if context.wants(Precision.FP32) and not choice.after_preferred:
        return stay("rolled back", choice.reason, *tried, seen=made.before, points=(int8_point,))
    samples = context.options.parity_samples
    part = {name: value[:samples] for name, value in reference.items()}
    device = context.device_outputs(result.artifact, {name: value[:samples] for name, value in validation.inputs.items()})
    parity = context.hop(context.toolchain.quantize_hop, part, device, Precision.INT8, result.artifact)
    if not parity.passed and context.wants(Precision.FP32):
        return stay(
            "rolled back", f"parity fails at the hop {parity.hop}: {parity.first_bad}", *tried, seen=made.before, points=(int8_point,), parity=(parity,)
        )
    kept = result.artifact.copy_to(folder / "chosen")
    reason = choice.reason if parity.passed else f"{choice.reason}; parity fails ({parity.first_bad}) but the profile allows int8 only"
    return QuantizeOut(
        artifact=kept.record,
        recipe=result.recipe,
        points=(float_point(made.before), int8_point),
        parity=(parity,),
        rows=(
            *tried,
            row(
                context,
                "quantize",
                "int8",
                "kept",
                reason,
                before=score(made.before, source, scores),
                after=score(seen, kept, int8_scores),
                details=recipe_facts(result),
            ),
        ),
    )
