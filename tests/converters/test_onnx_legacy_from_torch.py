"""The older torch exporter: old operator sets, the same numbers and names as the module, options that are checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from edgekd.artifact import StoredArtifact
from edgekd.contracts import ConvertRequest
from edgekd.errors import ConfigError, ConversionRejected
from edgekd.registry import load
from edgekd.testing import ConverterContract
from tests.contracts.tiny_models import ConvNet, TwoInputs, noise, ort_infer, spec_of, torch_outputs

pytestmark = pytest.mark.torch

IMAGE = {"image": noise(4, 3, 8, 8)}


def export(module: nn.Module, inputs: dict[str, np.ndarray], folder: Path, **options: str | int | float | bool) -> StoredArtifact:
    asked = ConvertRequest(source=module, folder=folder, iospec=spec_of(inputs), example=inputs, options=options)
    made = load("converters", "onnx-legacy-from-torch")().convert(asked)
    assert isinstance(made, StoredArtifact)
    return made


class TestOnnxLegacyFromTorchContract(ConverterContract):
    converter_name = "onnx-legacy-from-torch"

    def request(self, folder: Path) -> ConvertRequest:
        return ConvertRequest(source=ConvNet(), folder=folder, iospec=spec_of(IMAGE), example=IMAGE)

    def unusable_source(self, folder: Path) -> object:
        return "not a module"


@pytest.mark.parametrize("opset", [9, 13, 17])
def test_old_operator_sets_compute_the_same(opset: int, tmp_path: Path) -> None:
    module = ConvNet()
    artifact = export(module, IMAGE, tmp_path, opset=opset)
    assert artifact.record.opset == opset
    assert artifact.record.iospec.inputs[0].shape == (1, 3, 8, 8)
    assert artifact.record.metadata["batch_normalizations"] == "0"
    found, expected = ort_infer(artifact, IMAGE), torch_outputs(module, IMAGE)
    np.testing.assert_allclose(found["output"], expected["output"], atol=1e-5)


def test_two_inputs_and_three_outputs_keep_names_and_order_and_nodes_name_their_module(tmp_path: Path) -> None:
    inputs = {"image": noise(4, 3, 8, 8), "extra": noise(4, 5, seed=1)}
    module = TwoInputs()
    artifact = export(module, inputs, tmp_path)
    assert artifact.record.opset == 17
    assert [tensor.name for tensor in artifact.record.iospec.inputs] == ["image", "extra"]
    assert [tensor.name for tensor in artifact.record.iospec.outputs] == ["cls.logits", "parts.0", "parts.1"]
    found, expected = ort_infer(artifact, inputs), torch_outputs(module, inputs)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5)
    names = [node.name for node in onnx.load(artifact.entry).graph.node]
    assert len(set(names)) == len(names)
    assert not [name for name in names if name.startswith("/model/")]


def test_the_same_request_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first, second = (export(ConvNet(), IMAGE, tmp_path / name) for name in ("a", "b"))
    assert first.entry.read_bytes() == second.entry.read_bytes()


def test_an_operator_that_the_old_set_lacks_is_named(tmp_path: Path) -> None:
    class Grid(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            grid = torch.stack([image[:, 0], image[:, 1]], dim=-1).tanh()
            return nn.functional.grid_sample(image, grid, align_corners=False)

    with pytest.raises(ConversionRejected, match="grid_sampl"):
        export(Grid(), IMAGE, tmp_path, opset=13)


@pytest.mark.parametrize(("options", "text"), [({"opset": 8}, "9 to 20"), ({"opset": "17"}, "9 to 20"), ({"batch": "dynamic"}, "no option 'batch'")])
def test_unusable_options_are_refused(options: dict[str, str | int | float | bool], text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=text):
        export(ConvNet(), IMAGE, tmp_path, **options)


def test_a_file_with_an_operator_of_its_author_s_own_is_written_with_its_batch_norm(tmp_path: Path) -> None:
    class Glow(torch.autograd.Function):
        @staticmethod
        def forward(_: object, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x)

        @staticmethod
        def symbolic(graph: Any, x: Any) -> Any:
            return graph.op("example.glow::Glow", x).setType(x.type())

    class Glowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.BatchNorm1d(5), nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Glow.apply(self.fc(self.norm(x)))  # type: ignore[no-untyped-call,no-any-return]

    told = export(Glowing(), {"x": noise(2, 5)}, tmp_path).record.metadata
    assert told["batch_normalizations"] == "1"
    ((_, reason),) = json.loads(told["batch_norms_left"])
    assert "does not run the model" in reason
    assert "example.glow" in reason
