"""The networks of the example: a teacher that is trained here in seconds, and the factory of the students."""

from __future__ import annotations

import data
import torch
from torch import nn


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.body(x))


class Net(nn.Module):
    """A small residual network for images `(batch, 1, 8, 8)` and ten classes."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))


def make_net(width: int, blocks: int) -> Net:
    """A student; edgekd calls this with every combination of the job's `choices`."""
    return Net(width, blocks)


def teacher() -> Net:
    """The trained teacher. Yours comes from a file: build the network, load its weights with safetensors, return it."""
    torch.manual_seed(0)
    net = Net(width=40, blocks=3)
    images, labels = (torch.from_numpy(part) for part in data.train())
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        for picks in torch.randperm(len(images), generator=generator).split(64):
            loss = nn.functional.cross_entropy(net(images[picks]), labels[picks])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()
