"""Golden networks: small, trained, stored; what each road made of them once, and whether it still does."""

from __future__ import annotations

import importlib.metadata
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

import edgekd
from edgekd.conversion.convert import Conversion
from edgekd.models.layout import MOVING, RENAMING
from edgekd.models.onnx_file import load_model as load_onnx
from edgekd.models.onnx_file import named_ops as onnx_ops
from edgekd.models.tflite_file import load_model as load_tflite
from edgekd.models.tflite_file import named_ops as tflite_ops
from edgekd.parity.measures import distance_of
from edgekd.records import Format
from edgekd.target import connect

HERE = Path(__file__).parent
RECORD = HERE / "golden.json"
SEED = 11
STORED = 64
"""How many test items' outputs lie in the record's arrays, and are compared."""

LIBRARIES = ("torch", "onnx", "onnxscript", "onnxruntime", "numpy")
ANDROID = ("ai-edge-litert", "litert-torch", "ai-edge-quantizer")
"""Libraries whose versions decide what a road makes: of every road, and of those to TFLite besides."""

ACCURACY_LOSS = 0.006
"""Accuracy that may be lost before it counts: four of the 719 test items, since instruction sets round differently."""
SIGNAL_LOSS_DB = 2.0
"""Signal to error that may be lost in int8."""
FLOAT_ERROR = 1e-4
"""The largest error of a float file, of the largest stored output."""


class Road(NamedTuple):
    """A road to a file: what `edgekd.convert` is asked for."""

    to: str
    precision: str
    scheme: str = ""


ROADS: Mapping[str, Road] = {
    "onnx fp32": Road("onnx", "fp32"),
    "onnx u8s8": Road("onnx", "int8", "u8s8"),
    "onnx u8s8_reduced": Road("onnx", "int8", "u8s8_reduced"),
    "tflite fp32": Road("tflite", "fp32"),
    "tflite static_int8": Road("tflite", "int8", "static_int8"),
    "tflite dynamic_int8": Road("tflite", "int8", "dynamic_int8"),
}


class Residual(nn.Module):
    """Two residual blocks with batch norm on 8x8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12))
            for _ in range(2)
        )
        self.head = nn.Linear(12 * 4, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits `(n, 10)`."""
        x = self.stem(image)
        for block in self.blocks:
            x = torch.relu(x + block(x))
        y: torch.Tensor = self.head(nn.functional.avg_pool2d(x, 4).flatten(1))
        return y


class Depthwise(nn.Module):
    """Inverted residuals with depthwise convolutions and ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.blocks = nn.ModuleList(self._block(8, 24) for _ in range(2))
        self.head = nn.Linear(8 * 4, 10)

    @staticmethod
    def _block(width: int, inner: int) -> nn.Sequential:
        wide = [nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6()]
        deep = [nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False), nn.BatchNorm2d(inner), nn.ReLU6()]
        return nn.Sequential(*wide, *deep, nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits `(n, 10)`."""
        x = torch.relu(self.stem(image))
        for block in self.blocks:
            x = x + block(x)
        y: torch.Tensor = self.head(nn.functional.avg_pool2d(x, 4).flatten(1))
        return y


class Attention(nn.Module):
    """One transformer layer over the image's eight rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 24)
        self.place = nn.Parameter(torch.randn(8, 24) * 0.1)
        self.layer = nn.TransformerEncoderLayer(24, 2, 48, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(24, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits `(n, 10)`."""
        x = self.layer(self.embed(image.flatten(1, 2)) + self.place)
        y: torch.Tensor = self.head(x.mean(1))
        return y


class Gated(nn.Module):
    """A GRU that reads the image row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(8, 24, batch_first=True)
        self.head = nn.Linear(24, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits `(n, 10)`."""
        y: torch.Tensor = self.head(self.rnn(image.flatten(1, 2))[0][:, -1])
        return y


class Mirror(nn.Module):
    """Down, up and across: a U-Net's parts with a head for classes."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.right = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8 * 4, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits `(n, 10)`."""
        left = self.left(image)
        x = self.right(torch.cat([self.up(self.deep(nn.functional.max_pool2d(left, 2))), left], 1))
        y: torch.Tensor = self.head(nn.functional.avg_pool2d(x, 4).flatten(1))
        return y


NETWORKS: Mapping[str, Callable[[], nn.Module]] = {"residual": Residual, "depthwise": Depthwise, "attention": Attention, "gated": Gated, "mirror": Mirror}


class Digits(NamedTuple):
    """Images `(n, 1, 8, 8)` in 0 to 1, and classes."""

    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray


def digits() -> Digits:
    """scikit-learn's handwritten digits, split 60 to 40 by a seed."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    images, labels = (bunch.images[:, None] / 16).astype(np.float32), bunch.target.astype(np.int64)
    order = np.random.default_rng(SEED).permutation(len(images))
    cut = int(0.6 * len(images))
    return Digits(images[order[:cut]], labels[order[:cut]], images[order[cut:]], labels[order[cut:]])


def weights_of(name: str) -> Path:
    """Where a network's weights lie."""
    return HERE / f"{name}.safetensors"


