"""One artifact to int8 for one run: the calibration set, the call, and what it is compared with."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgekd.artifact import StoredArtifact
from edgekd.contracts import CalibrationSet, Tensors
from edgekd.data import Batch
from edgekd.errors import DataError
from edgekd.options import QuantizeOptions
from edgekd.quantize.calibrate import sample_hashes
from edgekd.quantize.run import QuantizeResult, quantize
from edgekd.registry import load
from edgekd.steps.context import Context, inputs_hash


def calibration_set(context: Context, size: int) -> CalibrationSet:
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
    tested = set(sample_hashes(context.test.all().inputs))
    keep = np.array([digest not in tested for digest in sample_hashes(batch.inputs)])
    if not keep.any():
        raise DataError("every calibration input is also in the test split", found=f"{len(keep)} items", hint="split the data anew", subject=context.train.name)
    inputs = {name: value[keep] for name, value in batch.inputs.items()}
    return CalibrationSet(inputs=inputs, split=context.train.name, data_hash=inputs_hash(inputs), indices=tuple(int(index) for index in batch.indices[keep]))


def to_int8(
    context: Context,
    source: StoredArtifact,
    folder: Path,
    *,
    validation: Batch,
    reference: Tensors,
    options: QuantizeOptions,
    allowed_drop: float,
) -> QuantizeResult:
    """The best int8 form of `source` for this target, and everything that was tried.

    `reference` is the source's own output on the validation items: what a drop is counted from.
    """

    def time_ms(models: dict[str, StoredArtifact]) -> dict[str, float]:
        return {label: screened.latency_ms for label, screened in context.screen(models).items()}

    return quantize(
        source,
        target=context.target,
        converter=load("converters", "qdq-from-onnx")(),
        calibration=calibration_set(context, options.calibration_size),
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
