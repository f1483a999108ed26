"""Which arithmetic a training takes, and that it is kept."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from torch import nn

from edgekd.data import Arrays
from edgekd.distill.precision import probe_precision
from edgekd.distill.record import TrainPlan
from tests.distill.distill_cases import Cnn, Mlp, Stops, blobs, quick, seeded, split, trained_teacher, with_options

pytestmark = pytest.mark.torch


def images(items: int) -> Arrays:
    values, labels = blobs(items, items, inputs=36)
    return Arrays(values.reshape(-1, 1, 6, 6), labels)


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
