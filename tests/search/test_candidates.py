"""Members of a space become candidates: counted by hand-checked sizes, refused ones with their reason."""

from __future__ import annotations

import numpy as np
import pytest

from edgekd.errors import Rejected
from edgekd.search import count_size, describe_candidates
from edgekd.spaces import Family

pytest.importorskip("torch")
import torch

pytestmark = pytest.mark.torch
EXAMPLE = {"image": np.zeros((4, 1, 8, 8), dtype=np.float32)}


def make_net(width: int, stride: int = 1) -> torch.nn.Module:
    if width == 13:
        raise ValueError("unlucky")
    side = 8 // stride
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, width, 3, stride=stride, padding=1), torch.nn.BatchNorm2d(width), torch.nn.Flatten(), torch.nn.Linear(width * side * side, 10)
    )


def test_count_size_equals_the_count_by_hand() -> None:
    module = make_net(8).train()
    size = count_size(module, EXAMPLE)
    assert size.macs == 64 * 9 * 8 + 512 * 10
    assert size.parameters == 8 * 9 + 8 + 16 + 5120 + 10
    assert module.training


def test_count_size_counts_attention_and_several_inputs() -> None:
    class Two(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a @ b.transpose(1, 2)

    example = {"a": np.zeros((2, 5, 7), dtype=np.float32), "b": np.zeros((2, 3, 7), dtype=np.float32)}
    assert count_size(Two(), example) == (0, 5 * 7 * 3)


def test_members_are_described_and_those_that_cannot_be_built_are_rejected() -> None:
    space = Family(make_net, width=[4, 8, 13], stride=[1, 2])
    candidates, rejected = describe_candidates(space, EXAMPLE, seed=0)
    assert [candidate.label for candidate in candidates] == ["stride=1 width=4", "stride=2 width=4", "stride=1 width=8", "stride=2 width=8"]
    assert set(rejected) == {"stride=1 width=13", "stride=2 width=13"}
    assert "unlucky" in rejected["stride=1 width=13"]
    assert {"log macs", "log params", "width", "width%8", "stride"} <= set(candidates[0].features)
    assert candidates[2].capacity > candidates[0].capacity > candidates[1].capacity


def test_network_that_does_not_accept_the_inputs_is_rejected_with_their_shape() -> None:
    with pytest.raises(Rejected, match=r"\(4, 3, 8, 8\)"):
        count_size(make_net(4), {"image": np.zeros((4, 3, 8, 8), dtype=np.float32)})
