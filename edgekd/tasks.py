"""What outputs mean: unpacking a batch, losses for training, scores and agreement in numpy so that a gate needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgekd.contracts import Task, Tensors
from edgekd.errors import ConfigError, DataError, ModelError, near_names

if TYPE_CHECKING:
    import torch

_TARGET_KEYS = ("target", "targets", "label", "labels", "y")


def unpack_batch(batch: Any, input_names: Sequence[str], target_key: str | None = None) -> tuple[dict[str, Any], Any]:
    """Named inputs and the target of a collated batch.

    A tuple or list is `(input, ..., target)`; an input that is a mapping is taken by its names. A mapping holds the inputs by
    name and the target under `target_key` (default: target, targets, label, labels or y).

    Raises:
        DataError: no target is found, or the inputs do not match the model's.
    """
    if isinstance(batch, Mapping):
        key = target_key or next((name for name in _TARGET_KEYS if name in batch), None)
        if key is None or key not in batch:
            raise DataError(
                "a batch has no target",
                found=sorted(map(str, batch)),
                allowed=f"one of the keys {', '.join(_TARGET_KEYS)}, or the task's target=",
                hint="name it: Classification(target=...)",
            )
        inputs = {name: value for name, value in batch.items() if name != key}
        if input_names:
            missing = [name for name in input_names if name not in inputs]
            if missing:
                raise DataError(f"a batch lacks the model's input {missing[0]!r}", found=sorted(inputs), allowed=list(input_names), subject=missing[0])
            inputs = {name: inputs[name] for name in input_names}
        return inputs, batch[key]
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        *parts, target = batch
        if len(parts) == 1 and isinstance(parts[0], Mapping):
            return unpack_batch({**parts[0], "target": target}, input_names, "target")
        names = list(input_names) or (["input"] if len(parts) == 1 else [f"input_{position}" for position in range(len(parts))])
        if len(names) < len(parts):
            raise DataError("a batch has more inputs than the model", found=len(parts), allowed=names)
        return dict(zip(names, parts, strict=False)), target
    raise DataError("a batch cannot be split into inputs and a target", found=type(batch).__name__, allowed="(input, ..., target) or a mapping with a target")


def pick_output(outputs: Mapping[str, Any], wanted: str | None, task: str) -> Any:
    """The output that a task reads: the named one, or the only one.

    Raises:
        ModelError: there are several and none is named, or the name is unknown.
    """
    if wanted is None:
        if len(outputs) != 1:
            raise ModelError(f"the task {task} does not know which output to read", found=sorted(outputs), hint=f'name it: {task}(output="...")')
        return next(iter(outputs.values()))
    if wanted not in outputs:
        raise ModelError(f"the task {task} reads an output that the model lacks", found=wanted, allowed=near_names(wanted, outputs), subject=wanted)
    return outputs[wanted]


def _outside(smallest: int, largest: int, classes: int, split: str, output: str) -> DataError:
    """`output` is the name of the one that was read; a model's lone output is called `output` (see `tree`) and is not named here."""
    named = None if output == "output" else output
    from_one = smallest == 1 and largest == classes
    return DataError(
        f"the labels{f' of the {split} split' if split else ''} are outside the classes" + (f" of {named!r}" if named else ""),
        found=f"{smallest} to {largest}",
        allowed=f"0 to {classes - 1}",
        hint="they start at 1: subtract 1" if from_one else "check the label encoding and the model's last layer",
        subject=named,
    )


