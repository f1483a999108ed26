"""For every replacement: a network that is refused today, and one that does what the advice says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import edgekd
from edgekd.operators.replacements import REPLACEMENTS, Replacement
from edgekd.target import LiveTarget

IMAGES = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
STEPS = np.random.default_rng(1).standard_normal((2, 6, 8)).astype(np.float32)
TOKENS = np.random.default_rng(2).integers(0, 10, (2, 5))
LATER = torch.triu(torch.ones(6, 6, dtype=torch.bool), 1)
WAVES = torch.cos(2 * torch.pi * torch.arange(8.0)[:, None] * torch.arange(8.0) / 8)


class Own(nn.Module):
    """A user's module with this forward and at most one layer."""

    def __init__(self, function: Callable[..., torch.Tensor], layer: nn.Module | None = None) -> None:
        super().__init__()
        self.function = function
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x) if self.layer is None else self.function(x, self.layer)


def masked(x: torch.Tensor) -> torch.Tensor:
    scores = x @ x.transpose(1, 2)
    scores[:, LATER] = -1e4
    return torch.softmax(scores, -1) @ x


def filled(x: torch.Tensor) -> torch.Tensor:
    return torch.softmax((x @ x.transpose(1, 2)).masked_fill(LATER, -1e4), -1) @ x


def projected() -> nn.Module:
    return Own(lambda x, lstm: lstm(x)[0], nn.LSTM(8, 6, proj_size=3, batch_first=True))


class Projection(nn.Module):
    """An LSTM and a linear layer on its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 6, batch_first=True)
        self.proj = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.proj(self.lstm(x)[0])
        return y


class Packed(nn.Module):
    """A recurrent layer over steps of which only some count: the outputs of those, the others zero."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = kind(8, 6, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lengths = (x[:, :, 0].abs() > 0).sum(1)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=x.shape[1])
        return y


class Padded(Packed):
    """The same without packing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lengths = (x[:, :, 0].abs() > 0).sum(1)
        y: torch.Tensor = self.rnn(x)[0] * (torch.arange(x.shape[1]) < lengths[:, None]).unsqueeze(-1)
        return y


class PackedState(Packed):
    """The state after the last step that counts."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lengths = (x[:, :, 0].abs() > 0).sum(1)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        state: torch.Tensor = self.rnn(packed)[1][0]
        return state


