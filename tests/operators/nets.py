"""Networks with one part that cannot be brought to a target, some levels down; students of families."""

from __future__ import annotations

import torch
from torch import nn

from tests.pipeline.pipeline_kit import CLASSES, Trunk


class InPlaceMask(nn.Module):
    """Attention over the two halves of the channels that writes its mask in place, which the exporter to ONNX refuses."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(x.shape[0], 4, -1)
        scores = tokens @ tokens.transpose(1, 2)
        scores[:, torch.triu(torch.ones(4, 4, dtype=torch.bool), 1)] = -1e4
        mixed: torch.Tensor = self.mix((torch.softmax(scores, -1) @ tokens).flatten(1))
        return mixed


class Branch(nn.Module):
    """Control flow that depends on values."""

    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2.0 if x.sum() > 0 else x * 3.0


class Fine(nn.Module):
    """Something that every target runs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.mix(x))


ACTS = {"good": Fine, "masked": InPlaceMask, "branch": Branch}


class Stage(nn.Module):
    """A layer and what is under test, added to the input."""

    def __init__(self, width: int, act: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.act = ACTS[act](width)

    def forward(self, x: torch.Tensor, *, scale: float) -> torch.Tensor:
        y: torch.Tensor = x + scale * self.act(self.norm(x))
        return y


class Net(nn.Module):
    """A classifier of the tests' images with two stages behind its trunk; `act` says what they hold."""

    def __init__(self, width: int, act: str) -> None:
        super().__init__()
        self.trunk = Trunk(width)
        self.stages = nn.ModuleList(Stage(4 * width, act) for _ in range(2))
        self.head = nn.Linear(4 * width, CLASSES)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.trunk(image)
        for stage in self.stages:
            x = stage(x, scale=0.5)
        y: torch.Tensor = self.head(x)
        return y


def net(width: int = 4, act: str = "good") -> nn.Module:
    """A student."""
    return Net(width, act)


class Inside(nn.Module):
    """A network whose own forward holds the operator that is refused; its only layer is fine."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x)
        y[:, y[0] > 0, None] = 0.0
        return y
