"""The training loop: one object whose whole state goes into a checkpoint, so that a killed training goes on with the same numbers."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from edgekd.contracts import Callback, Task
from edgekd.data import Batch, Split
from edgekd.distill.checkpoint import Checkpoint, pack_optimizer, pack_rng, plain, save_checkpoint, unpack_optimizer, unpack_rng
from edgekd.distill.features import FeatureLoss, FeatureTaps, feature_name
from edgekd.distill.optim import Ema, learning_rate, make_optimizer, weights_swapped
from edgekd.distill.record import EpochRow, TrainState
from edgekd.distill.sources import FEATURE_PREFIX, TeacherSource, as_tensors
from edgekd.errors import DataError, ModelError, TrainingDiverged
from edgekd.options import TrainOptions
from edgekd.storage import write_atomic
from edgekd.tree import flatten_outputs, to_numpy

EPOCH_CHECKPOINT_MIN_S = 1.0
"""The checkpoint at the end of an epoch is left out if the last one is younger than this and than `checkpoint_every_s`."""


@dataclass(frozen=True)
class Objective:
    """The weighted sum that is minimised: `kind` and `temperature` are passed to `Task.distillation`; 0 takes the kind's default."""

    kind: str
    temperature: float
    weight_task: float
    weight_soft: float


def epoch_batches(items: int, batch_size: int, seed: int, epoch: int) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    """The indices of each batch of an epoch, in an order drawn from (seed, epoch). Every item comes once.

    A last batch of one item joins the batch before it, because batch norm cannot train on one item.
    """
    order = np.random.default_rng([seed, epoch, 0xDA]).permutation(items).astype(np.int64)
    parts = [order[start : start + batch_size] for start in range(0, items, batch_size)]
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [np.concatenate(parts[-2:])]
    return parts


def has_batch_norm(module: nn.Module) -> bool:
    """Whether a module holds batch norm of any kind."""
    return any(isinstance(child, nn.modules.batchnorm._BatchNorm) for child in module.modules())


def target_tensors(targets: Any, device: torch.device) -> Any:
    """Targets as tensors on a device: one, or a mapping by name."""
    if isinstance(targets, Mapping):
        return as_tensors(targets, device)
    return as_tensors({"": targets}, device)[""]


def evaluate(module: nn.Module, split: Split, task: Task, device: torch.device, batch_size: int) -> float:
    """The task's metric of a module on a split, in evaluation mode and float32.

    Raises:
        DataError: the split has no targets, or they do not fit.
    """
    was_training = module.training
    module.eval()
    outputs: list[dict[str, Any]] = []
    targets: list[Any] = []
    try:
        with torch.no_grad():
            for batch in _plain_batches(split, batch_size):
                if batch.targets is None:
                    raise DataError(f"the {split.name} data have no targets", hint="a metric needs labels", subject=split.name)
                raw = module(*as_tensors(batch.inputs, device).values())
                outputs.append({name: to_numpy(value) for name, value in flatten_outputs(raw).items()})
                targets.append(batch.targets)
    finally:
        module.train(was_training)
    joined = {name: np.concatenate([part[name] for part in outputs]) for name in outputs[0]}
    goal: Any = {name: np.concatenate([part[name] for part in targets]) for name in targets[0]} if isinstance(targets[0], Mapping) else np.concatenate(targets)
    if not all(np.isfinite(value).all() for value in joined.values()):
        raise TrainingDiverged("the student gives NaN or infinity on the validation data", hint="lower the learning rate", subject=split.name)
    task.check(joined, goal, split.name)
    return float(np.mean(task.scores(joined, goal)))


def _plain_batches(split: Split, batch_size: int) -> Iterator[Batch]:
    if not split.indexed:
        yield from split.stream(0)
        return
    for start in range(0, len(split), batch_size):
        yield split.batch(np.arange(start, min(start + batch_size, len(split))))