def build(name: str) -> nn.Module:
    """The trained network."""
    torch.manual_seed(SEED)
    module = NETWORKS[name]()
    module.load_state_dict(load_file(weights_of(name)))
    return module.eval()


def convert(name: str, road: str, folder: Path) -> Conversion:
    """The golden network by a road; its own parity check is off, since the record is what counts here."""
    asked, data = ROADS[road], digits()
    return edgekd.convert(
        build(name),
        asked.to,
        precision=asked.precision,
        scheme=asked.scheme or None,
        calibration={"image": data.train[:128]} if asked.precision == "int8" else None,
        example={"image": data.test[:8]},
        out=folder / f"{name}-{asked.to}",
        allow_divergence=True,
        progress=False,
    )


def is_exact(road: str) -> bool:
    """Whether this processor computes a road's numbers: those of u8s8 saturate on an x86 without VNNI, and tell nothing there."""
    with connect("local") as live:
        fields = live.fingerprint.fields
    return ROADS[road].scheme != "u8s8" or fields["machine"] != "x86_64" or "vnni" in fields["isa"].split()


def measure(name: str, road: str, folder: Path) -> dict[str, Any]:
    """What a road makes of a network now: accuracy on the test split, outputs of the first items, operators by type."""
    made, data = convert(name, road, folder), digits()
    stored = made.stored
    with connect("local" if stored.record.format is Format.ONNX else "litert-local") as live:
        (outputs,) = live.runtime.infer(stored, {"image": data.test}).values()
    accuracy = float((outputs.argmax(1) == data.test_labels).mean())
    return {"accuracy": round(accuracy, 6), "outputs": outputs[:STORED], "ops": operators(stored.entry)}


def operators(path: Path) -> dict[str, int]:
    """How many operators of each type a file has."""
    ops = onnx_ops(load_onnx(path)) if path.suffix == ".onnx" else tflite_ops(load_tflite(path))
    return dict(sorted(Counter(kind for _, kind in ops).items()))


def layout_count(ops: Mapping[str, int]) -> int:
    """Operators that move values without computing any."""
    return sum(count for name, count in ops.items() if name in MOVING | RENAMING)


def signal_db(reference: np.ndarray, found: np.ndarray) -> float:
    """Signal to error in decibel."""
    return distance_of(reference.astype(np.float64).ravel(), found.astype(np.float64).ravel()).sqnr_db


def complaints(road: str, recorded: Mapping[str, Any], reference: np.ndarray, found: Mapping[str, Any], *, exact: bool = True) -> list[str]:
    """What a road has lost since it was recorded; `reference` are the stored outputs of torch. Without `exact` only operators are compared."""
    said = _lost_numbers(road, recorded, reference, found) if exact else []
    before, now = layout_count(recorded["ops"]), layout_count(found["ops"])
    if now > before:
        said.append(f"{now} layout operators, recorded {before}")
    before, now = sum(recorded["ops"].values()), sum(found["ops"].values())
    if now > before:
        more = {name: count - recorded["ops"].get(name, 0) for name, count in found["ops"].items() if count > recorded["ops"].get(name, 0)}
        said.append(f"{now} operators, recorded {before}; more of: {more}")
    return said


def _lost_numbers(road: str, recorded: Mapping[str, Any], reference: np.ndarray, found: Mapping[str, Any]) -> list[str]:
    said = []
    if found["accuracy"] < recorded["accuracy"] - ACCURACY_LOSS:
        said.append(f"accuracy {found['accuracy']:.4f}, recorded {recorded['accuracy']:.4f}")
    signal = signal_db(reference, found["outputs"])
    if ROADS[road].precision == "fp32":
        error = float(np.abs(reference - found["outputs"]).max() / np.abs(reference).max())
        if error > FLOAT_ERROR:
            said.append(f"the largest error is {error:.1e} of the largest output, {FLOAT_ERROR:.0e} is allowed")
    elif signal < recorded["sqnr_db"] - SIGNAL_LOSS_DB:
        said.append(f"signal to error {signal:.1f} dB, recorded {recorded['sqnr_db']:.1f} dB")
    return said


def load_record() -> dict[str, Any]:
    """The record."""
    found: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return found


def versions(names: tuple[str, ...]) -> dict[str, str]:
    """The installed versions, without the local part (`+cpu`)."""
    return {name: importlib.metadata.version(name).partition("+")[0] for name in names}


def check(name: str, road: str, folder: Path) -> list[str]:
    """What a road has lost on a network, each with the versions then and now."""
    record = load_record()
    reference = load_file(HERE / "outputs.safetensors")[name].numpy()
    said = complaints(road, record["networks"][name][road], reference, measure(name, road, folder), exact=is_exact(road))
    names = LIBRARIES if ROADS[road].to == "onnx" else LIBRARIES + ANDROID
    now = {library: f"{record['versions'][library]} -> {version}" for library, version in versions(names).items() if version != record["versions"][library]}
    return [f"{name} by {road}: {line}; versions recorded -> here: {now or 'the same'}" for line in said]
