"""The torch exporter: names, batch axes, quiet, no change to the caller's module."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from edgekd.contracts import ConvertRequest
from edgekd.errors import ConfigError, ConversionRejected, DataError
from edgekd.models.onnx_file import write_model
from edgekd.registry import load
from edgekd.testing import ConverterContract
from tests.contracts.tiny_models import ConvNet, TwoInputs, UNet, export, noise, ort_infer, spec_of, torch_outputs

pytestmark = pytest.mark.torch

IMAGE = {"image": noise(4, 3, 8, 8)}


class TestOnnxFromTorchContract(ConverterContract):
    converter_name = "onnx-from-torch"

    def request(self, folder: Path) -> ConvertRequest:
        return ConvertRequest(source=ConvNet(), folder=folder, iospec=spec_of(IMAGE), example=IMAGE)

    def unusable_source(self, folder: Path) -> object:
        return "not a module"


def test_export_computes_the_same_with_batch_norm_folded(tmp_path: Path) -> None:
    module = ConvNet()
    artifact = export(module, IMAGE, tmp_path)
    found, expected = ort_infer(artifact, IMAGE), torch_outputs(module, IMAGE)
    assert np.abs(found["output"] - expected["output"]).max() < 1e-5
    assert artifact.record.metadata["batch_normalizations"] == "0"
    assert artifact.record.iospec.inputs[0].shape == (1, 3, 8, 8)
    assert artifact.record.iospec.static_binding == {"batch": 1}
    assert artifact.record.opset == 20


def test_export_names_every_output_by_key_path_when_inputs_are_two(tmp_path: Path) -> None:
    inputs = {"image": noise(4, 3, 8, 8), "extra": noise(4, 5, seed=1)}
    module = TwoInputs()
    artifact = export(module, inputs, tmp_path)
    assert [tensor.name for tensor in artifact.record.iospec.inputs] == ["image", "extra"]
    assert [tensor.name for tensor in artifact.record.iospec.outputs] == ["cls.logits", "parts.0", "parts.1"]
    found, expected = ort_infer(artifact, inputs), torch_outputs(module, inputs)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5)


def test_export_keeps_the_batch_symbolic_when_asked(tmp_path: Path) -> None:
    import onnxruntime as ort

    inputs = {"image": noise(5, 3, 8, 8), "extra": noise(5, 5, seed=1)}
    module = TwoInputs()
    artifact = export(module, inputs, tmp_path, batch="dynamic")
    assert artifact.record.iospec.inputs[0].shape == ("batch", 3, 8, 8)
    assert artifact.record.iospec.static_binding == {}
    session = ort.InferenceSession(str(artifact.entry), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["cls.logits"], inputs)
    np.testing.assert_allclose(logits, torch_outputs(module, inputs)["cls.logits"], atol=1e-5)


def test_export_names_nodes_after_modules_and_keeps_no_source_paths(tmp_path: Path) -> None:
    artifact = export(ConvNet(), IMAGE, tmp_path)
    proto = onnx.load(str(artifact.entry))
    names = [node.name for node in proto.graph.node]
    assert {"conv1/Conv", "conv2/Conv", "conv3/Conv", "head/Gemm"} <= set(names)
    assert len(set(names)) == len(names)
    assert b".py" not in artifact.entry.read_bytes()


def test_export_leaves_the_module_in_its_mode_and_weights_as_they_are(tmp_path: Path) -> None:
    module = ConvNet().double()
    module.train()
    module.norm.eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    export(module, IMAGE, tmp_path)
    assert module.training
    assert not module.norm.training
    assert all(value.dtype == before[name].dtype and torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_export_of_resize_and_transposed_convolution_computes_the_same(tmp_path: Path) -> None:
    inputs = {"image": noise(2, 3, 16, 16)}
    module = UNet()
    found = ort_infer(export(module, inputs, tmp_path), inputs)
    np.testing.assert_allclose(found["output"], torch_outputs(module, inputs)["output"], atol=1e-5)


class _ByValue(nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image if image.sum() > 0 else -image


class _Unknown(nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        values: torch.Tensor = torch.linalg.eigvals(image[:, 0])
        return values.real


def test_export_is_rejected_in_one_line_when_control_flow_depends_on_values(tmp_path: Path) -> None:
    with pytest.raises(ConversionRejected, match="_ByValue") as raised:
        export(_ByValue(), IMAGE, tmp_path)
    assert "\n" not in str(raised.value)
    assert "next step" in str(raised.value)


def test_export_names_the_operator_when_onnx_has_none(tmp_path: Path) -> None:
    with pytest.raises(ConversionRejected, match="linalg_eig"):
        export(_Unknown(), IMAGE, tmp_path)


def test_export_says_what_fails_when_the_inputs_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ConversionRejected, match="example inputs"):
        export(ConvNet(), {"image": noise(2, 5, 8, 8)}, tmp_path)
    request = ConvertRequest(source=ConvNet(), folder=tmp_path, iospec=spec_of(IMAGE), example={})
    with pytest.raises(DataError, match="image"):
        load("converters", "onnx-from-torch")().convert(request)
    with pytest.raises(ConfigError, match="batch"):
        export(ConvNet(), IMAGE, tmp_path, batches="dynamic")


def test_writing_puts_weights_into_a_second_file_when_the_model_is_over_the_limit(tmp_path: Path) -> None:
    artifact = export(nn.Linear(64, 64), {"x": noise(2, 64)}, tmp_path / "whole")
    proto = onnx.load(str(artifact.entry))
    extra = write_model(proto, tmp_path / "split", "model.onnx", limit=1000)
    assert extra == ("model.onnx.data",)
    assert sorted(path.name for path in (tmp_path / "split").iterdir()) == ["model.onnx", "model.onnx.data"]
    again = onnx.load(str(tmp_path / "split" / "model.onnx"))
    assert again.graph.initializer[0].raw_data == proto.graph.initializer[0].raw_data