class PaddedState(Packed):
    """The same without packing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lengths = (x[:, :, 0].abs() > 0).sum(1)
        y: torch.Tensor = (self.rnn(x)[0] * (torch.arange(x.shape[1]) == lengths[:, None] - 1).unsqueeze(-1)).sum(1)
        return y


def linear(type: torch.dtype) -> nn.Module:
    """A linear layer that computes in a type."""
    torch.manual_seed(0)
    return Own(lambda x, layer: layer(x.to(type)).float(), nn.Linear(8, 4).to(type))


def autocast() -> nn.Module:
    """A linear layer that computes in bfloat16 by itself, and something around it."""

    def forward(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y: torch.Tensor = layer(x)
        return y.float()

    torch.manual_seed(0)
    return Own(forward, nn.Linear(8, 4))


PADDED = STEPS.copy()
PADDED[0, 4:] = 0.0

CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], np.ndarray[Any, Any], bool]] = {
    "control flow on values": (
        lambda: Own(lambda x: x * 2 if x.sum() > 0 else x * 3),
        lambda: Own(lambda x: torch.where(x.sum() > 0, x * 2, x * 3)),
        IMAGES,
        True,
    ),
    "mask written in place": (lambda: Own(masked), lambda: Own(filled), STEPS, True),
    "projected LSTM": (projected, Projection, STEPS, False),
    "adaptive max pooling": (
        lambda: Own(lambda x: F.adaptive_max_pool2d(x, 3)),
        lambda: Own(lambda x: torch.cat([F.max_pool2d(x, 2).flatten(1), x.amax((2, 3))], 1)),
        IMAGES,
        False,
    ),
    "median": (lambda: Own(lambda x: x.median(1)[0]), lambda: Own(lambda x: x.sort(1).values[:, 2]), STEPS, True),
    "cumulative product": (lambda: Own(lambda x: x.abs().cumprod(1)), lambda: Own(lambda x: x.abs().log().cumsum(1).exp()), STEPS, True),
    "randomized ReLU": (lambda: nn.Sequential(nn.RReLU(0.1, 0.3)), lambda: nn.Sequential(nn.LeakyReLU(0.2)), IMAGES, True),
    "pairwise distances": (
        lambda: Own(lambda x: torch.cdist(x, x + 1)),
        lambda: Own(lambda x: (x[:, :, None] - (x + 1)[:, None]).square().sum(-1).sqrt()),
        STEPS,
        True,
    ),
    "transposed convolution": (
        lambda: Own(lambda x, up: up(x), nn.ConvTranspose2d(3, 4, 3, 2, 1, output_padding=1)),
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 3, 2, stride=2), Own(lambda x: F.interpolate(x, scale_factor=2)), nn.Conv2d(3, 4, 3)),
        IMAGES,
        False,
    ),
    "Fourier transform": (lambda: Own(lambda x: torch.fft.fft(x).real), lambda: Own(lambda x: x @ WAVES), STEPS, True),
    "as many values as there are": (
        lambda: Own(lambda x: x[x > 0].sum().reshape(1, 1)),
        lambda: Own(lambda x: (x * (x > 0)).sum().reshape(1, 1)),
        IMAGES,
        True,
    ),
    "resize with antialiasing": (
        lambda: Own(lambda x: F.interpolate(x, size=(5, 5), mode="bilinear", antialias=True)),
        lambda: Own(lambda x: F.interpolate(F.avg_pool2d(x, 2), size=(5, 5), mode="bilinear")),
        IMAGES,
        False,
    ),
    "packed sequences": (lambda: Packed(nn.LSTM), lambda: Padded(nn.LSTM), PADDED, True),
    "bfloat16": (lambda: linear(torch.bfloat16), lambda: linear(torch.float32), STEPS, False),
    "sort": (lambda: Own(lambda x: x.sort(1).values), lambda: Own(lambda x: x.gather(1, x.topk(6, 1, largest=False).indices)), STEPS, True),
    "largest values": (lambda: Own(lambda x: x.topk(3, 1).values), lambda: Own(lambda x: x.gather(1, x.topk(3, 1).indices)), STEPS, True),
    "stable sort": (lambda: Own(lambda x: torch.sort(x, dim=1, stable=True).values), lambda: Own(lambda x: x.sort(1).values), STEPS, True),
    "embedding bag": (
        lambda: Own(lambda x, bag: bag(x), nn.EmbeddingBag(10, 4, mode="mean")),
        lambda: Own(lambda x, table: table(x).mean(1), nn.Embedding(10, 4)),
        TOKENS,
        False,
    ),
}
"""Row of the table to (refused, replaced, inputs, whether both compute the same)."""

MORE: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], np.ndarray[Any, Any], str]] = {
    "packed GRU": (lambda: Packed(nn.GRU), lambda: Padded(nn.GRU), PADDED, "packed sequences"),
    "packed RNN": (lambda: PackedState(nn.RNN), lambda: PaddedState(nn.RNN), PADDED, "packed sequences"),
    "autocast": (autocast, lambda: linear(torch.float32), STEPS, "bfloat16"),
}
"""Other networks that a row is for: (refused, replaced, inputs, row)."""


def rows_for(format: str) -> list[Replacement]:
    """The rows that are needed in a format."""
    return [row for row in REPLACEMENTS if format in row.formats]


def local(name: str, folder: Path) -> LiveTarget:
    """A target of this machine with a work folder and a lock of its own."""
    return edgekd.connect(name, overrides=(f"transport.workdir={folder / 'device'}", f"runtime.options.lock={folder / 'lock'}"))


def check(row: Replacement, target: LiveTarget) -> None:
    """The original is refused with this advice, and what the advice says passes."""
    check_case(row, target, *CASES[row.name][:3])


def check_case(row: Replacement, target: LiveTarget, refused: Callable[[], nn.Module], replaced: Callable[[], nn.Module], inputs: np.ndarray[Any, Any]) -> None:
    """The same of one network."""
    torch.manual_seed(0)
    (item,) = edgekd.preflight(refused(), target=target, example=inputs).sets
    assert item.culprit is not None, "it is converted today: the row is not needed any more"
    assert item.culprit.replacement == row.advice, item.culprit
    (item,) = edgekd.preflight(replaced(), target=target, example=inputs).sets
    assert item.passed, item.culprit
