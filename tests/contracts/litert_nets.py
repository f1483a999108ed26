"""Tiny nets of the kinds that go to LiteRT, and their way there, for the tests of the TFLite edges."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgekd.artifact import StoredArtifact
from edgekd.contracts import ConvertRequest
from edgekd.records import IOSpec, TensorSpec
from edgekd.registry import load
from edgekd.tree import flatten_outputs
from tests.contracts.tiny_models import noise, spec_of

torch.set_num_threads(1)

IMAGE = (3, 12, 12)


class SqueezeExcite(nn.Module):
    """Depthwise convolution, squeeze-and-excitation, hard-swish."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.expand = nn.Conv2d(3, 8, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, stride=2, groups=8)
        self.act = nn.Hardswish()
        self.squeeze = nn.Conv2d(8, 4, 1)
        self.excite = nn.Conv2d(4, 8, 1)
        self.project = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.act(self.depthwise(self.act(self.norm(self.expand(image)))))
        gate = nn.functional.hardsigmoid(self.excite(torch.relu(self.squeeze(nn.functional.adaptive_avg_pool2d(x, 1)))))
        x = self.act(self.project(x * gate))
        logits: torch.Tensor = self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


class Recurrent(nn.Module):
    """A bidirectional LSTM and a GRU, the last step to three logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.lstm = nn.LSTM(4, 6, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(12, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, sequence: torch.Tensor) -> torch.Tensor:
        x, _ = self.lstm(sequence)
        x, _ = self.gru(x)
        logits: torch.Tensor = self.head(x[:, -1])
        return logits


class Transformer(nn.Module):
    """One pre-norm attention block over a sequence, written out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.inward = nn.Linear(4, 16)
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 3)

    def forward(self, sequence: torch.Tensor) -> torch.Tensor:
        x = self.inward(sequence)
        batch, steps, width = x.shape
        query, key, value = self.qkv(self.norm1(x)).reshape(batch, steps, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(query @ key.transpose(-1, -2) / math.sqrt(width // 2), -1)
        x = x + self.out((weights @ value).transpose(1, 2).reshape(batch, steps, width))
        x = x + self.mlp(self.norm2(x))
        logits: torch.Tensor = self.head(x.mean(1))
        return logits


class Residual(nn.Module):
    """A ResNet in small: a stem, two residual blocks, one with a stride."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.first = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.second = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
        self.skip = nn.Conv2d(8, 16, 1, stride=2)
        self.head = nn.Linear(16, 5)
        for layer in self.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.get_buffer("running_mean").uniform_(-0.2, 0.2)
                layer.get_buffer("running_var").uniform_(0.5, 1.5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image)
        x = torch.relu(self.first(x) + x)
        x = torch.relu(self.second(x) + self.skip(x))
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits


class Borders(nn.Module):
    """Every odd kind of output: nested, absent, a constant, an input, the same tensor twice; and an input that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, image: torch.Tensor, extra: torch.Tensor, idle: torch.Tensor) -> dict[str, object]:
        features = torch.relu(self.conv(image)).mean((2, 3))
        return {
            "cls": {"logits": self.head(features)},
            "dead": None,
            "parts": (features, features.sum(1, keepdim=True)),
            "again": features,
            "constant": torch.full((1, 2), 0.5),
            "passed": extra,
        }


def convert(module: nn.Module, inputs: Mapping[str, np.ndarray], folder: Path, **options: str | bool) -> StoredArtifact:
    """The module as TFLite, through the registry."""
    folder.mkdir(parents=True, exist_ok=True)
    request = ConvertRequest(source=module, folder=folder, iospec=spec_of(inputs), example=inputs, options=options)
    made = load("converters", "tflite-from-torch")().convert(request)
    assert isinstance(made, StoredArtifact)
    return made


def one_by_one(module: nn.Module, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The module's outputs by key path, with a batch of 1 at a time."""
    parts: dict[str, list[np.ndarray]] = {}
    for position in range(len(next(iter(inputs.values())))):
        with torch.no_grad():
            outputs = flatten_outputs(module.eval()(*[torch.from_numpy(array[position : position + 1]) for array in inputs.values()]))
        for name, value in outputs.items():
            parts.setdefault(name, []).append(value.numpy())
    return {name: np.concatenate(pieces) for name, pieces in parts.items()}


def native(module: nn.Module, inputs: Mapping[str, np.ndarray]) -> IOSpec:
    """Inputs and outputs as torch has them: NCHW where the rank is 4."""
    arrays = one_by_one(module, {name: array[:1] for name, array in inputs.items()})

    def spec(name: str, array: np.ndarray) -> TensorSpec:
        return TensorSpec(name=name, dtype=str(array.dtype), shape=(1, *array.shape[1:]), layout="NCHW" if array.ndim == 4 else "")

    return IOSpec(inputs=tuple(spec(*item) for item in inputs.items()), outputs=tuple(spec(*item) for item in arrays.items()))


def images(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Normal images whose contrast differs from one to the next by up to a factor of 20."""
    contrast = np.geomspace(0.2, 4.0, count)[np.random.default_rng(seed + 100).permutation(count)]
    return {"image": (noise(count, *IMAGE, seed=seed) * contrast[:, None, None, None]).astype(np.float32)}


def sequences(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Normal sequences of 5 steps."""
    return {"sequence": noise(count, 5, 4, seed=seed)}


def sqnr_db(reference: np.ndarray, other: np.ndarray) -> float:
    """Signal to error in decibel."""
    error = (reference.astype(np.float64) - other) ** 2
    return float(10 * np.log10((reference.astype(np.float64) ** 2).sum() / error.sum()))
