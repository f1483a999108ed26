"""Training one student of a run: built from its spec, started from the teacher where that is possible, distilled."""

from __future__ import annotations

from pathlib import Path

from edgekd.distill.run import TrainResult, distil
from edgekd.records import StudentSpec
from edgekd.steps.context import Context


def train_student(context: Context, spec: StudentSpec, folder: Path, *, label: str, epochs: int | None = None) -> TrainResult:
    """The trained student; unfinished work and checkpoints stay in `folder`.

    Raises:
        TrainingDiverged: the loss left the finite numbers.
    """
    from edgekd.distill.initialise import initialise_student

    module = context.space.build(spec, context.seed)
    options = context.options.train
    if options.init_from_teacher == "auto" and context.teacher.module is not None:
        report = initialise_student(module, context.teacher.module, hook=getattr(context.space, "init", None))
        context.note("distil", f"{label}: {report.text()}")
    return distil(
        module,
        teacher=context.teacher,
        train=context.train,
        validation=context.validation,
        task=context.task,
        options=options,
        seed=context.seed,
        folder=folder,
        cache_dir=context.cache_dir,
        label=label,
        epochs=epochs,
        callbacks=context.callbacks,
    )
