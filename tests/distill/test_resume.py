"""A training that is killed goes on and ends with the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from edgekd.data import Arrays
from edgekd.distill.checkpoint import Checkpoint, load_checkpoint, pack_optimizer, save_checkpoint, unpack_optimizer
from edgekd.distill.optim import make_optimizer
from edgekd.distill.record import TrainRecord, TrainState
from edgekd.errors import ConfigError, InputError
from edgekd.options import FeaturePair, TrainOptions
from edgekd.teachers import as_teacher
from tests.distill.distill_cases import QUICK, Cnn, Marker, Mlp, Stops, blob_splits, blobs, quick, resumable, seeded, split

pytestmark = pytest.mark.torch


@pytest.mark.slow
def test_training_killed_at_random_moments_ends_with_equal_bytes(tmp_path: Path) -> None:
    resumable(tmp_path / "whole", tmp_path / "whole.marker")
    marker = tmp_path / "cut.marker"
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, str(here / "distill_killer.py"), str(tmp_path / "cut"), str(marker), "4", "4"],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(here.parent.parent)},
        capture_output=True,
        text=True,
        timeout=400,
        check=True,
    )
    kills = int(done.stdout)
    resumable(tmp_path / "cut", marker)
    assert kills == 4
    assert (tmp_path / "cut" / "weights.safetensors").read_bytes() == (tmp_path / "whole" / "weights.safetensors").read_bytes()
    whole, cut = (TrainRecord.load(tmp_path / name / "record.json") for name in ("whole", "cut"))
    assert [(row.train_loss, row.parts, row.validation) for row in cut.epochs] == [(row.train_loss, row.parts, row.validation) for row in whole.epochs]
    assert not list((tmp_path / "cut").glob(".checkpoint*"))
    redone = marker.stat().st_size - (tmp_path / "whole.marker").stat().st_size
    assert 0 <= redone <= 3 * kills  # a step whose checkpoint was not whole yet is done again, no more


CASES = {
    "adamw": msgspec.structs.replace(QUICK, optimizer="adamw", learning_rate=0.005, epochs=2, checkpoint_every_s=0.0),
    "plain sgd": msgspec.structs.replace(QUICK, momentum=0.0, epochs=2, checkpoint_every_s=0.0),
    "projectors": msgspec.structs.replace(
        QUICK, epochs=2, checkpoint_every_s=0.0, features=(FeaturePair(student="body", teacher="body", weight=1.0),), teacher_outputs="online"
    ),
    "seldom": msgspec.structs.replace(QUICK, epochs=2, checkpoint_every_s=1000.0),
}


def images(items: int, seed: int) -> Arrays:
    values, labels = blobs(items, seed, inputs=36)
    return Arrays(values.reshape(-1, 1, 6, 6), labels)


@pytest.mark.parametrize("name", sorted(CASES))
def test_interrupted_training_ends_with_equal_bytes(tmp_path: Path, name: str) -> None:
    splits = (split(images(70, 1), "train"), split(images(40, 2), "validation"))

    def run(folder: str, *callbacks: Any) -> Path:
        teacher = as_teacher(seeded(Cnn, 8, seed=3).eval())
        return quick(seeded(Cnn, 4), tmp_path / folder, teacher=teacher, options=CASES[name], splits=splits, callbacks=callbacks).weights

    whole = run("whole").read_bytes()
    for step in (3, 8):
        with pytest.raises(KeyboardInterrupt):
            run("cut", Stops(step))
    marker = Marker(tmp_path / "marker")
    assert run("cut", marker).read_bytes() == whole
    assert marker.path.stat().st_size == (10 if name == "seldom" else 3)  # of 2 epochs of 5 steps


def test_checkpoint_of_other_options_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        quick(seeded(Mlp, 8), tmp_path / "run", teacher=None, callbacks=(Stops(3),), options=msgspec.structs.replace(QUICK, checkpoint_every_s=0.0))
    with pytest.raises(ConfigError, match="another training"):
        quick(seeded(Mlp, 8), tmp_path / "run", teacher=None, options=msgspec.structs.replace(QUICK, learning_rate=0.01))


def test_times_and_threads_may_change_between_a_kill_and_its_resumption(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        quick(seeded(Mlp, 8), tmp_path / "run", teacher=None, callbacks=(Stops(3),), options=msgspec.structs.replace(QUICK, checkpoint_every_s=0.0))
    assert quick(seeded(Mlp, 8), tmp_path / "run", teacher=None, options=msgspec.structs.replace(QUICK, threads=0)).resumed


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_optimizer_state_survives_a_round_trip(tmp_path: Path, optimizer: Any) -> None:
    def trained(steps: int, net: nn.Module, made: torch.optim.Optimizer) -> None:
        for step in range(steps):
            made.zero_grad()
            net(torch.full((4, 8), float(step))).square().sum().backward()
            made.step()

    options = TrainOptions(optimizer=optimizer, learning_rate=0.001)
    first = seeded(Mlp, 4)
    made = make_optimizer((first,), options)
    trained(3, first, made)
    tensors, scalars, groups = pack_optimizer(made)
    save_checkpoint(tmp_path, Checkpoint(TrainState(identity="x", optimizer_groups=groups, optimizer_scalars=scalars), {"optimizer": tensors}))
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    second = seeded(Mlp, 4)
    second.load_state_dict(first.state_dict())
    other = make_optimizer((second,), options)
    unpack_optimizer(other, loaded.tensors["optimizer"], loaded.state.optimizer_scalars, loaded.state.optimizer_groups)
    trained(2, first, made)
    trained(2, second, other)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])


def test_newest_checkpoint_stays_and_leftovers_of_a_killed_writer_go(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, Checkpoint(TrainState(identity="x", step=step), {"model": {"a": torch.full((2,), float(step))}}))
    (tmp_path / ".checkpoint-000000003-000000.abc").mkdir()
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded.state.step == 2
    assert loaded.tensors["model"]["a"].tolist() == [2.0, 2.0]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000000002-000000"]


def test_damaged_checkpoint_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, Checkpoint(TrainState(identity="x"), {"model": {"a": torch.zeros(2)}}))
    path = next(tmp_path.glob("checkpoint-*")) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(InputError, match="remove this folder"):
        load_checkpoint(tmp_path)


def test_tied_weights_are_saved_and_loaded(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8, bias=False)
            self.outer = nn.Linear(8, 8, bias=False)
            self.outer.weight = self.inner.weight
            self.last = nn.Linear(8, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.last(self.outer(torch.relu(self.inner(x))))
            return out

    result = quick(seeded(Tied), tmp_path / "run", teacher=None, splits=blob_splits(32))
    stored = load_file(result.weights)
    assert {"inner.weight", "last.weight", "last.bias"} == set(stored)  # tied weights lie there once
    tied = result.module
    assert isinstance(tied, Tied)
    assert tied.inner.weight is tied.outer.weight
    again = quick(seeded(Tied, seed=4), tmp_path / "run", teacher=None, splits=blob_splits(32)).module
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in tied.state_dict().items())
