"""Training end to end on tiny data: what it learns, how it selects weights, what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from edgekd.data import Arrays
from edgekd.distill.optim import Ema, learning_rate, parameter_groups
from edgekd.distill.precision import probe_precision
from edgekd.distill.record import TrainPlan, TrainRecord
from edgekd.distill.trainer import epoch_batches, evaluate
from edgekd.errors import ConfigError, DataError, MissingDependency, ModelError, TrainingDiverged
from edgekd.options import TrainOptions
from edgekd.tasks import Classification, MultiTask, Regression
from edgekd.teachers import as_teacher
from edgekd.tree import to_numpy
from tests.distill.distill_cases import QUICK, Cnn, Mlp, blob_splits, blobs, quick, seeded, shift, split, trained_teacher

pytestmark = pytest.mark.torch


def with_options(**changes: Any) -> TrainOptions:
    return msgspec.structs.replace(QUICK, **changes)


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


def test_folder_of_another_training_is_refused(tmp_path: Path) -> None:
    quick(seeded(Mlp, 8), tmp_path / "run", teacher=None)
    with pytest.raises(ConfigError, match="another folder"):
        quick(seeded(Mlp, 8), tmp_path / "run", teacher=None, seed=6)


def test_changed_weights_of_a_finished_training_are_refused(tmp_path: Path) -> None:
    result = quick(seeded(Mlp, 8), tmp_path / "run", teacher=None)
    data = bytearray(result.weights.read_bytes())
    data[-1] ^= 1
    result.weights.write_bytes(bytes(data))
    with pytest.raises(ModelError, match="changed"):
        quick(seeded(Mlp, 8), tmp_path / "run", teacher=None)


class Poisoned(nn.Module):
    """Gives infinity for the one item whose first value is 77."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Mlp(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(x) + torch.where(x[:, :1] == 77.0, torch.inf, 0.0)
        return out


def test_loss_that_is_not_finite_stops_and_saves_the_batch(tmp_path: Path) -> None:
    values, labels = blobs(64, 1)
    values[40, 0] = 77.0
    splits = (split(Arrays(values, labels), "train"), blob_splits()[1])
    with pytest.raises(TrainingDiverged, match=r"diverged-step-\d+\.npz") as caught:
        quick(seeded(Poisoned), tmp_path / "run", teacher=None, splits=splits)
    path = caught.value.subject
    assert isinstance(path, Path)
    with np.load(path, allow_pickle=False) as saved:
        assert 40 in saved["indices"]
        assert saved["input.input"].shape[1:] == (8,)
        assert len(saved["target"]) == len(saved["indices"])


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


def test_ema_equals_the_recursion_computed_by_hand() -> None:
    net = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        net.weight.fill_(1.0)
    average = Ema(net, 0.5)
    expected = 1.0
    for number, value in enumerate((2.0, 4.0, -1.0)):
        with torch.no_grad():
            net.weight.fill_(value)
        average.update(net, number)
        decay = min(0.5, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * value
    assert float(average.values["weight"]) == pytest.approx(expected, rel=1e-6)


def test_learning_rate_rises_linearly_and_falls_as_a_cosine() -> None:
    rates = [learning_rate(step, 100, 0.4, 0.1) for step in range(100)]
    np.testing.assert_allclose(rates[:10], 0.4 * np.arange(1, 11) / 10)
    np.testing.assert_allclose(rates[10:], 0.2 * (1 + np.cos(np.pi * np.arange(90) / 90)), rtol=1e-9)
    assert learning_rate(0, 1, 0.4, 0.0) == 0.4
    assert all(rate > 0 for rate in rates)


def test_norms_and_biases_do_not_decay_and_frozen_parameters_are_left_out() -> None:
    net = Mlp(8)
    net.last.weight.requires_grad_(False)
    groups = parameter_groups((net,), 0.1)
    assert [[tuple(value.shape) for value in group["params"]] for group in groups] == [[(8, 8)], [(8,), (8,), (8,), (6,)]]  # type: ignore[attr-defined]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    for value in net.parameters():
        value.requires_grad_(False)
    with pytest.raises(ModelError, match="requires_grad"):
        parameter_groups((net,), 0.1)


@pytest.mark.parametrize(("items", "size", "sizes"), [(33, 16, [16, 17]), (32, 16, [16, 16]), (1, 16, [1]), (5, 8, [5]), (34, 16, [16, 16, 2])])
def test_every_item_comes_once_an_epoch_and_no_batch_of_one_is_left(items: int, size: int, sizes: list[int]) -> None:
    parts = epoch_batches(items, size, 3, 0)
    assert [len(part) for part in parts] == sizes
    assert sorted(np.concatenate(parts).tolist()) == list(range(items))


def test_order_depends_on_seed_and_epoch_only() -> None:
    def orders(seed: int, epoch: int) -> list[int]:
        order: list[int] = np.concatenate(epoch_batches(50, 8, seed, epoch)).tolist()
        return order

    assert orders(1, 2) == orders(1, 2)
    assert orders(1, 2) != orders(1, 3)
    assert orders(1, 2) != orders(2, 2)


def test_one_item_cannot_train_batch_norm(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="batch norm"):
        quick(seeded(Mlp, 8), tmp_path / "a", teacher=None, splits=(blob_splits(1)[0], blob_splits()[1]))
    with pytest.raises(DataError, match="batch_size"):
        quick(seeded(Mlp, 8), tmp_path / "b", teacher=None, options=with_options(batch_size=1))


def test_data_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not accept"):
        quick(seeded(Mlp, 8, inputs=9), tmp_path / "a", teacher=None)
    with pytest.raises(DataError, match="out of range"):
        quick(seeded(Mlp, 8, classes=3), tmp_path / "b", teacher=None)
    with pytest.raises(ModelError, match="different shapes"):
        quick(seeded(Mlp, 8), tmp_path / "c", teacher=as_teacher(seeded(Mlp, 8, classes=7).eval()))
    with pytest.raises(ConfigError, match="nothing is left"):
        quick(seeded(Mlp, 8), tmp_path / "d", teacher=None, options=with_options(weight_task=0.0))


def test_operation_without_a_deterministic_form_is_named(tmp_path: Path) -> None:
    class Puts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.layer(x)
            return out + torch.zeros(6).put_(torch.tensor([0]), torch.tensor([1.0]))

    with pytest.raises(ModelError, match="cannot run deterministically"):
        quick(seeded(Puts), tmp_path / "run", teacher=None)
    assert not torch.are_deterministic_algorithms_enabled()


def test_modules_that_others_import_early_do_not_load_torch() -> None:
    code = "import sys, edgekd.distill.run, edgekd.distill.record, edgekd.distill.progress; sys.exit('torch' in sys.modules or 'rich' in sys.modules)"
    root = str(Path(__file__).parents[2])
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60, check=False).returncode == 0


