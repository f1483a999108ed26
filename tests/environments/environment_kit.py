"""What the tests of converters with environments of their own share: tiny files, requests, and outputs compared in the file's layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgekd.artifact import StoredArtifact
from edgekd.contracts import ConvertRequest
from edgekd.quantize import make_recipe
from edgekd.quantize.calibrate import calibration_set
from edgekd.registry import load
from tests.contracts.tiny_models import ort_infer, spec_of

Inputs = Mapping[str, np.ndarray]


class Sequence(nn.Module):
    """An LSTM over 7 steps of 6 values, three logits per step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = nn.LSTM(6, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits `(batch, 7, 3)`."""
        logits: torch.Tensor = self.head(self.rnn(x)[0])
        return logits


def legacy_onnx(module: nn.Module, inputs: Inputs, folder: Path, opset: int, name: str = "legacy") -> StoredArtifact:
    """The module by torch's older exporter, batch 1."""
    place = folder / f"{name}-{opset}"
    place.mkdir(parents=True)
    asked = ConvertRequest(source=module, folder=place, iospec=spec_of(inputs), example=inputs, options={"opset": opset})
    return convert("onnx-legacy-from-torch", asked)


def request(source: StoredArtifact, inputs: Inputs, folder: Path, *, scheme: str = "", **options: str | int | float | bool) -> ConvertRequest:
    """A request for float, or for int8 by `scheme` with all inputs as calibration."""
    folder.mkdir(parents=True, exist_ok=True)
    calibration = calibration_set(inputs, split="train") if scheme else None
    recipe = make_recipe(scheme, "minmax", calibration) if calibration else None
    return ConvertRequest(source=source, folder=folder, iospec=source.record.iospec, example=inputs, recipe=recipe, calibration=calibration, options=options)


def convert(converter: str, asked: ConvertRequest) -> StoredArtifact:
    """What the converter makes of the request."""
    made = load("converters", converter)().convert(asked)
    assert isinstance(made, StoredArtifact)
    return made


def signal_to_error_db(source: StoredArtifact, made: StoredArtifact, inputs: Inputs) -> dict[str, float]:
    """Per output: how far the TFLite file, run by LiteRT, is from the ONNX file, run by ONNX Runtime; 200 is equal."""
    from edgekd.converters._litert import host_infer  # type: ignore[import-not-found]

    orders = json.loads(made.record.metadata.get("orders", "{}"))
    turned = {name: np.transpose(array, orders.get(name, range(array.ndim))) for name, array in inputs.items()}
    found = host_infer(made, turned)
    ratios = {}
    for name, array in ort_infer(source, inputs).items():
        expected = np.transpose(array, orders.get(name, range(array.ndim))).astype(np.float64)
        error = float(np.square(expected - found[name]).sum())
        ratios[name] = 200.0 if error == 0 else min(200.0, 10 * float(np.log10(np.square(expected).sum() / error)))
    return ratios