class Trainer:
    """Trains `student` in place. `run` goes on from `state`; `restore` sets it from a checkpoint."""

    def __init__(
        self,
        student: nn.Module,
        *,
        fabric: Any,
        train: Split,
        validation: Split,
        task: Task,
        options: TrainOptions,
        objective: Objective,
        source: TeacherSource | None,
        features: FeatureLoss | None,
        channels_last: bool,
        epochs: int,
        steps_per_epoch: int,
        seed: int,
        folder: Path,
        label: str,
        identity: str,
        callbacks: Sequence[Callback],
        notes: list[str],
    ) -> None:
        self.student = student
        self.device: torch.device = fabric.device
        self.options = options
        self.objective = objective
        self.source = source
        self.features = features
        self.epochs = epochs
        self.steps_per_epoch = steps_per_epoch
        self.label = label
        self.notes = notes
        self.best_values: dict[str, Tensor] = {}
        self.state = TrainState(identity=identity)
        self._train, self._validation, self._task = train, validation, task
        self._seed = seed
        self._folder = folder
        self._callbacks = callbacks
        self._fabric = fabric
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        student.to(memory_format=self._layout)  # type: ignore[call-overload]
        owners = (student,) if features is None else (student, features)
        self.optimizer = make_optimizer(owners, options)
        self._parameters = [value for group in self.optimizer.param_groups for value in group["params"]]
        self._model = fabric.setup_module(student)
        self._stepper = fabric.setup_optimizers(self.optimizer)
        self.ema = Ema(student, options.ema) if options.ema > 0.0 else None
        self._batch_norm = has_batch_norm(student)
        self._saved_at = time.monotonic()
        self._began_at = time.monotonic()
        self._seconds_before = 0.0

    # ------------------------------------------------------------------------------------------ state

    def checkpoint(self) -> None:
        """Write the state."""
        tensors, scalars, groups = pack_optimizer(self.optimizer)
        source = self.source
        self.state = msgspec.structs.replace(
            self.state,
            seconds=self.seconds(),
            notes=tuple(dict.fromkeys(self.notes)),
            optimizer_groups=groups,
            optimizer_scalars=scalars,
            teacher_outputs=source.mode if source else "",
            teacher_outputs_reason=source.reason if source else "",
        )
        parts = {
            "model": plain(self.student.state_dict()),
            "optimizer": tensors,
            "rng": pack_rng(self.device),
            "ema": plain(self.ema.values) if self.ema else {},
            "best": self.best_values,
            "projectors": plain(self.features.state_dict()) if self.features else {},
        }
        save_checkpoint(self._folder, Checkpoint(self.state, {name: values for name, values in parts.items() if values}))
        self._saved_at = time.monotonic()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint.

        Raises:
            ModelError: it belongs to another architecture.
        """
        parts = checkpoint.tensors
        try:
            self.student.load_state_dict(parts["model"])
            if self.features is not None and "projectors" in parts:
                self.features.load_state_dict(parts["projectors"])
        except RuntimeError as error:
            raise ModelError("a checkpoint belongs to another model", found=str(error).splitlines()[0], hint="remove it, or use another folder") from error
        unpack_optimizer(self.optimizer, parts.get("optimizer", {}), checkpoint.state.optimizer_scalars, checkpoint.state.optimizer_groups)
        if self.ema is not None:
            self.ema.load(parts["ema"])
        self.best_values = parts.get("best", {})
        unpack_rng(parts["rng"], self.device)
        self.state = checkpoint.state
        self.notes[:0] = checkpoint.state.notes
        self._seconds_before = checkpoint.state.seconds

    def seconds(self) -> float:
        """Wall time of the training over all its processes."""
        return self._seconds_before + time.monotonic() - self._began_at

    def kept_values(self) -> tuple[dict[str, Tensor], str]:
        """The weights that the training ends with, and how they were selected: the best on validation with patience, else the last."""
        mark = " (ema)" if self.ema else ""
        if self.options.patience and self.best_values:
            return self.best_values, f"best{mark}"
        return plain(self.ema.values if self.ema else self.student.state_dict()), f"last{mark}"

    # ------------------------------------------------------------------------------------------ loop

    def run(self) -> bool:
        """Train until the last epoch or until patience ends; true if it stopped early.

        Raises:
            TrainingDiverged: the loss is not finite; the batch is saved beside the checkpoints.
        """
        for callback in self._callbacks:
            callback.on_start(self.label, self.epochs, self.steps_per_epoch)
        while self.state.epoch < self.epochs:
            if self._exhausted():
                return True
            self._epoch()
        return False

    def _exhausted(self) -> bool:
        return self.options.patience > 0 and self.state.waited >= self.options.patience

    def _epoch(self) -> None:
        epoch, began = self.state.epoch, time.monotonic()
        if self.source is not None:
            self.source.start_epoch(epoch)
        self.student.train()
        rate = 0.0
        with contextlib.ExitStack() as stack:
            taps = None
            if self.features is not None:
                names = [pair.student for pair in self.features.pairs]
                taps = stack.enter_context(FeatureTaps(self.student, names, owner="student"))
            for position, batch in self._batches(epoch):
                rate = learning_rate(self.state.step, self.epochs * self.steps_per_epoch, self.options.learning_rate, self.options.warmup_share)
                losses = self._step(batch, epoch, rate, taps)
                sums = {name: self.state.sums.get(name, 0.0) + value * len(batch) for name, value in losses.items()}
                self.state = msgspec.structs.replace(
                    self.state, position=position + 1, step=self.state.step + 1, items=self.state.items + len(batch), sums=sums
                )
                for callback in self._callbacks:
                    callback.on_step(self.state.step, losses)
                if position + 1 < self.steps_per_epoch and time.monotonic() - self._saved_at >= self.options.checkpoint_every_s:
                    self.checkpoint()
        self._finish_epoch(epoch, rate, began)

    def _batches(self, epoch: int) -> Iterator[tuple[int, Batch]]:
        """The batches of an epoch that are not done yet, each with its position; a stream's batch of one is left out with batch norm."""
        done = self.state.position
        if self._train.indexed:
            view = self.source.view(epoch) if self.source else (epoch % self.options.views if self._train.augmented else None)
            for position, indices in enumerate(epoch_batches(len(self._train), self.options.batch_size, self._seed, epoch)):
                if position >= done:
                    yield position, self._train.batch(indices, view)
            return
        for position, batch in enumerate(self._train.stream(epoch)):
            if position >= done and not (len(batch) == 1 and self._batch_norm):
                yield position, batch

    def _step(self, batch: Batch, epoch: int, rate: float, taps: FeatureTaps | None) -> dict[str, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        inputs = [value.contiguous(memory_format=self._layout) if value.ndim == 4 else value for value in as_tensors(batch.inputs, self.device).values()]
        outputs = flatten_outputs(self._model(*inputs))
        if epoch == 0 and batch.targets is not None:
            self._task.check({name: to_numpy(value) for name, value in outputs.items()}, batch.targets, "train")
        loss, parts = self._loss(batch, outputs, epoch, taps)
        values = torch.stack([loss.detach(), *(part.detach() for part in parts.values())]).tolist()
        if not np.isfinite(values).all():
            self._diverged(batch, dict(zip(("loss", *parts), values, strict=True)))
        self.optimizer.zero_grad(set_to_none=True)
        self._fabric.backward(loss)
        if self.options.clip_norm > 0.0:
            norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.options.clip_norm)
            if not bool(torch.isfinite(norm)):
                self._diverged(batch, {"loss": values[0], "gradient norm": float(norm)})
        self._stepper.step()
        if self.ema is not None:
            self.ema.update(self.student, self.state.step)
        return dict(zip(("loss", *parts), values, strict=True))

    def _loss(self, batch: Batch, outputs: Mapping[str, Tensor], epoch: int, taps: FeatureTaps | None) -> tuple[Tensor, dict[str, Tensor]]:
        parts: dict[str, Tensor] = {}
        weights: dict[str, float] = {}
        if self.objective.weight_task > 0.0:
            if batch.targets is None:
                raise DataError("the training data have no targets", hint="set TrainOptions(weight_task=0) to learn from the teacher alone", subject="train")
            parts["task"] = self._task.loss(outputs, target_tensors(batch.targets, self.device))
            weights["task"] = self.objective.weight_task
        if self.source is not None:
            given = self.source.get(batch, epoch)
            soft = {name: value for name, value in given.items() if not name.startswith(FEATURE_PREFIX)}
            if self.objective.weight_soft > 0.0:
                parts["soft"] = self._task.distillation(outputs, soft, self.objective.kind, self.objective.temperature)
                weights["soft"] = self.objective.weight_soft
            if self.features is not None and taps is not None:
                tapped = {name.removeprefix(FEATURE_PREFIX): value for name, value in given.items() if name.startswith(FEATURE_PREFIX)}
                parts |= self.features(taps.taken(), tapped)
                weights |= {feature_name(pair): weight for pair, weight in zip(self.features.pairs, self.features.weights, strict=True)}
        total = torch.stack([parts[name].float() * weights[name] for name in parts]).sum()
        return total, parts

    def _diverged(self, batch: Batch, values: Mapping[str, float]) -> None:
        path = self._folder / f"diverged-step-{self.state.step + 1:06d}.npz"
        arrays: dict[str, Any] = {"indices": batch.indices} | {f"input.{name}": value for name, value in batch.inputs.items()}
        if isinstance(batch.targets, Mapping):
            arrays |= {f"target.{name}": value for name, value in batch.targets.items()}
        elif batch.targets is not None:
            arrays["target"] = batch.targets
        stream = io.BytesIO()
        np.savez(stream, **arrays)
        write_atomic(path, stream.getvalue())
        raise TrainingDiverged(
            f"the training left the finite numbers in epoch {self.state.epoch + 1}, step {self.state.step + 1}",
            found=", ".join(f"{name} {value}" for name, value in values.items()),
            hint=f"lower the learning rate ({self.options.learning_rate}) or clip_norm ({self.options.clip_norm}); the batch is saved in {path}",
            subject=path,
        )

    def _finish_epoch(self, epoch: int, rate: float, began: float) -> None:
        averaged = self.ema.values if self.ema else None
        with weights_swapped(self.student, averaged):
            metric = evaluate(self.student, self._validation, self._task, self.device, self.options.batch_size)
        items = max(1, self.state.items)
        row = EpochRow(
            epoch=epoch + 1,
            train_loss=self.state.sums.get("loss", 0.0) / items,
            parts={name: value / items for name, value in self.state.sums.items() if name != "loss"},
            validation=metric,
            learning_rate=rate,
            seconds=time.monotonic() - began,
        )
        improved = self.state.best is None or metric > self.state.best
        if improved and self.options.patience:
            self.best_values = plain(averaged if averaged is not None else self.student.state_dict())
        self.state = msgspec.structs.replace(
            self.state,
            epoch=epoch + 1,
            position=0,
            items=0,
            sums={},
            rows=(*self.state.rows, row),
            best=metric if improved else self.state.best,
            best_epoch=epoch + 1 if improved else self.state.best_epoch,
            waited=0 if improved else self.state.waited + 1,
        )
        for callback in self._callbacks:
            callback.on_epoch(epoch + 1, {"train_loss": row.train_loss, "validation": metric, "learning_rate": rate, "seconds": row.seconds, **row.parts})
        if time.monotonic() - self._saved_at >= min(EPOCH_CHECKPOINT_MIN_S, self.options.checkpoint_every_s):
            self.checkpoint()


def count_steps(train: Split, batch_size: int) -> int:
    """Batches per epoch; a stream is read once to count them."""
    if train.indexed:
        return len(epoch_batches(len(train), batch_size, 0, 0))
    return sum(1 for _ in train.stream(0))