@pytest.mark.parametrize("package", ["torch", "lightning_fabric", "safetensors"])
def test_missing_package_is_named_with_the_line_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    net, splits = seeded(Mlp, 8), blob_splits()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependency, match=r"edgekd\[distill\]"):
        quick(net, tmp_path / "run", teacher=None, splits=splits)


def test_unlabelled_items_need_a_task_weight_of_zero(tmp_path: Path) -> None:
    class Unlabelled:
        def __len__(self) -> int:
            return 32

        def __getitem__(self, index: int) -> Any:
            return blobs(32, 1)[0][index]

    class FromTeacher(Classification):
        def unpack(self, batch: Any, input_names: Any) -> tuple[dict[str, Any], Any]:
            return {"input": to_numpy(batch)}, None

    train = split(Unlabelled(), "train", FromTeacher())
    teacher = as_teacher(seeded(Mlp, 24, seed=7).eval())
    with pytest.raises(DataError, match="weight_task=0"):
        quick(seeded(Mlp, 8), tmp_path / "a", teacher=teacher, splits=(train, blob_splits()[1]))
    result = quick(seeded(Mlp, 8), tmp_path / "b", teacher=teacher, splits=(train, blob_splits()[1]), options=with_options(weight_task=0.0, epochs=1))
    assert set(result.record.epochs[0].parts) == {"soft"}


def test_probe_decision_is_stored_and_kept_on_resumption(tmp_path: Path) -> None:
    options = with_options(precision="auto", epochs=3, checkpoint_every_s=0.0)
    splits = (split(images(40), "train"), split(images(30), "validation"))
    with pytest.raises(KeyboardInterrupt):
        quick(seeded(Cnn, 4), tmp_path / "run", teacher=None, options=options, splits=splits, callbacks=(Stops(after=4),))
    plan = TrainPlan.load(tmp_path / "run" / "plan.json")
    assert {"fp32", "bf16", "fp32 channels_last", "bf16 channels_last"} >= set(plan.probe_ms) >= {"fp32"}
    forced = msgspec.structs.replace(plan, precision="bf16", channels_last=True, precision_reason="stored")
    forced.save(tmp_path / "run" / "plan.json")
    record = quick(seeded(Cnn, 4), tmp_path / "run", teacher=None, options=options, splits=splits).record
    assert (record.precision, record.channels_last, record.precision_reason) == ("bf16", True, "stored")


def images(items: int) -> Arrays:
    values, labels = blobs(items, items, inputs=36)
    return Arrays(values.reshape(-1, 1, 6, 6), labels)


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


def test_callbacks_end_even_when_the_training_is_interrupted(tmp_path: Path) -> None:
    stopped = Stops(after=2)
    with pytest.raises(KeyboardInterrupt):
        quick(seeded(Mlp, 8), tmp_path / "run", teacher=None, callbacks=(stopped,))
    assert stopped.ended


def test_probe_leaves_the_module_and_the_random_state_as_they_were() -> None:
    net = seeded(Mlp, 8, dropout=0.3).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    choice = probe_precision(net, [torch.randn(16, 8, generator=torch.Generator().manual_seed(0))])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(value.grad is None for value in net.parameters())
    assert choice.precision in {"fp32", "bf16"}
    assert "ms" in choice.reason


def test_variant_that_does_not_run_is_left_out_with_the_reason() -> None:
    class NeedsFloat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = self.layer(x)
            if hidden.dtype is not torch.float32:
                raise RuntimeError("not implemented for 'BFloat16'")
            return hidden

    choice = probe_precision(NeedsFloat(), [torch.zeros(4, 8)])
    assert choice.precision == "fp32"
    assert "BFloat16" in choice.reason


def test_bf16_trains_and_is_judged_in_float32(tmp_path: Path) -> None:
    result = quick(seeded(Mlp, 8), tmp_path / "run", teacher=trained_teacher(), options=with_options(precision="bf16", epochs=8))
    assert result.record.precision == "bf16"
    assert all(value.dtype in (torch.float32, torch.int64) for value in result.module.state_dict().values())
    assert result.record.validation >= 0.9


def test_augmented_training_without_a_teacher_walks_through_the_views(tmp_path: Path) -> None:
    seen: list[tuple[float, ...]] = []

    def recording(item: Any, generator: np.random.Generator) -> Any:
        changed = shift(item, generator)
        seen.append(tuple(changed.tolist()))
        return changed

    quick(seeded(Mlp, 8), tmp_path / "run", teacher=None, options=with_options(epochs=4, views=2), splits=blob_splits(32, augment=recording))
    assert len(set(seen)) == 2 * 32
