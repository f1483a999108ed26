"""Recurrent nets to TFLite: cells of one step in float and int8 over whole sequences, and the faster of unrolled and loop as measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import edgekd
from edgekd.conversion.fastest import fastest
from edgekd.models.model_file import import_model
from edgekd.models.tflite_file import load_model, op_counts
from edgekd.records import Artifact, Precision
from edgekd.streaming import streaming_cell
from tests.contracts.litert_nets import sqnr_db
from tests.contracts.tiny_models import noise
from tests.environments.test_litert_road import QUICK

pytestmark = [pytest.mark.torch, pytest.mark.environments]

STEPS = 50
FLOOR_DB = 21.5
"""What an int8 model of 50 operators is held to (docs/parity.md); here at the last of 50 steps, with the error of all of them in the state."""


class Forecast(nn.Module):
    """A recurrent layer over steps of four values, every step to three."""

    def __init__(self, kind: Any = nn.GRU, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.head = kind(4, 16, batch_first=True, **options), nn.Linear(16, 3)

    def forward(self, sequence: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.rnn(sequence)[0])
        return out


class Last(Forecast):
    """The last step only."""

    def forward(self, sequence: torch.Tensor) -> torch.Tensor:
        return super().forward(sequence)[:, -1]


NETS: dict[str, tuple[Any, dict[str, Any]]] = {"lstm of two layers": (nn.LSTM, {"num_layers": 2}), "gru": (nn.GRU, {})}


@pytest.mark.parametrize("scheme", ["", "static_int8", "dynamic_int8"])
@pytest.mark.parametrize("name", NETS)
def test_a_cell_streams_on_litert_as_torch_does(name: str, scheme: str, tmp_path: Path) -> None:
    kind, options = NETS[name]
    cell = streaming_cell(Forecast(kind, **options), noise(4, 8, 4))
    calibration, judged = noise(6, STEPS, 4, seed=1), noise(6, STEPS, 4, seed=2)
    quantized: dict[str, Any] = {"precision": "int8", "scheme": scheme, "calibration": cell.steps(calibration)} if scheme else {"example": cell.steps(judged)}
    done = edgekd.convert(cell.module, to="tflite", out=tmp_path / "cell", progress=False, **quantized)
    assert done.passed
    assert Artifact.load(tmp_path / "cell" / "artifact.json").iospec.state == cell.iospec.state
    assert import_model(done.stored.entry, tmp_path / "file").record.iospec.state == cell.iospec.state
    reference = cell.run(judged)
    with edgekd.connect("litert-local") as target:
        found = target.runtime.infer(done.stored, cell.sequences(judged))
    assert sorted(found) == sorted(reference)
    for key, value in reference.items():
        assert sqnr_db(value[:, -1], found[key][:, -1]) > (FLOOR_DB if scheme else 90.0), key


def test_the_faster_of_unrolled_and_loop_is_kept_as_measured(tmp_path: Path, need: Any) -> None:
    home = need("onnx2tf")["environments"]
    roads = (("tflite-from-torch",), ("onnx-from-torch", "tflite-from-onnx"))
    overrides = (*QUICK, f"transport.workdir={tmp_path / 'device'}", f"runtime.options.lock={tmp_path / 'lock'}")
    with edgekd.connect("litert-local", overrides=overrides) as live:
        found = fastest(Last(), "tflite", target=live, roads=roads, example=noise(8, 12, 4), out=tmp_path / "m.tflite", environments=home, progress=False)
    assert {road.route for road in found.roads} == set(roads)
    assert sorted(road.outcome for road in found.roads) == ["fastest", "slower"]
    latencies = {road.route: road.latency_ms for road in found.roads}
    assert all(latency is not None for latency in latencies.values())
    assert latencies[found.conversion.route] == min(latency for latency in latencies.values() if latency is not None)
    assert found.simulated == ""
    loops = op_counts(load_model(tmp_path / "m.tflite")).get("WHILE", 0)
    assert (loops > 0) == (found.conversion.route == roads[1])
    assert found.conversion.artifact.precision is Precision.FP32
    assert np.isfinite([hop.tensors[0].max_rel for hop in found.conversion.parity]).all()


def test_a_cell_reaches_tflite_by_way_of_onnx_with_its_state(tmp_path: Path, need: Any) -> None:
    home = need("onnx2tf")["environments"]
    cell, judged = streaming_cell(Forecast(), noise(4, 8, 4)), noise(3, 9, 4, seed=5)
    via = ("onnx-from-torch", "tflite-from-onnx")
    done = edgekd.convert(cell.module, to="tflite", via=via, example=cell.steps(judged), out=tmp_path / "cell", environments=home, progress=False)
    assert done.artifact.iospec.state == cell.iospec.state
    with edgekd.connect("litert-local") as target:
        found = target.runtime.infer(done.stored, cell.sequences(judged))
    for key, value in cell.run(judged).items():
        np.testing.assert_allclose(found[key], value, atol=1e-4)
