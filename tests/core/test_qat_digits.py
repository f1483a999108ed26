"""Training in int8 with the teacher's answers gets back what quantizing afterwards loses, on real handwritten digits."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from edgekd.distill.losses import kd_loss
from edgekd.quantize.qat import QatModule, prepare_qat
from tests.contracts.tiny_models import export, ort_infer

pytestmark = pytest.mark.torch

SCHEME = "u8s8_reduced"
"""7-bit weights: every processor that runs these tests computes them without saturation."""


class Digits(nn.Module):
    """Two convolutions over images of 1x8x8, ten classes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.norm, self.two = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 12, 3, padding=1)
        self.pool, self.head = nn.AvgPool2d(4), nn.Linear(48, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.two(torch.relu(self.norm(self.one(image)))))
        logits: torch.Tensor = self.head(self.pool(x).flatten(1))
        return logits


@functools.cache
def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images and labels to train on, and to test with."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = torch.from_numpy((digits.images[order, None] / 16.0).astype(np.float32))
    labels = torch.from_numpy(digits.target[order].astype(np.int64))
    return images[:1200], labels[:1200], images[1200:], labels[1200:]


def epochs(module: nn.Module, count: int, rate: float, teacher: nn.Module | None = None) -> None:
    """Train on the labels, or on a teacher's answers; ranges at ten times the rate, since they have a long way to go."""
    images, labels, _, _ = data()
    ranges = [value for name, value in module.named_parameters() if name.endswith(("log_low", "log_high"))]
    rest = [value for name, value in module.named_parameters() if not name.endswith(("log_low", "log_high"))]
    groups: list[dict[str, Any]] = [{"params": rest}, {"params": ranges, "lr": 10 * rate}]
    optimizer = torch.optim.Adam(groups, rate)
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        order = torch.randperm(len(images), generator=generator)
        for start in range(0, len(images), 60):
            picks = order[start : start + 60]
            optimizer.zero_grad()
            logits = module(images[picks])
            if teacher is None:
                loss = F.cross_entropy(logits, labels[picks])
            else:
                with torch.no_grad():
                    soft = teacher(images[picks])
                loss = kd_loss(logits, soft, temperature=4.0)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()


@functools.cache
def teacher() -> Digits:
    """A trained network with one planted channel: 500 times as large in front of the second convolution, and as much smaller in its weights."""
    module = Digits().train()
    epochs(module, 8, 5e-3)
    module.eval()
    with torch.no_grad():
        planted = int(module.norm.weight.abs().argmin())
        module.norm.weight[planted] *= 500.0
        module.norm.bias[planted] *= 500.0
        module.two.weight[:, planted] /= 500.0
    return module


def accuracy(module: nn.Module) -> float:
    _, _, images, labels = data()
    with torch.no_grad():
        return float((module.eval()(images).argmax(1) == labels).float().mean())


@pytest.mark.slow
def test_a_few_epochs_recover_what_quantizing_afterwards_loses(tmp_path: Path) -> None:
    images, _, held_out, labels = data()
    example = {"image": images[:256].numpy()}
    reference = accuracy(teacher())
    afterwards: QatModule = prepare_qat(teacher(), SCHEME, example)
    lost = accuracy(afterwards)
    assert reference > 0.93
    assert lost < reference - 0.08
    trained = prepare_qat(teacher(), SCHEME, example).train()
    epochs(trained.observe(), 1, 2e-3, teacher())
    epochs(trained.learn(), 5, 2e-3, teacher())
    recovered = accuracy(trained)
    print(f"float {reference:.3f}, quantized afterwards {lost:.3f}, trained in int8 {recovered:.3f}")
    assert recovered > reference - 0.04
    assert recovered > lost + 0.05
    made = export(trained.eval().freeze(), {"image": held_out[:1].numpy()}, tmp_path)
    answers = ort_infer(made, {"image": held_out[:200].numpy()})["output"].argmax(1)
    assert float((answers == labels[:200].numpy()).mean()) == pytest.approx(accuracy(trained), abs=0.05)


def test_training_in_int8_repeats_itself_by_its_seed() -> None:
    example = {"image": data()[0][:64].numpy()}
    states = []
    for _ in range(2):
        trained = prepare_qat(teacher(), SCHEME, example).train().learn()
        epochs(trained, 1, 2e-3, teacher())
        states.append(trained.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
