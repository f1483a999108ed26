"""edgekd.convert over the real roads to TFLite: from torch, from ONNX, and by way of a SavedModel; every hop on the same images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import edgekd
from edgekd.errors import ConversionRejected
from edgekd.models.tflite_file import load_model, precision_of, read_graph
from edgekd.records import Precision
from tests.contracts.tiny_models import ConvNet, noise
from tests.environments.environment_kit import legacy_onnx

pytestmark = [pytest.mark.torch, pytest.mark.environments]

IMAGES = {"image": noise(40, 3, 8, 8)}
SOME = {"image": IMAGES["image"][:8]}


@pytest.mark.parametrize("channel_last", [False, True])
def test_torch_to_int8_tflite_is_compared_at_both_hops(tmp_path: Path, channel_last: bool) -> None:
    options = {"tflite-from-torch": {"channel_last": channel_last}}
    out = tmp_path / "m.tflite"
    made = edgekd.convert(ConvNet(), to="tflite", precision="int8", calibration=IMAGES, example=SOME, out=out, options=options, progress=False)
    assert made.route == ("tflite-from-torch", "quantized-tflite-from-tflite")
    assert [(hop.hop, hop.passed) for hop in made.parity] == [("torch -> tflite", True), ("tflite -> tflite int8", True)]
    assert made.parity[0].tensors[0].max_rel < 1e-4
    assert made.artifact.iospec.inputs[0].shape == ((1, 8, 8, 3) if channel_last else (1, 3, 8, 8))
    assert precision_of(read_graph(load_model(out))) is Precision.INT8


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_onnx_to_tflite_is_compared_in_the_layout_of_the_file(tmp_path: Path, need: Any, precision: str) -> None:
    home = need("onnx2tf")["environments"]
    source = legacy_onnx(ConvNet(), SOME, tmp_path, 17)
    calibration = IMAGES if precision == "int8" else None
    out = tmp_path / "m.tflite"
    made = edgekd.convert(source.entry, to="tflite", precision=precision, calibration=calibration, example=SOME, out=out, environments=home, progress=False)
    assert made.route == ("tflite-from-onnx",)
    assert made.passed
    assert made.parity[0].samples == 8
    assert made.artifact.iospec.inputs[0].shape == (1, 8, 8, 3)
    assert made.artifact.precision.value == precision


def test_onnx_by_way_of_a_saved_model_is_compared_over_it(tmp_path: Path, need: Any) -> None:
    need("tensorflow")
    home = need("onnx-tf")["environments"]
    source = legacy_onnx(ConvNet(), SOME, tmp_path, 13)
    out = tmp_path / "m.tflite"
    made = edgekd.convert(ConvNet(), to="tflite", via=("saved_model",), example=SOME, out=out, environments=home, progress=False)
    assert made.route == ("onnx-legacy-from-torch", "saved-model-from-onnx", "tflite-from-saved-model")
    assert [(hop.hop, hop.passed) for hop in made.parity] == [("torch -> onnx", True), ("onnx -> saved_model -> tflite", True)]
    assert "saved_model" in " ".join(made.notes)
    assert "6 transpositions" in " ".join(made.notes), "onnx-tf turns around every convolution: noted, since the road was named"
    with pytest.raises(ConversionRejected, match="6 transpositions"):
        edgekd.convert(
            ConvNet(), to="tflite", via=("saved_model",), example=SOME, out=tmp_path / "n.tflite", environments=home, max_transposes=3, progress=False
        )
    folder = edgekd.convert(source.entry, to="saved_model", example=SOME, out=tmp_path / "folder", environments=home, progress=False)
    assert (tmp_path / "folder" / "saved_model.pb").is_file()
    again = edgekd.convert(tmp_path / "folder", to="tflite", example=SOME, out=tmp_path / "again.tflite", environments=home, progress=False)
    assert (folder.parity, again.parity) == ((), ())
    assert sorted(map(str, again.artifact.iospec.inputs[0].shape)) == ["1", "3", "8", "8"]