class Classification:
    """One class of several per item: logits `(items, classes, ...)` and integer targets `(items, ...)`; a score is 1 where the
    largest logit is the target. Extra axes (segmentation) are averaged, and then scores are shares, not 0 or 1."""

    name = "classification"
    bounded = True
    binary = True
    """Whether scores are 0 or 1: so until `check` sees extra axes."""

    def __init__(self, *, output: str | None = None, target: str | None = None, labels: Sequence[str] = (), metric: str = "accuracy") -> None:
        self.output = output
        self.target = target
        self.labels = tuple(labels)
        self.metric = metric

    def __getstate__(self) -> dict[str, Any]:
        """The state without what `check` learns: a task that was used and a new one are the same task (`code_hash`)."""
        return {name: value for name, value in vars(self).items() if name != "binary"}

    def unpack(self, batch: Any, input_names: Sequence[str]) -> tuple[dict[str, Any], Any]:
        return unpack_batch(batch, input_names, self.target)

    def check(self, outputs: Tensors, targets: Any, split: str = "") -> None:
        logits = pick_output(outputs, self.output, "Classification")
        labels = np.asarray(targets)
        if logits.ndim < 2:
            raise ModelError("a classifier's output needs an axis of classes", found=f"shape {logits.shape}", allowed="(items, classes)", subject=self.output)
        if not np.issubdtype(labels.dtype, np.integer):
            raise DataError("class labels must be integers", found=str(labels.dtype), hint="convert them, or use Regression")
        if labels.shape != (logits.shape[0], *logits.shape[2:]):
            raise ModelError(
                "outputs and labels have different shapes",
                found=f"outputs {logits.shape}, labels {labels.shape}",
                allowed=f"labels {(logits.shape[0], *logits.shape[2:])}",
            )
        if labels.size and (labels.min() < 0 or labels.max() >= logits.shape[1]):
            raise _outside(int(labels.min()), int(labels.max()), logits.shape[1], split, self.output or next(iter(outputs)))
        self.binary = logits.ndim == 2

    def scores(self, outputs: Tensors, targets: Any) -> NDArray[np.float64]:
        logits = pick_output(outputs, self.output, "Classification")
        hits = (logits.argmax(axis=1) == np.asarray(targets)).astype(np.float64)
        result: NDArray[np.float64] = hits.reshape(len(hits), -1).mean(axis=1)
        return result

    def agreement(self, outputs: Tensors, reference: Tensors) -> NDArray[np.float64]:
        mine = pick_output(outputs, self.output, "Classification").argmax(axis=1)
        other = pick_output(reference, self.output, "Classification").argmax(axis=1)
        same = (mine == other).astype(np.float64)
        result: NDArray[np.float64] = same.reshape(len(same), -1).mean(axis=1)
        return result

    def classes(self, targets: Any) -> NDArray[np.int64] | None:
        labels = np.asarray(targets)
        return labels.astype(np.int64) if labels.ndim == 1 else None

    def loss(self, outputs: Mapping[str, torch.Tensor], target: Any) -> torch.Tensor:
        import torch

        logits = pick_output(outputs, self.output, "Classification")
        return torch.nn.functional.cross_entropy(logits.float(), target.long())

    def distillation(self, outputs: Mapping[str, torch.Tensor], teacher: Mapping[str, torch.Tensor], loss: str, temperature: float) -> torch.Tensor:
        from edgekd.distill.losses import soft_target_loss

        return soft_target_loss(loss, pick_output(outputs, self.output, "Classification"), pick_output(teacher, self.output, "Classification"), temperature)

    def describe(self) -> dict[str, str]:
        return {"task": self.name, "output": self.output or "", "target": self.target or "", "labels": "\n".join(self.labels), "metric": self.metric}


