"""One artifact to int8 for one run: the calibration set, the call, what it is compared with, and the ledger rows about it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edgekd.artifact import StoredArtifact
from edgekd.contracts import CalibrationSet, Tensors
from edgekd.data import Batch
from edgekd.errors import DataError
from edgekd.identity.keys import item_digests
from edgekd.measuring.measure import Screened
from edgekd.options import QuantizeOptions
from edgekd.quantize.calibrate import calibration_set
from edgekd.quantize.run import QuantizeResult, quantize
from edgekd.records import LedgerRow
from edgekd.steps.context import Context, row


def choose_calibration(context: Context, size: int) -> CalibrationSet:
    """A seeded sample of plain training items; the few that are in the test split as well are left out.

    Raises:
        DataError: all of them are.
    """
    if context.train.indexed:
        generator = np.random.default_rng([context.seed, 0xCA])
        picks = np.sort(generator.choice(len(context.train), size=min(size, len(context.train)), replace=False))
        batch = context.train.batch(picks)
    else:
        batch = context.train.all(size)
    keep = ~np.isin(item_digests(batch.inputs), item_digests(context.test.all().inputs))
    if not keep.any():
        raise DataError("every calibration input is also in the test split", found=f"{len(keep)} items", hint="split the data anew", subject=context.train.name)
    inputs = {name: value[keep] for name, value in batch.inputs.items()}
    return calibration_set(inputs, split=context.train.name, indices=batch.indices[keep].tolist())


@dataclass(frozen=True)
class Int8:
    """The best int8 form of an artifact; `before` is the source and `after` the int8, measured in one screen."""

    result: QuantizeResult
    before: Screened
    after: Screened


def to_int8(
    context: Context,
    source: StoredArtifact,
    folder: Path,
    *,
    label: str,
    validation: Batch,
    reference: Tensors,
    options: QuantizeOptions,
    allowed_drop: float,
) -> Int8:
    """The best int8 form of `source` for this target, everything that was tried, and both latencies under `label` and `label int8`.

    `reference` is the source's own output on the validation items: what a drop is counted from.
    """

    def time_ms(models: dict[str, StoredArtifact]) -> dict[str, float]:
        seen = context.screen(models)
        timed.append({models[name].record.content_hash(): one for name, one in seen.items()})
        disturbed.update(one.measurement.reason for one in seen.values() if not one.measurement.valid)
        return {name: one.latency_ms for name, one in seen.items()}

    timed: list[dict[str, Screened]] = []
    disturbed: set[str] = set()
    result = quantize(
        source,
        target=context.target,
        converter=context.toolchain.converter("quantizer"),
        prepare=context.toolchain.converter("prepare"),
        calibration=choose_calibration(context, options.calibration_size),
        validation_inputs=validation.inputs,
        validation_targets=validation.targets,
        task=context.task,
        reference_scores=context.task.scores(reference, validation.targets),
        options=options,
        allowed_drop=allowed_drop,
        time_ms=time_ms,
        folder=folder,
        seed=context.seed,
    )
    names = {source.record.content_hash(): label, result.artifact.record.content_hash(): f"{label} int8"}
    together = [seen for seen in timed if names.keys() <= seen.keys()]
    if together:
        before, after = (replace(together[-1][key], label=name) for key, name in names.items())
    else:
        before, after = context.screen({label: source, f"{label} int8": result.artifact}).values()
        disturbed.update(one.measurement.reason for one in (before, after) if not one.measurement.valid)
    doubts = tuple(f"compared by latencies of a screen that is not valid: {reason}" for reason in sorted(disturbed))
    return Int8(replace(result, notes=result.notes + doubts), before, after)


def tried_rows(context: Context, stage: str, result: QuantizeResult, *, of: str = "") -> list[LedgerRow]:
    """What was proposed, refused, tried and measured, and how stable the calibration is, as ledger rows; `of` names the network in their steps."""
    named = f"{of} " if of else ""
    rows = []
    for tried in result.tried:
        found = {"accuracy": tried.accuracy, "latency_ms": tried.latency_ms}
        known = {name: value for name, value in found.items() if value is not None}
        rows.append(row(context, stage, f"{named}{tried.scheme} {tried.method}", "rolled back" if tried.refused else "noted", tried.reason, details=known))
    rows.extend(row(context, stage, f"{named}note", "noted", text) for text in result.notes)
    stability = result.stability
    if stability is not None:
        details = {"worst_half_width": stability.worst, "subsets": stability.subsets, "samples": stability.samples, "stable": stability.stable}
        rows.append(row(context, stage, f"{named}calibration stability", "noted", stability.text(), details=details))
        if not stability.stable:
            context.note(stage, f"{named}{stability.text()}")
    return rows


def recipe_facts(result: QuantizeResult) -> dict[str, float | int | str | bool]:
    """The recipe of an int8 artifact, for its ledger row."""
    recipe = result.recipe
    return {
        "scheme": recipe.scheme,
        "proposed": result.proposed,
        "calibration": recipe.calibration.method,
        "calibration_size": recipe.calibration.size,
        "calibration_split": recipe.calibration.split,
    }
