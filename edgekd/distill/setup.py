"""What is decided before a training starts: which losses with which weights, which precision, where teacher outputs come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from edgekd.contracts import Task
from edgekd.data import Batch, Split
from edgekd.distill.features import FeatureLoss, FeatureTaps
from edgekd.distill.losses import DEFAULT_WEIGHTS, resolve_kind
from edgekd.distill.precision import PrecisionChoice, fixed_choice, probe_precision, probe_threads
from edgekd.distill.record import TrainPlan, TrainState
from edgekd.distill.sources import FEATURE_PREFIX, Say, TeacherRunner, TeacherSource, as_tensors, open_source
from edgekd.distill.trainer import Objective, has_batch_norm
from edgekd.errors import ConfigError, DataError, ModelError
from edgekd.options import TrainOptions
from edgekd.tasks import Classification, MultiTask, Regression, pick_output

NOT_DETERMINISTIC = "does not have a deterministic implementation"
"""What torch says about an operation that cannot give the same numbers twice."""


def default_kind(task: Task, outputs: Mapping[str, Tensor]) -> str:
    """What `loss="auto"` means for a task: LSKD above four classes, KD up to four, MSE for regression.

    A `MultiTask` whose parts want different losses, or another project's task, gets `auto`: each output decides for itself, and
    the weights are 1 and 1.
    """
    if isinstance(task, Regression):
        return "mse"
    if isinstance(task, Classification):
        return resolve_kind("auto", pick_output(outputs, task.output, "Classification").shape[1])
    if isinstance(task, MultiTask):
        kinds = {default_kind(part, task.part(outputs, name)) for name, part in task.tasks.items()}
        return kinds.pop() if len(kinds) == 1 else "auto"
    return "auto"


def resolve_objective(options: TrainOptions, task: Task, outputs: Mapping[str, Tensor] | None) -> Objective:
    """The weighted sum to minimise; `outputs` are the teacher's on a few items, `None` without a teacher.

    Raises:
        ConfigError: both weights are zero and there is no feature loss.
    """
    if outputs is None or options.loss == "none":
        kind = "none"
    elif options.loss == "auto":
        kind = default_kind(task, outputs)
    else:
        kind = "mse" if isinstance(task, Regression) else options.loss
    default_task, default_soft = DEFAULT_WEIGHTS[kind]
    weight_task = default_task if options.weight_task is None else options.weight_task
    weight_soft = default_soft if options.weight_soft is None or kind == "none" else options.weight_soft
    if weight_task == 0.0 and weight_soft == 0.0 and not options.features:
        raise ConfigError("nothing is left to train on", found="weight_task=0, weight_soft=0, no features", hint="give one of them a weight")
    return Objective(kind, options.temperature or 0.0, weight_task, weight_soft)


def first_batch(train: Split, batch_size: int, student: nn.Module) -> Batch:
    """The first items of the training data (the first batch of a stream), as large as a training batch.

    Raises:
        DataError: one item only, and the student has batch norm.
    """
    if train.indexed:
        batch = train.batch(list(range(min(batch_size, len(train)))), 0 if train.augmented else None)
    else:
        batch = next(iter(train.stream(0)))
    if train.indexed and len(batch) < 2 and has_batch_norm(student):
        raise DataError(
            "batch norm cannot be trained on one item at a time",
            found=f"{len(train)} items, batch_size={batch_size}",
            hint="give two items or more, and set TrainOptions(batch_size=2) or more",
            subject=train.name,
        )
    return batch


def build_features(
    student: nn.Module, runner: TeacherRunner | None, options: TrainOptions, batch: Batch, device: torch.device
) -> tuple[FeatureLoss | None, dict[str, Tensor] | None]:
    """The feature loss, if one is asked for, and the teacher's outputs on two items; checks that both models take the data.

    Raises:
        ModelError: the student does not accept the data, or a tapped module does not exist or gives no tensor.
        ConfigError: feature losses without a teacher.
    """
    if options.features and runner is None:
        raise ConfigError("feature losses need a teacher", found=[pair.teacher for pair in options.features])
    few = Batch(batch.indices[:2], {name: value[:2] for name, value in batch.inputs.items()}, None)
    given = runner.tensors(few) if runner is not None else None
    was_training = student.training
    student.eval()
    try:
        with torch.no_grad(), FeatureTaps(student, [pair.student for pair in options.features], owner="student") as taps:
            try:
                student(*as_tensors(few.inputs, device).values())
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                if NOT_DETERMINISTIC in str(error):
                    raise
                raise ModelError(
                    f"the student {type(student).__name__} does not accept the data",
                    found=f"inputs { {name: value.shape for name, value in few.inputs.items()} }: {str(error).splitlines()[0]}",
                    hint="check the shape of the items and the order of the inputs",
                ) from error
            mine = taps.taken()
    finally:
        student.train(was_training)
    if given is None:
        return None, None
    features = None
    if options.features:
        tapped = {name.removeprefix(FEATURE_PREFIX): value for name, value in given.items() if name.startswith(FEATURE_PREFIX)}
        features = FeatureLoss(options.features, mine, tapped).to(device)
    return features, {name: value for name, value in given.items() if not name.startswith(FEATURE_PREFIX)}


def decide(
    student: nn.Module,
    runner: TeacherRunner | None,
    train: Split,
    batch: Batch,
    options: TrainOptions,
    *,
    identity: str,
    epochs: int,
    cache_dir: Path,
    seed: int,
    device: torch.device,
    say: Say,
    plan: TrainPlan | None,
    state: TrainState | None,
) -> tuple[TrainPlan, TeacherSource | None]:
    """The plan and the source of teacher outputs; what an earlier process decided (`plan`, `state`) is kept."""
    inputs: Sequence[Tensor] = list(as_tensors(batch.inputs, device).values())
    if not options.threads and device.type == "cpu" and torch.get_num_threads() > 1:
        student.train()
        threads, reason = probe_threads(student, inputs)
        torch.set_num_threads(threads)
        say(f"threads: {reason}")
    if plan is not None:
        choice = PrecisionChoice(plan.precision, plan.channels_last, plan.precision_reason, plan.probe_ms)
    elif options.precision == "auto":
        student.train()
        choice = probe_precision(student, inputs)
        say(f"precision: {choice.reason}")
    else:
        choice = fixed_choice(options.precision)
    source = None
    if runner is not None:
        decided = (plan.teacher_outputs, plan.teacher_outputs_reason) if plan is not None else None
        if state is not None and state.teacher_outputs:
            decided = (state.teacher_outputs, state.teacher_outputs_reason)
        source = open_source(
            runner,
            train,
            wanted=options.teacher_outputs,
            views=options.views,
            epochs=epochs,
            batch_size=options.batch_size,
            cache_dir=cache_dir,
            cache_features=options.cache_features,
            seed=seed,
            say=say,
            decided=decided,
        )
    if plan is None:
        plan = TrainPlan(
            identity=identity,
            precision=choice.precision,
            precision_reason=choice.reason,
            channels_last=choice.channels_last,
            probe_ms=choice.probe_ms,
            teacher_outputs=source.mode if source else "none",
            teacher_outputs_reason=source.reason if source else "no teacher is needed",
        )
    return plan, source
