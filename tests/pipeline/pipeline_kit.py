"""Tiny trained teachers, data and one call of the whole pipeline on the null target, for the tests of the main path."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from torch import nn

from edgekd.contracts import StudentSpace, Target, Task
from edgekd.data import Arrays
from edgekd.options import Options, QuantizeOptions, SearchOptions, TrainOptions
from edgekd.pipeline import compress
from edgekd.planning import Plan
from edgekd.records import Budget, LedgerRow
from edgekd.result import Result
from edgekd.spaces import Family, Fixed
from edgekd.stages import Listener
from edgekd.target import connect
from edgekd.tasks import Classification, MultiTask, Regression

torch.set_num_threads(1)

KINDS = ("classification", "regression", "multi")
CLASSES = 4
TEACHER_WIDTH = 32
OPTIONS = Options(
    train=TrainOptions(epochs=4, batch_size=32, learning_rate=0.02, threads=1, precision="fp32", teacher_outputs="cached", views=1),
    search=SearchOptions(measurements=4, finalists=2, rung_epochs=1, attempts=2),
    quantize=QuantizeOptions(calibration_size=64, methods=("minmax",)),
    accept_simulated=True,
)
"""Seconds, not minutes; the simulated target may pass."""


class Trunk(nn.Module):
    """Two convolutions over a one-channel 8x8 image, pooled to 2x2 and flattened: `(n, 4 * width)`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.pool = nn.AvgPool2d(4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv2(torch.relu(self.conv1(image))))
        return torch.flatten(self.pool(x), 1)


class Plain(nn.Module):
    """One image in, one unnamed output of `outputs` values."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.trunk = Trunk(width)
        self.head = nn.Linear(4 * width, outputs)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.trunk(image))
        return y


class TwoInTwoOut(nn.Module):
    """An image and a vector of three values in; a dictionary of class logits `kind` and one value `size` out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.trunk = Trunk(width)
        self.kind = nn.Linear(4 * width + 3, CLASSES)
        self.size = nn.Linear(4 * width + 3, 1)

    def forward(self, image: torch.Tensor, extra: torch.Tensor) -> dict[str, torch.Tensor]:
        features = torch.cat([self.trunk(image), extra], 1)
        return {"kind": self.kind(features), "size": self.size(features)}


def classifier(width: int = 16) -> nn.Module:
    """A student of the kind `classification`."""
    return Plain(width, CLASSES)


def regressor(width: int = 16) -> nn.Module:
    """A student of the kind `regression`."""
    return Plain(width, 1)


def two_in_two_out(width: int = 16) -> nn.Module:
    """A student of the kind `multi`."""
    return TwoInTwoOut(width)


FACTORIES = {"classification": classifier, "regression": regressor, "multi": two_in_two_out}


class Splits(NamedTuple):
    """Arrays per split; an `Arrays` holds inputs by name and targets."""

    train: Arrays
    validation: Arrays
    test: Arrays


def make_task(kind: str) -> Task:
    """The task of a kind of problem."""
    if kind == "multi":
        return MultiTask({"kind": Classification(), "size": Regression()})
    return Classification() if kind == "classification" else Regression()


def _part(kind: str, items: int, seed: int) -> tuple[dict[str, np.ndarray], Any]:
    shapes = np.random.default_rng(17).standard_normal((CLASSES, 1, 2, 2)).repeat(4, axis=2).repeat(4, axis=3)
    random = np.random.default_rng(seed)
    label = random.integers(0, CLASSES, items)
    image = (shapes[label] + 0.5 * random.standard_normal((items, 1, 8, 8))).astype(np.float32)
    extra = random.standard_normal((items, 3)).astype(np.float32)
    size = image[:, 0, :4].mean((1, 2)) - 0.5 * image[:, 0, :, 4:].mean((1, 2))
    if kind == "classification":
        return {"image": image}, label.astype(np.int64)
    if kind == "regression":
        return {"image": image}, size[:, None].astype(np.float32)
    return {"image": image, "extra": extra}, {"kind": label.astype(np.int64), "size": (size + 0.5 * extra[:, 0])[:, None].astype(np.float32)}


