"""One call that trains a student: devices and precision by lightning-fabric, resumed where a killed process stopped, never done twice."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import msgspec

from edgekd.contracts import Callback, Task, Teacher
from edgekd.data import Split
from edgekd.distill.record import TrainPlan, TrainRecord
from edgekd.errors import ConfigError, MissingDependency, ModelError
from edgekd.options import TrainOptions
from edgekd.storage import sha256_file

if TYPE_CHECKING:
    import torch

    from edgekd.distill.sources import TeacherSource
    from edgekd.distill.trainer import Trainer

WEIGHTS = "weights.safetensors"
RECORD = "record.json"
PLAN = "plan.json"

_log = logging.getLogger("edgekd.distill")


@runtime_checkable
class Talks(Protocol):
    """A callback that also wants the sentences a training says (which precision, which source of teacher outputs, why)."""

    def on_message(self, text: str) -> None: ...


@dataclass(frozen=True)
class TrainResult:
    """`module` is the student with its final weights, in evaluation mode on the CPU; `weights` is the safetensors file of them."""

    module: torch.nn.Module
    record: TrainRecord
    weights: Path
    resumed: bool = False


def distil(
    student: torch.nn.Module,
    *,
    teacher: Teacher | None,
    train: Split,
    validation: Split,
    task: Task,
    options: TrainOptions,
    seed: int,
    folder: Path,
    cache_dir: Path | None = None,
    label: str = "student",
    epochs: int | None = None,
    callbacks: Sequence[Callback] = (),
    accelerator: str = "auto",
) -> TrainResult:
    """The student trained from the teacher (or, without one, from labels), with its record and weights in `folder`.

    A finished training in `folder` is loaded, not repeated; an unfinished one goes on from its checkpoint. With one thread,
    `precision="fp32"` and `teacher_outputs="cached"` or `"online"`, a killed and resumed training on the CPU ends with the same
    bytes as one that was never killed; with `auto` this holds once `plan.json` is written, because what is chosen by timing is
    kept. `epochs` overrides `options.epochs`. `accelerator` is lightning-fabric's: `auto`, `cpu`, `cuda`, `mps`.
    Deterministic algorithms of torch are used on the CPU. The state of torch's random generators and its number of threads are
    as before afterwards.

    Raises:
        MissingDependency: torch, lightning-fabric or safetensors is not installed.
        ConfigError: a loss that does not fit the task, or `folder` holds another training.
        DataError: the data are unusable: too few items, no targets, labels out of range.
        ModelError: student or teacher do not accept the data, or a tapped module does not exist.
        TrainingDiverged: the loss is not finite; the message names the file with the batch.
    """
    _require()
    total = options.epochs if epochs is None else epochs
    if total < 1:
        raise ConfigError("a training needs at least one epoch", found=total)
    request = _Request(student, teacher, train, validation, task, options, seed, folder, cache_dir or folder / "cache", label, tuple(callbacks), total)
    identity = request.identity()
    finished = _finished(student, folder, identity)
    if finished is not None:
        return finished
    try:
        with _torch_settings(options.threads, seed, accelerator) as device_kind:
            return _train(request, device_kind, identity)
    finally:
        for callback in callbacks:
            callback.on_end()


def _require() -> None:
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise MissingDependency("torch", "distill", purpose="distillation") from error
    try:
        import lightning_fabric  # noqa: F401
    except ImportError as error:
        raise MissingDependency("lightning-fabric", "distill", purpose="distillation") from error
    try:
        import safetensors  # noqa: F401
    except ImportError as error:
        raise MissingDependency("safetensors", "distill", purpose="distillation") from error


def _finished(student: torch.nn.Module, folder: Path, identity: str) -> TrainResult | None:
    from edgekd.rebuild import load_weights

    if not (folder / RECORD).is_file():
        return None
    record = TrainRecord.load(folder / RECORD)
    _same_training(record.identity, identity, folder)
    weights = folder / WEIGHTS
    if not weights.is_file() or sha256_file(weights) != record.weights_sha256:
        raise ModelError("the weights of a finished training were changed", found=str(weights), hint="remove the folder; it is trained again", subject=weights)
    load_weights(student, weights)
    return TrainResult(student.eval(), record, weights, resumed=True)


def _same_training(found: str, identity: str, folder: Path) -> None:
    if found != identity:
        raise ConfigError(
            "the folder holds another training",
            found=f"{folder}: {found[:12]}",
            allowed=identity[:12],
            hint="options, seed, data, teacher or architecture differ: use another folder, or remove this one",
            subject=folder,
        )


@contextlib.contextmanager
def _torch_settings(threads: int, seed: int, accelerator: str) -> Iterator[str]:
    """Seed, threads and deterministic algorithms for the block; all as before afterwards."""
    import torch
    from torch.utils import deterministic

    before = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    fill = deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    chatter = logging.getLogger("lightning_fabric")
    level = chatter.level
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())
    cuda = list(range(torch.cuda.device_count())) if not on_cpu and torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=cuda):
        try:
            torch.manual_seed(seed)
            chatter.setLevel(logging.WARNING)
            if threads:
                torch.set_num_threads(threads)
            if on_cpu:
                torch.use_deterministic_algorithms(True, warn_only=False)
                deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
            yield "cpu" if on_cpu else accelerator
        finally:
            chatter.setLevel(level)
            torch.set_num_threads(before[0])
            torch.use_deterministic_algorithms(before[1], warn_only=before[2])
            deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Request:
    student: torch.nn.Module
    teacher: Teacher | None
    train: Split
    validation: Split
    task: Task
    options: TrainOptions
    seed: int
    folder: Path
    cache_dir: Path
    label: str
    callbacks: tuple[Callback, ...]
    epochs: int

    def identity(self) -> str:
        """What is trained on what; a folder holds one such training. Threads and checkpoint times are no part of it."""
        shapes = {name: [str(value.dtype), *value.shape] for name, value in self.student.state_dict().items()}
        chosen = msgspec.structs.replace(self.options, threads=0, checkpoint_every_s=0.0).digest()
        teacher = self.teacher.weights_hash() if self.teacher else ""
        facts = [shapes, teacher, self.train.fingerprint(), self.validation.fingerprint(), self.task.describe(), chosen, self.seed, self.epochs]
        return hashlib.sha256(msgspec.json.encode(facts, order="deterministic")).hexdigest()


def _train(request: _Request, accelerator: str, identity: str) -> TrainResult:
    import torch
    from lightning_fabric import Fabric

    from edgekd.distill.checkpoint import load_checkpoint
    from edgekd.distill.setup import NOT_DETERMINISTIC, build_features, decide, first_batch, resolve_objective
    from edgekd.distill.sources import TeacherRunner
    from edgekd.distill.trainer import Trainer, count_steps

    student, options, folder = request.student, request.options, request.folder
    folder.mkdir(parents=True, exist_ok=True)
    notes: list[str] = []

    def say(text: str) -> None:
        notes.append(text)
        _log.info("%s: %s", request.label, text)
        for callback in request.callbacks:
            if isinstance(callback, Talks):
                callback.on_message(text)

    checkpoint = load_checkpoint(folder)
    plan = TrainPlan.load(folder / PLAN) if (folder / PLAN).is_file() else None
    for found in (plan, checkpoint.state if checkpoint else None):
        if found is not None:
            _same_training(found.identity, identity, folder)
    device = Fabric(accelerator=accelerator, devices=1).device
    student.to(device)
    wants_teacher = request.teacher is not None and (options.loss != "none" or bool(options.features))
    runner = TeacherRunner(request.teacher, device, [pair.teacher for pair in options.features]) if request.teacher and wants_teacher else None
    try:
        batch = first_batch(request.train, options.batch_size, student)
        features, outputs = build_features(student, runner, options, batch, device)
        objective = resolve_objective(options, request.task, outputs)
        if options.optimizer == "adamw" and options.learning_rate > 0.01:
            say(f"the learning rate {options.learning_rate} is high for AdamW; 0.001 is usual")
        plan, source = decide(
            student,
            runner,
            request.train,
            batch,
            options,
            identity=identity,
            epochs=request.epochs,
            cache_dir=request.cache_dir,
            seed=request.seed,
            device=device,
            say=say,
            plan=plan,
            state=checkpoint.state if checkpoint else None,
        )
        plan.save(folder / PLAN)
        torch.manual_seed(request.seed)
        trainer = Trainer(
            student,
            fabric=Fabric(accelerator=accelerator, devices=1, precision="bf16-mixed" if plan.precision == "bf16" else "32-true"),
            train=request.train,
            validation=request.validation,
            task=request.task,
            options=options,
            objective=objective,
            source=source,
            features=features,
            channels_last=plan.channels_last,
            epochs=request.epochs,
            steps_per_epoch=count_steps(request.train, options.batch_size),
            seed=request.seed,
            folder=folder,
            label=request.label,
            identity=identity,
            callbacks=request.callbacks,
            notes=notes,
        )
        if checkpoint is not None:
            trainer.restore(checkpoint)
        stopped = trainer.run()
    except RuntimeError as error:
        if NOT_DETERMINISTIC not in str(error):
            raise
        raise ModelError(
            "the student uses an operation that torch cannot run deterministically",
            found=str(error).split(".")[0],
            hint="replace the operation: a training that is killed has to go on with the same numbers",
            subject=request.label,
        ) from error
    finally:
        if runner is not None:
            runner.close()
    return _finish(request, trainer, plan, source, stopped, checkpoint is not None)


def _finish(request: _Request, trainer: Trainer, plan: TrainPlan, source: TeacherSource | None, stopped: bool, resumed: bool) -> TrainResult:
    """Write weights, then the record that says the training is finished, then remove what only a resumption needs."""
    import torch

    from edgekd.distill.checkpoint import remove_checkpoints
    from edgekd.rebuild import save_weights

    student, state, objective = request.student, trainer.state, trainer.objective
    values, selected = trainer.kept_values()
    weights = request.folder / WEIGHTS
    student.to("cpu").to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    student.load_state_dict(values)
    save_weights(student, weights)
    kept_epoch = state.best_epoch if selected.startswith("best") else len(state.rows)
    record = TrainRecord(
        label=request.label,
        identity=state.identity,
        metric=request.task.metric,
        epochs_planned=request.epochs,
        epochs=state.rows,
        steps=state.step,
        validation=state.rows[kept_epoch - 1].validation,
        best_epoch=state.best_epoch,
        selected=selected,
        stopped_early=stopped,
        loss=objective.kind,
        weight_task=objective.weight_task,
        weight_soft=objective.weight_soft,
        precision=plan.precision,
        precision_reason=plan.precision_reason,
        channels_last=plan.channels_last,
        teacher_outputs=source.mode if source else "none",
        teacher_outputs_reason=source.reason if source else plan.teacher_outputs_reason,
        device=str(trainer.device),
        parameters=sum(value.numel() for value in student.parameters()),
        seconds=trainer.seconds(),
        weights_sha256=sha256_file(weights),
        notes=tuple(dict.fromkeys(trainer.notes)),
    )
    record.save(request.folder / RECORD)
    remove_checkpoints(request.folder)
    return TrainResult(student.eval(), record, weights, resumed=resumed)
