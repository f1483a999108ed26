"""Training end to end on tiny data: what it learns, how it selects weights, what it leaves as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.data import Arrays
from edgekd.distill.record import TrainRecord
from edgekd.distill.trainer import evaluate
from edgekd.tasks import Classification, MultiTask, Regression
from edgekd.teachers import as_teacher
from tests.distill.distill_cases import Cnn, Mlp, Stops, blob_splits, blobs, quick, seeded, shift, split, trained_teacher, with_options

pytestmark = pytest.mark.torch


def test_distilled_student_reaches_the_bar_that_an_untrained_one_misses(tmp_path: Path) -> None:
    teacher = trained_teacher()
    train, validation = blob_splits()
    student = seeded(Mlp, 8)
    before = evaluate(student, validation, Classification(), torch.device("cpu"), 32)
    result = quick(student, tmp_path / "run", teacher=teacher, options=with_options(epochs=8), splits=(train, validation))
    assert before < 0.6
    assert result.record.validation >= 0.95
    assert result.record.loss == "lskd"
    assert (result.record.weight_task, result.record.weight_soft) == (0.1, 9.0)
    assert not result.module.training
    assert evaluate(result.module, validation, Classification(), torch.device("cpu"), 32) == result.record.validation
    assert result.record.epochs[-1].train_loss < result.record.epochs[0].train_loss


def test_student_learns_from_the_teacher_alone_without_labels(tmp_path: Path) -> None:
    values, _ = blobs(160, 1)
    result = quick(
        seeded(Mlp, 8),
        tmp_path / "run",
        teacher=trained_teacher(),
        options=with_options(epochs=8, weight_task=0.0),
        splits=(split(Arrays(values, np.zeros(160, dtype=np.int64)), "train"), blob_splits()[1]),
    )
    assert result.record.validation >= 0.9


@pytest.mark.parametrize(("optimizer", "rate"), [("sgd", 0.05), ("adamw", 0.01)])
def test_training_without_a_teacher_uses_labels_only(tmp_path: Path, optimizer: str, rate: float) -> None:
    result = quick(seeded(Mlp, 8), tmp_path / "run", teacher=None, options=with_options(epochs=8, optimizer=optimizer, learning_rate=rate))
    assert result.record.validation >= 0.9
    assert (result.record.loss, result.record.weight_task, result.record.teacher_outputs) == ("none", 1.0, "none")


def test_training_again_with_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    teacher = as_teacher(seeded(Mlp, 24, seed=7).eval())
    options = with_options(epochs=2, teacher_outputs="online")
    hashes = [
        quick(seeded(Mlp, 8, dropout=0.2), tmp_path / str(number), teacher=teacher, options=options, seed=seed).record.weights_sha256
        for number, seed in enumerate((5, 5, 6))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_torch_is_left_as_it_was_found(tmp_path: Path) -> None:
    torch.manual_seed(11)
    threads, expected = torch.get_num_threads(), torch.get_rng_state()
    quick(seeded(Mlp, 8), tmp_path / "run", teacher=None, options=with_options(epochs=1))
    assert torch.equal(torch.get_rng_state(), expected)
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()


class TwoInputs(nn.Module):
    """An image and a vector in, a mapping of class logits and a value out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.image = Cnn(width, classes=width)
        self.vector = nn.Linear(3, width)
        self.kind = nn.Linear(width, 5)
        self.size = nn.Linear(width, 1)

    def forward(self, image: torch.Tensor, vector: torch.Tensor) -> dict[str, Any]:
        hidden = torch.relu(self.image(image) + self.vector(vector))
        return {"kind": self.kind(hidden), "size": self.size(hidden)}


def two_inputs(items: int, seed: int) -> Arrays:
    generator = np.random.default_rng(seed)
    kind = generator.integers(0, 5, size=items)
    vector = generator.normal(size=(items, 3)).astype(np.float32)
    image = (
        generator.normal(size=(items, 1, 6, 6)).astype(np.float32) * 0.3 + np.array([-2.0, -1.0, 0.0, 1.0, 2.0], dtype=np.float32)[kind][:, None, None, None]
    )
    return Arrays({"image": image, "vector": vector}, {"kind": kind, "size": vector.sum(axis=1, keepdims=True)})


