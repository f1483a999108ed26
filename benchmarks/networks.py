"""Nine seeded networks of the kinds that people deploy, with real inputs from scikit-learn's handwritten digits, for the conversion matrix."""

from __future__ import annotations

import argparse
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

Images = np.ndarray[Any, np.dtype[np.float32]]

SEED = 7
PARTS: Mapping[str, tuple[int, int]] = {"statistics": (0, 800), "calibration": (800, 1200), "held-out": (1200, 1797)}
"""Which of the 1797 digits each part is made of; the parts share none."""

OPEN = 1.0
"""The first bias of norms in front of activations. With 0 half of each normalized signal is cut off at every layer, and a deep net that was never trained
amplifies roundings: MobileNetV2 gave 33 dB in float16 and 5 to 8 dB in int8 by edgekd's four int8 roads. Those of onnx2tf and onnx-tf were not run on it."""

CLASSES = 10
SEQUENCE = (32, 16)
TOKENS = (64, 16)


def _mosaic(part: str, samples: int, tiles: int) -> Images:
    """`(samples, 8 * tiles, 8 * tiles)` in 0 to 1: `tiles` times `tiles` digits of a part side by side, drawn with the part's own seed."""
    first, last = PARTS[part]
    digits = load_digits().images[first:last].astype(np.float32) / 16.0
    drawn = digits[np.random.default_rng([SEED, first, tiles]).integers(0, len(digits), (samples, tiles, tiles))]
    return np.ascontiguousarray(drawn.transpose(0, 1, 3, 2, 4).reshape(samples, 8 * tiles, 8 * tiles))