@functools.cache
def make_data(kind: str, *, train: int = 192, validation: int = 96, test: int = 192) -> Splits:
    """Noisy images of four coarse patterns; the size is a linear function of the image (and, for `multi`, of the vector)."""
    return Splits(*(Arrays(*_part(kind, items, seed)) for items, seed in ((train, 1), (validation, 2), (test, 3))))


def _fit(head: nn.Linear, features: np.ndarray, wanted: np.ndarray) -> None:
    """Set a linear layer to the ridge solution."""
    design = np.concatenate([features, np.ones((len(features), 1))], axis=1).astype(np.float64)
    solution = np.linalg.solve(design.T @ design + 1e-3 * len(design) * np.eye(design.shape[1]), design.T @ wanted)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(solution[:-1].T.astype(np.float32)))
        head.bias.copy_(torch.from_numpy(solution[-1].astype(np.float32)))


@functools.cache
def make_teacher(kind: str, width: int = TEACHER_WIDTH) -> nn.Module:
    """A seeded network with random features and heads solved for on a training split of their own; shared, not to be changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        module = FACTORIES[kind](width).eval()
    solve(module, kind)
    return module


def solve(module: nn.Module, kind: str) -> None:
    """Solve for the heads of a network with a `trunk`, in place."""
    inputs, targets = _part(kind, 512, 4)
    with torch.no_grad():
        features = module.get_submodule("trunk")(torch.from_numpy(inputs["image"])).numpy()
    if kind == "multi":
        features = np.concatenate([features, inputs["extra"]], axis=1)
    heads: Mapping[str, Any] = targets if kind == "multi" else {"head": targets}
    for name, wanted in heads.items():
        head = module.get_submodule(name)
        assert isinstance(head, nn.Linear)
        _fit(head, features, 4.0 * np.eye(CLASSES)[wanted] if wanted.dtype == np.int64 else wanted)


def family(kind: str, *, width: Sequence[int] = (4, 8, 16)) -> Family:
    """Students of a kind by width."""
    return Family(FACTORIES[kind], width=list(width))


def fixed(kind: str) -> Fixed:
    """The one student of a kind, of width 16, by its factory."""
    return Fixed(FACTORIES[kind])


def options(**changes: Any) -> Options:
    """`OPTIONS` with fields of the top level changed."""
    return msgspec.structs.replace(OPTIONS, **changes)


def arguments(
    kind: str,
    run_dir: Path,
    *,
    teacher: Any = None,
    student: StudentSpace | None = None,
    budget: Budget | None = None,
    options: Options = OPTIONS,
    seed: int = 0,
    data: Splits | None = None,
) -> dict[str, Any]:
    """What `compress` and `plan` are called with, the target apart."""
    splits = data or make_data(kind)
    return {
        "teacher": make_teacher(kind) if teacher is None else teacher,
        "task": make_task(kind),
        "train": splits.train,
        "validation": splits.validation,
        "test": splits.test,
        "budget": budget or Budget(latency_share=0.4, max_drop=0.3),
        "student": student or family(kind),
        "run_dir": run_dir,
        "seed": seed,
        "options": options,
    }


def run(
    kind: str,
    run_dir: Path,
    *,
    target: str | Target = "null",
    overrides: Sequence[str] = (),
    listener: Listener | None = None,
    **changes: Any,
) -> Result:
    """`compress` of the kind's teacher; `changes` are those of `arguments`. A live target is used as it is."""
    given = arguments(kind, run_dir, **changes)
    if not isinstance(target, str):
        return compress(**given, target=target, listener=listener, progress=False)
    with connect(target, overrides=tuple(overrides)) as live:
        return compress(**given, target=live, listener=listener, progress=False)


def plan(kind: str, run_dir: Path, **changes: Any) -> Plan:
    """`edgekd.pipeline.plan` of the kind's teacher on the null target."""
    from edgekd import pipeline

    with connect("null") as live:
        return pipeline.plan(**arguments(kind, run_dir, **changes), target=live)


def rows_of(result: Result, stage: str, step: str = "") -> list[LedgerRow]:
    """The ledger rows of a stage whose step holds a text."""
    return [row for row in result.ledger.rows if row.stage == stage and step in row.step]
