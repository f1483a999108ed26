"""What a training refuses, and how it says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.data import Arrays
from edgekd.errors import ConfigError, DataError, MissingDependency, ModelError, TrainingDiverged
from edgekd.tasks import Classification
from edgekd.teachers import as_teacher
from edgekd.tree import to_numpy
from tests.distill.distill_cases import Mlp, blob_splits, blobs, quick, seeded, split, with_options

pytestmark = pytest.mark.torch


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


def test_one_item_cannot_train_batch_norm(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="batch norm"):
        quick(seeded(Mlp, 8), tmp_path / "a", teacher=None, splits=(blob_splits(1)[0], blob_splits()[1]))
    with pytest.raises(DataError, match="batch_size"):
        quick(seeded(Mlp, 8), tmp_path / "b", teacher=None, options=with_options(batch_size=1))


def test_data_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not accept"):
        quick(seeded(Mlp, 8, inputs=9), tmp_path / "a", teacher=None)
    with pytest.raises(DataError, match="the labels of the train split are outside the classes"):
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