def test_two_inputs_and_a_mapping_of_outputs_are_trained(tmp_path: Path) -> None:
    task = MultiTask({"kind": Classification(), "size": Regression()})
    names = ("image", "vector")
    splits = (split(two_inputs(160, 1), "train", task, input_names=names), split(two_inputs(80, 2), "validation", task, input_names=names))
    teacher = quick(seeded(TwoInputs, 16, seed=3), tmp_path / "teacher", teacher=None, task=task, splits=splits, options=with_options(epochs=20))
    student = quick(seeded(TwoInputs, 8), tmp_path / "student", teacher=as_teacher(teacher.module), task=task, splits=splits, options=with_options(epochs=20))
    untrained = evaluate(seeded(TwoInputs, 8), splits[1], task, torch.device("cpu"), 32)
    assert untrained < 0.4
    assert student.record.validation > 0.7
    assert student.record.loss == "auto"
    assert set(student.record.epochs[0].parts) == {"task", "soft"}


def test_regression_takes_mse_and_is_learnt(tmp_path: Path) -> None:
    def lines(items: int, seed: int) -> Arrays:
        values = np.random.default_rng(seed).normal(size=(items, 4)).astype(np.float32)
        return Arrays(values, values @ np.array([[1.0], [-2.0], [0.5], [0.0]], dtype=np.float32))

    task = Regression()
    splits = (split(lines(128, 1), "train", task), split(lines(64, 2), "validation", task))

    class Exact(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ torch.tensor([[1.0], [-2.0], [0.5], [0.0]])

    result = quick(seeded(nn.Linear, 4, 1), tmp_path / "run", teacher=as_teacher(Exact()), task=task, splits=splits, options=with_options(epochs=6))
    assert result.record.loss == "mse"
    assert result.record.metric == "r2"
    assert result.record.validation > 0.98


def test_finished_training_is_not_repeated(tmp_path: Path) -> None:
    first = quick(seeded(Mlp, 8), tmp_path / "run", teacher=None)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    again = quick(seeded(Mlp, 8, seed=4), tmp_path / "run", teacher=None)
    assert again.resumed
    assert not first.resumed
    assert again.record == first.record == TrainRecord.load(tmp_path / "run" / "record.json")
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for name, value in first.module.state_dict().items():
        assert torch.equal(value, again.module.state_dict()[name])
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_patience_stops_early_and_keeps_the_best_weights(tmp_path: Path) -> None:
    result = quick(seeded(Mlp, 8), tmp_path / "run", teacher=None, options=with_options(epochs=40, patience=2))
    record = result.record
    metrics = [row.validation for row in record.epochs]
    assert record.stopped_early
    assert len(metrics) == record.best_epoch + 2 < 40
    assert record.selected == "best"
    assert record.validation == max(metrics) == metrics[record.best_epoch - 1]
    assert evaluate(result.module, blob_splits()[1], Classification(), torch.device("cpu"), 32) == record.validation


def test_ema_weights_are_kept_and_judged(tmp_path: Path) -> None:
    result = quick(seeded(Mlp, 8), tmp_path / "run", teacher=None, options=with_options(epochs=6, ema=0.95))
    assert result.record.selected == "last (ema)"
    assert evaluate(result.module, blob_splits()[1], Classification(), torch.device("cpu"), 32) == result.record.validation
    plain = quick(seeded(Mlp, 8), tmp_path / "plain", teacher=None, options=with_options(epochs=6))
    assert not torch.equal(plain.module.state_dict()["last.weight"], result.module.state_dict()["last.weight"])


def test_callbacks_end_even_when_the_training_is_interrupted(tmp_path: Path) -> None:
    stopped = Stops(after=2)
    with pytest.raises(KeyboardInterrupt):
        quick(seeded(Mlp, 8), tmp_path / "run", teacher=None, callbacks=(stopped,))
    assert stopped.ended


def test_augmented_training_without_a_teacher_walks_through_the_views(tmp_path: Path) -> None:
    seen: list[tuple[float, ...]] = []

    def recording(item: Any, generator: np.random.Generator) -> Any:
        changed = shift(item, generator)
        seen.append(tuple(changed.tolist()))
        return changed

    quick(seeded(Mlp, 8), tmp_path / "run", teacher=None, options=with_options(epochs=4, views=2), splits=blob_splits(32, augment=recording))
    assert len(set(seen)) == 2 * 32