class Regression:
    """Real values per item, `(items, ...)`. A score is `1 - e² / var`, with `e²` the squared error summed over an item's values
    and `var` its mean over the split around the split's mean target, so that the mean score is R²; at most 1, without lower bound."""

    name = "regression"
    binary = False
    bounded = False

    def __init__(self, *, output: str | None = None, target: str | None = None, metric: str = "r2") -> None:
        self.output = output
        self.target = target
        self.metric = metric

    def unpack(self, batch: Any, input_names: Sequence[str]) -> tuple[dict[str, Any], Any]:
        return unpack_batch(batch, input_names, self.target)

    def check(self, outputs: Tensors, targets: Any, split: str = "") -> None:
        values = pick_output(outputs, self.output, "Regression")
        if not np.issubdtype(np.asarray(targets).dtype, np.number):
            raise DataError("regression targets must be numbers", found=str(np.asarray(targets).dtype))
        if self._flat(values).shape != self._flat(np.asarray(targets)).shape:
            raise ModelError("outputs and targets have different shapes", found=f"outputs {values.shape}, targets {np.asarray(targets).shape}")

    @staticmethod
    def _flat(values: Any) -> NDArray[np.float64]:
        array = np.asarray(values, dtype=np.float64)
        return array.reshape(len(array), -1)

    @classmethod
    def _variance(cls, values: Any) -> float:
        flat = cls._flat(values)
        variance = float(((flat - flat.mean(axis=0)) ** 2).sum(axis=1).mean())
        if variance <= 0.0:
            raise DataError("all regression targets are equal, so R² is not defined", found=f"{len(flat)} items", hint="give a split with different targets")
        return variance

    def scores(self, outputs: Tensors, targets: Any) -> NDArray[np.float64]:
        error = self._flat(pick_output(outputs, self.output, "Regression")) - self._flat(targets)
        result: NDArray[np.float64] = 1.0 - (error**2).sum(axis=1) / self._variance(targets)
        return result

    def agreement(self, outputs: Tensors, reference: Tensors) -> NDArray[np.float64]:
        other = pick_output(reference, self.output, "Regression")
        error = ((self._flat(pick_output(outputs, self.output, "Regression")) - self._flat(other)) ** 2).sum(axis=1)
        result: NDArray[np.float64] = np.clip(1.0 - error / self._variance(other), 0.0, 1.0)
        return result

    def classes(self, targets: Any) -> NDArray[np.int64] | None:
        return None

    def loss(self, outputs: Mapping[str, torch.Tensor], target: Any) -> torch.Tensor:
        import torch

        values = pick_output(outputs, self.output, "Regression").float()
        return torch.nn.functional.mse_loss(values, target.float().reshape(values.shape))

    def distillation(self, outputs: Mapping[str, torch.Tensor], teacher: Mapping[str, torch.Tensor], loss: str, temperature: float) -> torch.Tensor:
        from edgekd.distill.losses import soft_target_loss

        return soft_target_loss("mse", pick_output(outputs, self.output, "Regression"), pick_output(teacher, self.output, "Regression"), temperature)

    def describe(self) -> dict[str, str]:
        return {"task": self.name, "output": self.output or "", "target": self.target or "", "metric": self.metric}


class MultiTask:
    """Several outputs, each with its own task; targets are a mapping with the same keys. Losses are added with `weights`
    (default 1 each); scores and agreement are the mean over the tasks, so that every task counts alike.

    A part may be a task of your own. It is asked for everything as it is, and sees one output: the one called by its `output`
    attribute, or by the part's key where it has none.

    Raises:
        ConfigError: no part, a part that is no task or a `MultiTask` itself, or a weight without a part.
    """

    name = "multi"
    binary = False

    def __init__(self, tasks: Mapping[str, Task], *, weights: Mapping[str, float] | None = None, metric: str = "mean score") -> None:
        self.metric = metric
        if not tasks:
            raise ConfigError("a MultiTask needs at least one task", hint='MultiTask({"kind": Classification(), "size": Regression()})')
        self.tasks = dict(tasks)
        for name, part in self.tasks.items():
            if isinstance(part, MultiTask) or not isinstance(part, Task):
                raise ConfigError(
                    f"the part {name!r} of a MultiTask is no task of one output",
                    found=part.__name__ if isinstance(part, type) else type(part).__name__,
                    allowed="an object such as Classification() or Regression(), or a Task of your own",
                    subject=name,
                )
        self.weights = dict.fromkeys(tasks, 1.0) | dict(weights or {})
        unknown = set(self.weights) - set(self.tasks)
        if unknown:
            raise ConfigError("a weight has no task", found=sorted(unknown), allowed=sorted(self.tasks))

    def unpack(self, batch: Any, input_names: Sequence[str]) -> tuple[dict[str, Any], Any]:
        if isinstance(batch, Mapping) and not any(key in batch for key in _TARGET_KEYS):
            missing = [name for name in self.tasks if name not in batch]
            if missing:
                raise DataError("a batch lacks the target of a task", found=sorted(map(str, batch)), allowed=sorted(self.tasks), subject=missing[0])
            inputs = {name: value for name, value in batch.items() if name not in self.tasks}
            return unpack_batch({**inputs, "target": {name: batch[name] for name in self.tasks}}, input_names, "target")
        return unpack_batch(batch, input_names, None)

    @property
    def bounded(self) -> bool:
        """Whether every score lies in [0, 1]: so it is where every part states it."""
        return all(has_bounded_scores(task) for task in self.tasks.values())

    def part(self, outputs: Mapping[str, Any], name: str) -> dict[str, Any]:
        """The one output that the part `name` reads, under the name that the part knows it by.

        Raises:
            ModelError: the model lacks it.
        """
        output = getattr(self.tasks[name], "output", None) or name
        return {output: pick_output(outputs, output, "MultiTask")}

    def _parts(self, outputs: Mapping[str, Any], targets: Any) -> Iterator[tuple[str, Task, dict[str, Any], Any]]:
        """Key, task, output and target of every part."""
        if not isinstance(targets, Mapping):
            raise DataError("a MultiTask's targets are a mapping, one entry per task", found=type(targets).__name__, allowed=sorted(self.tasks))
        for name, task in self.tasks.items():
            if name not in targets:
                raise DataError(f"the target of the task {name!r} is missing", found=sorted(targets), allowed=sorted(self.tasks), subject=name)
            yield name, task, self.part(outputs, name), targets[name]

    def check(self, outputs: Tensors, targets: Any, split: str = "") -> None:
        for _, task, part, target in self._parts(outputs, targets):
            task.check(part, target, split)

    def scores(self, outputs: Tensors, targets: Any) -> NDArray[np.float64]:
        result: NDArray[np.float64] = np.mean([task.scores(part, target) for _, task, part, target in self._parts(outputs, targets)], axis=0)
        return result

    def agreement(self, outputs: Tensors, reference: Tensors) -> NDArray[np.float64]:
        values = [task.agreement(self.part(outputs, name), self.part(reference, name)) for name, task in self.tasks.items()]
        result: NDArray[np.float64] = np.mean(values, axis=0)
        return result

    def classes(self, targets: Any) -> NDArray[np.int64] | None:
        return None

    def loss(self, outputs: Mapping[str, torch.Tensor], target: Any) -> torch.Tensor:
        import torch

        losses = [task.loss(part, goal) * self.weights[name] for name, task, part, goal in self._parts(outputs, target)]
        return torch.stack(losses).sum()

    def distillation(self, outputs: Mapping[str, torch.Tensor], teacher: Mapping[str, torch.Tensor], loss: str, temperature: float) -> torch.Tensor:
        import torch

        losses = [
            task.distillation(self.part(outputs, name), self.part(teacher, name), loss, temperature) * self.weights[name] for name, task in self.tasks.items()
        ]
        return torch.stack(losses).sum()

    def describe(self) -> dict[str, str]:
        text = {"task": self.name, "metric": self.metric}
        for name, task in self.tasks.items():
            text |= {f"{name}.{key}": value for key, value in task.describe().items()}
            text[f"{name}.weight"] = repr(self.weights[name])
        return text


