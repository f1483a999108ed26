"""The main path: a teacher, data, a device and a budget go in; a proven student, or an honest "not feasible", comes out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.caches import CACHE_NAME
from edgekd.contracts import Callback, StudentSpace, Target, Task
from edgekd.conversion.toolchain import require_road
from edgekd.data import Augment, make_split
from edgekd.distill.progress import ProgressBar
from edgekd.errors import ConfigError
from edgekd.options import Options
from edgekd.progress import print_event
from edgekd.records import Budget
from edgekd.result import Result
from edgekd.road import Road
from edgekd.stages import Listener, StageStore
from edgekd.steps.context import Context
from edgekd.tasks import as_task
from edgekd.teachers import as_teacher, forward_names
from edgekd.verdict import require_samples

if TYPE_CHECKING:
    from edgekd.planning import Plan


def make_context(
    teacher: Any,
    *,
    task: str | Task,
    train: Any,
    validation: Any,
    test: Any,
    target: Target,
    budget: Budget,
    student: StudentSpace,
    store: StageStore,
    seed: int = 0,
    options: Options | None = None,
    augment: Augment | None = None,
    cache_dir: Path | str | None = None,
    callbacks: Sequence[Callback] = (),
) -> Context:
    """The context of a run in the store's folder, with every argument of `compress` checked for its kind."""
    known = as_teacher(teacher)
    meaning = as_task(task)
    names = forward_names(known.module) if known.module is not None else ()
    if not isinstance(student, StudentSpace):
        raise ConfigError(
            "the student must be a space",
            found=type(student).__name__,
            allowed="edgekd.Family(factory, width=[...]) or edgekd.Fixed(net)",
            hint="wrap a single network: Fixed(net)",
        )
    require_samples(target.profile.measure.verdict.launch, budget.percentile)
    judged = {name: make_split(data, meaning, name=name, input_names=names, seed=seed) for name, data in (("validation", validation), ("test", test))}
    for split in judged.values():
        split.require_repeatable()
    if getattr(student, "onnx", None) is not None:
        store.about |= {"search": "nothing to choose: the student is a file", "distil": "nothing to train: the student is a file"}
    context = Context(
        target=target,
        task=meaning,
        teacher=known,
        space=student,
        train=make_split(train, meaning, name="train", input_names=names, augment=augment, seed=seed),
        validation=judged["validation"],
        test=judged["test"],
        budget=budget,
        options=options or Options(),
        seed=seed,
        store=store,
        cache_dir=store.run_dir.parent / CACHE_NAME if cache_dir is None else Path(cache_dir),
        callbacks=callbacks,
    )
    require_road(context.toolchain, known, student)
    return context


def compress(
    teacher: Any,
    *,
    task: str | Task,
    train: Any,
    validation: Any,
    test: Any,
    target: Target,
    budget: Budget,
    student: StudentSpace,
    run_dir: Path | str,
    seed: int = 0,
    options: Options | None = None,
    augment: Augment | None = None,
    cache_dir: Path | str | None = None,
    callbacks: Sequence[Callback] = (),
    listener: Listener | None = None,
    progress: bool = True,
) -> Result:
    """The most accurate student that meets the budget as measured on the target, with its evidence.

    `teacher` is a torch module, an exported program, an ONNX file's path or a callable from named arrays to outputs; `train`,
    `validation` and `test` are DataLoaders, data sets, `edgekd.Arrays` or `(inputs, targets)`. The student is chosen and trained on
    train and validation only. A run that was killed goes on where it stopped when it is called again with the same `run_dir`.

    `progress` prints the stages and a bar of each training on standard error; `listener` hears the same events, `callbacks` the trainings.

    Raises:
        InputError: an argument, the data or the teacher cannot be used.
        DeviceError: the device failed.
        StorageError: the disk is full; finished stages are kept.
    """
    listeners = ([print_event] if progress else []) + ([] if listener is None else [listener])
    with StageStore(Path(run_dir), *listeners) as store:
        context = make_context(
            teacher,
            task=task,
            train=train,
            validation=validation,
            test=test,
            target=target,
            budget=budget,
            student=student,
            store=store,
            seed=seed,
            options=options,
            augment=augment,
            cache_dir=cache_dir,
            callbacks=(*callbacks, ProgressBar()) if progress else callbacks,
        )
        return Road(context).run()


def plan(teacher: Any, *, run_dir: Path | str, **arguments: Any) -> Plan:
    """What `compress` with the same arguments would do: stages, measurements, minutes and disk. Nothing is trained or measured."""
    from edgekd.planning import make_plan

    return make_plan(make_context(teacher, store=StageStore(Path(run_dir)), **arguments))
