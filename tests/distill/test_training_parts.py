"""The parts of a training by themselves: averages, learning rates, parameter groups, the order of items."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.distill.optim import Ema, learning_rate, parameter_groups
from edgekd.distill.trainer import epoch_batches
from edgekd.errors import ModelError
from tests.distill.distill_cases import Mlp

pytestmark = pytest.mark.torch


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