def has_bounded_scores(task: Task) -> bool:
    """Whether the task states (`bounded = True`) that every score lies in [0, 1]; a task that says nothing has scores of unknown range.

    What a class states holds for the `scores` that it has or inherits; a subclass with `scores` of its own states it anew.
    """
    if "bounded" not in getattr(task, "__dict__", {}):
        for cls in type(task).__mro__:
            if "bounded" in vars(cls):
                break
            if "scores" in vars(cls):
                return False
    return bool(getattr(task, "bounded", False))


def task_from(described: Mapping[str, str]) -> Task:
    """The task that `describe` wrote down, for gates; the reverse of `Task.describe`.

    Raises:
        ConfigError: the kind of task is unknown.
    """
    kind = described.get("task", "")
    if kind == "classification":
        labels = described.get("labels", "")
        return Classification(
            output=described.get("output") or None,
            target=described.get("target") or None,
            labels=labels.split("\n") if labels else (),
            metric=described.get("metric", "accuracy"),
        )
    if kind == "regression":
        return Regression(output=described.get("output") or None, target=described.get("target") or None, metric=described.get("metric", "r2"))
    if kind == "multi":
        names = [key.removesuffix(".task") for key in described if key.endswith(".task")]
        parts = {name: task_from({key.removeprefix(f"{name}."): value for key, value in described.items() if key.startswith(f"{name}.")}) for name in names}
        return MultiTask(parts, weights={name: float(described[f"{name}.weight"]) for name in names}, metric=described.get("metric", "mean score"))
    raise ConfigError("unknown task", found=kind, allowed=near_names(kind, ("classification", "regression", "multi")))


def as_task(task: str | Task) -> Task:
    """The task itself, or the one with this name (`"classification"`, `"regression"`)."""
    if isinstance(task, str):
        return task_from({"task": task})
    if not isinstance(task, Task):
        raise ConfigError("this is no task", found=type(task).__name__, allowed='"classification", "regression", or a Task such as edgekd.MultiTask')
    return task
