"""Tiny data, teachers and students that the tests of distillation share; importable by child processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import nn

from edgekd.contracts import Callback, Task, Teacher
from edgekd.data import Arrays, Augment, Split, make_split
from edgekd.distill.run import TrainResult, distil
from edgekd.options import TrainOptions
from edgekd.tasks import Classification
from edgekd.teachers import as_teacher

QUICK = TrainOptions(epochs=4, batch_size=16, learning_rate=0.05, threads=1, precision="fp32", teacher_outputs="cached", checkpoint_every_s=1000.0)
"""A few epochs with everything fixed that `auto` would decide by timing."""


class Mlp(nn.Module):
    """Linear, batch norm, ReLU, dropout, linear."""

    def __init__(self, width: int, inputs: int = 8, classes: int = 6, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(dropout)
        self.last = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.last(self.drop(torch.relu(self.norm(self.first(x)))))
        return hidden


class Cnn(nn.Module):
    """Two convolutions, pooled, linear."""

    def __init__(self, width: int, classes: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.body = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.last = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = torch.relu(self.body(torch.relu(self.stem(x))))
        out: torch.Tensor = self.last(maps.mean(dim=(2, 3)))
        return out


def seeded(factory: Any, *args: Any, seed: int = 0, **kwargs: Any) -> Any:
    """A module with seeded initial weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return factory(*args, **kwargs)


def blobs(items: int, seed: int, classes: int = 6, inputs: int = 8) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Gaussian clusters around fixed centres: an easy classification set."""
    centres = np.random.default_rng(99).normal(size=(classes, inputs)) * 2.0
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, size=items)
    values = centres[labels] + generator.normal(size=(items, inputs)) * 0.7
    return values.astype(np.float32), labels.astype(np.int64)


def split(data: Any, name: str, task: Task | None = None, **kwargs: Any) -> Split:
    """A split for a task (classification if none is given)."""
    return make_split(data, task or Classification(), name=name, **kwargs)


def blob_splits(items: int = 160, augment: Augment | None = None) -> tuple[Split, Split]:
    """Train and validation splits of the clusters."""
    return split(Arrays(*blobs(items, 1)), "train", augment=augment), split(Arrays(*blobs(120, 2)), "validation")


def shift(item: Any, generator: np.random.Generator) -> Any:
    """An augmentation: a small seeded shift."""
    return item + generator.normal(size=item.shape).astype(np.float32) * 0.2


def trained_teacher(width: int = 48) -> Teacher:
    """A teacher trained on labels, good on the clusters."""
    values, labels = blobs(400, 3)
    module = seeded(Mlp, width)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(torch.from_numpy(values)), torch.from_numpy(labels)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return as_teacher(module.eval())


def quick(
    student: nn.Module,
    folder: Path,
    *,
    teacher: Teacher | None,
    options: TrainOptions = QUICK,
    splits: tuple[Split, Split] | None = None,
    callbacks: tuple[Callback, ...] = (),
    task: Task | None = None,
    **kwargs: Any,
) -> TrainResult:
    """`distil` with the tests' usual arguments, on the CPU."""
    train, validation = splits or blob_splits()
    return distil(
        student,
        teacher=teacher,
        train=train,
        validation=validation,
        task=task or Classification(),
        options=options,
        seed=kwargs.pop("seed", 5),
        folder=folder,
        callbacks=callbacks,
        accelerator="cpu",
        **kwargs,
    )


class Marker:
    """A callback that appends a byte to a file at every step, so that another process sees how far a training is."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_start(self, label: str, epochs: int, steps_per_epoch: int) -> None:
        self.path.touch()

    def on_step(self, step: int, losses: Any) -> None:
        with self.path.open("ab") as stream:
            stream.write(b".")

    def on_epoch(self, epoch: int, metrics: Any) -> None:
        pass

    def on_end(self) -> None:
        pass


def resumable(folder: Path, marker: Path) -> None:
    """One training with everything that has a state: dropout, batch norm, EMA, AdamW or SGD, augmentation, patience, projectors' absence."""
    torch.set_num_threads(1)
    options = TrainOptions(
        epochs=5,
        batch_size=16,
        learning_rate=0.05,
        threads=1,
        ema=0.9,
        patience=4,
        views=2,
        precision="fp32",
        teacher_outputs="cached",
        checkpoint_every_s=0.0,
    )
    quick(
        seeded(Mlp, 8, dropout=0.2),
        folder,
        teacher=as_teacher(seeded(Mlp, 24, seed=7).eval()),
        options=options,
        splits=blob_splits(150, augment=shift),
        callbacks=(Marker(marker),),
    )


def with_options(**changes: Any) -> TrainOptions:
    """`QUICK` with some fields changed."""
    return msgspec.structs.replace(QUICK, **changes)


class Stops:
    """A callback that interrupts the training, as Ctrl-C does, after some steps."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_start(self, label: str, epochs: int, steps_per_epoch: int) -> None:
        self.ended = False

    def on_step(self, step: int, losses: Any) -> None:
        if step == self.after:
            raise KeyboardInterrupt

    def on_epoch(self, epoch: int, metrics: Any) -> None:
        pass

    def on_end(self) -> None:
        self.ended = True