def images(part: str, samples: int, size: int) -> Images:
    """`(samples, 3, size, size)`: digits of twice their size side by side, with their horizontal and vertical differences as channels."""
    plain = np.kron(_mosaic(part, samples, size // 16), np.ones((1, 2, 2), np.float32))
    across, down = np.diff(plain, axis=2, prepend=0.0), np.diff(plain, axis=1, prepend=0.0)
    return np.stack([2.0 * plain - 1.0, across, down], axis=1).astype(np.float32)


def rows(part: str, samples: int) -> Images:
    """`(samples, 32, 16)`: the 32 rows of four pairs of digits, one pair below the other."""
    return (2.0 * _mosaic(part, samples, 4)[:, :, :16] - 1.0).astype(np.float32)


def patches(part: str, samples: int) -> Images:
    """`(samples, 64, 16)`: 4x4 patches of 16 digits as tokens."""
    cut = _mosaic(part, samples, 4).reshape(samples, 8, 4, 8, 4).transpose(0, 1, 3, 2, 4).reshape(samples, *TOKENS)
    return (2.0 * cut - 1.0).astype(np.float32)


def _conv(fan_in: int, out: int, kernel: int = 3, stride: int = 1, groups: int = 1, activation: nn.Module | None = None) -> nn.Sequential:
    """Convolution and norm; the bias of a norm in front of an activation starts at `OPEN`."""
    norm = nn.BatchNorm2d(out)
    layers: list[nn.Module] = [nn.Conv2d(fan_in, out, kernel, stride, kernel // 2, groups=groups, bias=False), norm]
    if activation is not None:
        nn.init.constant_(norm.bias, OPEN)
        layers.append(activation)
    return nn.Sequential(*layers)


class _Residual(nn.Module):
    """Two 3x3 convolutions and a sum; a 1x1 convolution where the shape changes."""

    def __init__(self, fan_in: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(fan_in, out, 3, stride, activation=nn.ReLU()), _conv(out, out))
        self.short = _conv(fan_in, out, 1, stride) if stride != 1 or fan_in != out else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`relu(body(x) + x)`."""
        return torch.relu(self.body(x) + self.short(x))


class ResNet20(nn.Module):
    """The CIFAR form of ResNet: three stages of three residual blocks, 16, 32 and 64 channels."""

    def __init__(self) -> None:
        super().__init__()
        widths = [16] * 4 + [32] * 3 + [64] * 3
        blocks = [_Residual(before, after, 1 + (after != before)) for before, after in itertools.pairwise(widths)]
        self.features = nn.Sequential(_conv(3, 16, activation=nn.ReLU()), *blocks)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits `(batch, 10)`."""
        logits: torch.Tensor = self.head(self.features(x).mean((2, 3)))
        return logits


class _Inverted(nn.Module):
    """An inverted residual: widen by 1x1, depthwise 3x3, narrow by 1x1, with squeeze-excite where asked."""

    def __init__(self, fan_in: int, out: int, stride: int, widen: int, activation: Callable[[], nn.Module] = nn.ReLU6, squeeze: bool = False) -> None:
        super().__init__()
        inner = fan_in * widen
        self.expand = _conv(fan_in, inner, 1, activation=activation()) if widen != 1 else nn.Identity()
        self.depthwise = _conv(inner, inner, 3, stride, groups=inner, activation=activation())
        self.squeeze = _Squeeze(inner) if squeeze else nn.Identity()
        self.project = _conv(inner, out, 1)
        self.residual = stride == 1 and fan_in == out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The block's output, with `x` added where the shapes allow it."""
        y: torch.Tensor = self.project(self.squeeze(self.depthwise(self.expand(x))))
        return x + y if self.residual else y


class _Squeeze(nn.Module):
    """Channels scaled by a gate that is computed from their means."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, width // 4, 1), nn.ReLU(), nn.Conv2d(width // 4, width, 1), nn.Hardsigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x * gate(x)`."""
        scaled: torch.Tensor = x * self.gate(x)
        return scaled


def _mobile(plan: list[tuple[int, int, int, int]], first: int, last: int, activation: Callable[[], nn.Module], squeeze: bool) -> nn.Sequential:
    """Stem, inverted residuals by (widen, channels, count, stride), a 1x1 convolution, pooling and logits."""
    layers: list[nn.Module] = [_conv(3, first, 3, 2, activation=activation())]
    width = first
    for widen, out, count, stride in plan:
        for position in range(count):
            layers.append(_Inverted(width, out, stride if position == 0 else 1, widen, activation, squeeze))
            width = out
    return nn.Sequential(*layers, _conv(width, last, 1, activation=activation()), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, CLASSES))


def mobilenet_v2() -> nn.Module:
    """The plan of MobileNetV2 at width 1.0 with ten classes."""
    plan = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    return _mobile(plan, 32, 1280, nn.ReLU6, squeeze=False)


def squeeze_excite() -> nn.Module:
    """Inverted residuals with squeeze-excite gates and hard-swish, as in MobileNetV3."""
    return _mobile([(1, 16, 1, 1), (4, 24, 2, 2), (4, 40, 2, 2)], 16, 240, nn.Hardswish, squeeze=True)


class Recurrent(nn.Module):
    """A recurrent layer over rows, and logits from its last step or, of two directions, the mean over steps."""

    def __init__(self, layer: nn.LSTM | nn.GRU) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(layer.hidden_size * (2 if layer.bidirectional else 1), CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits `(batch, 10)`."""
        steps = self.layer(x)[0]
        logits: torch.Tensor = self.head(steps.mean(1) if self.layer.bidirectional else steps[:, -1])
        return logits


class _Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens `(batch, tokens, width)`."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, tokens, width))
        mixed: torch.Tensor = x + self.mlp(self.norm2(x))
        return mixed


class VisionTransformer(nn.Module):
    """8x8 patches of a 32x32 image, a class token, four blocks of width 96 with three heads."""

    def __init__(self, width: int = 96, depth: int = 4) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 8, 8)
        self.token = nn.Parameter(0.5 * torch.randn(1, 1, width))
        self.position = nn.Parameter(0.1 * torch.randn(1, 17, width))
        self.blocks = nn.Sequential(*[_Block(width, 3) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits `(batch, 10)`."""
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(tokens.shape[0], -1, -1), tokens], 1) + self.position
        logits: torch.Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return logits


class TokenEncoder(nn.Module):
    """torch's own `nn.TransformerEncoder`, two layers of width 64, and logits from the mean over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(TOKENS[1], 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits `(batch, 10)`."""
        logits: torch.Tensor = self.head(self.encoder(self.embed(x)).mean(1))
        return logits


class UNet(nn.Module):
    """Two scales down and up again: one by a transposed convolution, one by bilinear resizing."""

    def __init__(self) -> None:
        super().__init__()
        self.top, self.middle, self.bottom = (nn.Sequential(_conv(i, o, activation=nn.ReLU()), _conv(o, o, activation=nn.ReLU())) for i, o in _UNET[:3])
        self.up = nn.ConvTranspose2d(64, 32, 2, 2)
        self.join, self.last = (nn.Sequential(_conv(i, o, activation=nn.ReLU())) for i, o in _UNET[3:])
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Two maps of logits `(batch, 2, height, width)`."""
        top = self.top(x)
        middle = self.middle(nn.functional.max_pool2d(top, 2))
        bottom = self.up(self.bottom(nn.functional.max_pool2d(middle, 2)))
        joined = self.join(torch.cat([bottom, middle], 1))
        wide = nn.functional.interpolate(joined, scale_factor=2.0, mode="bilinear", align_corners=False)
        maps: torch.Tensor = self.head(self.last(torch.cat([wide, top], 1)))
        return maps


_UNET = ((3, 16), (16, 32), (32, 64), (64, 32), (48, 16))


class Detector(nn.Module):
    """A small backbone and heads on two scales, joined: boxes, class scores and objectness of every anchor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(3, 16, 3, 2, activation=nn.ReLU()), _conv(16, 32, 3, 2, activation=nn.ReLU()))
        self.fine, self.coarse = _conv(32, 64, 3, 2, activation=nn.ReLU()), _conv(64, 64, 3, 2, activation=nn.ReLU())
        self.boxes, self.scores, self.objects = (nn.ModuleList([nn.Conv2d(64, n, 1) for _ in range(2)]) for n in (4, CLASSES, 1))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """`boxes (batch, anchors, 4)` and `objectness (batch, anchors, 1)` in 0 to 1, `scores (batch, anchors, 10)` as logits."""
        fine = self.fine(self.stem(x))
        maps = (fine, self.coarse(fine))

        def joined(heads: nn.ModuleList) -> torch.Tensor:
            return torch.cat([head(item).flatten(2).transpose(1, 2) for head, item in zip(heads, maps, strict=True)], 1)

        return {"boxes": torch.sigmoid(joined(self.boxes)), "scores": joined(self.scores), "objectness": torch.sigmoid(joined(self.objects))}


@dataclass(frozen=True)
class Network:
    """One network of the matrix: `title` for people, `make` builds it, `inputs(part, samples)` gives its real inputs."""

    title: str
    make: Callable[[], nn.Module]
    inputs: Callable[[str, int], Images]


def _of_size(size: int) -> Callable[[str, int], Images]:
    return lambda part, samples: images(part, samples, size)


NETWORKS: Mapping[str, Network] = {
    "resnet20": Network("ResNet-20", ResNet20, _of_size(32)),
    "mobilenet_v2": Network("MobileNetV2-like", mobilenet_v2, _of_size(96)),
    "bilstm": Network("BiLSTM", lambda: Recurrent(nn.LSTM(SEQUENCE[1], 64, batch_first=True, bidirectional=True)), rows),
    "vit": Network("ViT", VisionTransformer, _of_size(32)),
    "transformer": Network("Transformer encoder", TokenEncoder, patches),
    "unet": Network("U-Net", UNet, _of_size(64)),
    "gru": Network("GRU", lambda: Recurrent(nn.GRU(SEQUENCE[1], 64, batch_first=True)), rows),
    "squeeze_excite": Network("Squeeze-excite + hard-swish", squeeze_excite, _of_size(32)),
    "detector": Network("Detection head", Detector, _of_size(64)),
}
"""Every network of the matrix by its short name."""


def build(name: str, batches: int = 4) -> nn.Module:
    """The network in evaluation mode: seeded weights, batch-norm statistics averaged over real batches of 32; the caller's random state stays."""
    network = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        module = network.make()
    norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in norms:
        layer.momentum = None
    if norms:
        module.train()
        with torch.no_grad():
            for batch in np.array_split(network.inputs("statistics", 32 * batches), batches):
                module(torch.from_numpy(batch))
    return module.eval()


def fingerprint(name: str, module: nn.Module) -> str:
    """What identifies a built network and its inputs: structure, weights, and what it gives on two held-out samples."""
    seen = hashlib.sha256(repr(module).encode())
    inputs = NETWORKS[name].inputs("held-out", 2)
    with torch.no_grad():
        made = module(torch.from_numpy(inputs))
    arrays = [*module.state_dict().values(), *(made.values() if isinstance(made, dict) else [made])]
    for array in (inputs, NETWORKS[name].inputs("calibration", 2), *(value.numpy() for value in arrays)):
        seen.update(np.ascontiguousarray(array).tobytes())
    return seen.hexdigest()


def main(words: Sequence[str] | None = None) -> int:
    """Print the networks as a table."""
    parser = argparse.ArgumentParser(description="Prints the networks of the conversion matrix with their sizes.")
    parser.parse_args(words)
    print("| network | parameters | input | outputs |\n|---|---|---|---|")
    for name, network in NETWORKS.items():
        module, inputs = build(name), network.inputs("held-out", 1)
        with torch.no_grad():
            made = module(torch.from_numpy(inputs))
        outputs = made if isinstance(made, dict) else {"output": made}
        shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in outputs.items())
        print(f"| {network.title} | {sum(value.numel() for value in module.parameters())} | {inputs.shape} | {shapes} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
