"""Learned ranges in a TFLite file, mixed precision there, and structures read from real TFLite files."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.artifact import StoredArtifact
from edgekd.contracts import Array, ConvertRequest
from edgekd.models.tflite_file import load_model, read_graph
from edgekd.options import QuantizeOptions
from edgekd.quantize import make_recipe, propose, quantize
from edgekd.quantize.calibrate import calibration_set
from edgekd.quantize.qat import QatModule, learned_ranges, prepare_qat
from edgekd.quantize.structure import Kind, structure_of
from edgekd.records import Capabilities, Format, Precision, SupportReport
from edgekd.registry import load
from edgekd.tasks import Classification
from tests.contracts.litert_nets import Recurrent, Residual, SqueezeExcite, Transformer, convert, images, sequences, sqnr_db
from tests.contracts.tiny_models import FragileNet, HostTarget, noise

pytestmark = [pytest.mark.torch, pytest.mark.environments]

_litert: Any = importlib.import_module("edgekd.converters._litert")
LITERT = Capabilities(formats=(Format.TFLITE,), precisions=(Precision.INT8, Precision.FP32), schemes=("static_int8", "dynamic_int8"), taps=True)


def to_int8(source: StoredArtifact, inputs: Mapping[str, Array], folder: Path, ranges: Mapping[str, tuple[float, float]] | None) -> StoredArtifact:
    folder.mkdir()
    calibration = calibration_set(inputs, split="train")
    recipe = make_recipe("static_int8", "minmax", calibration)
    asked = ConvertRequest(source=source, folder=folder, iospec=source.record.iospec, example=inputs, recipe=recipe, calibration=calibration, ranges=ranges)
    made: StoredArtifact = load("converters", "quantized-tflite-from-tflite")().convert(asked)
    return made


def outputs(prepared: QatModule, inputs: Mapping[str, Array]) -> np.ndarray:
    with torch.no_grad():
        made: np.ndarray = prepared(*[torch.from_numpy(array) for array in inputs.values()]).numpy()
    return made


def test_the_int8_file_computes_with_the_learned_ranges(tmp_path: Path) -> None:
    inputs, held_out = images(8), images(16, seed=9)
    trained = {"relu": (0.0, 0.6), "relu_1": (0.0, 0.5), "first_1": (0.0, 0.9)}
    prepared = prepare_qat(Residual().eval(), "static_int8", inputs)
    known = {name: ends for name, ends in trained.items() if name in prepared.report.points}
    assert len(known) >= 2
    prepared = prepare_qat(Residual().eval(), "static_int8", inputs, ranges=known).freeze()
    source = convert(prepared.without_rounding(), inputs, tmp_path / "float")
    learned = learned_ranges(prepared, source, _litert.host_infer, inputs)
    assert set(known) <= set(learned.learned.values())
    made = to_int8(source, inputs, tmp_path / "learned", learned.ranges)
    scales = {tensor.name: tensor.scales for tensor in read_graph(load_model(made.entry)).tensors}
    for tensor, point in learned.learned.items():
        if point in known:
            low, high = prepared.ranges()[point]
            assert scales[tensor] == pytest.approx(((high - low) / 255,), rel=1e-5)
    expected, found = outputs(prepared, held_out), _litert.host_infer(made, held_out)["output"]
    ignored = _litert.host_infer(to_int8(source, inputs, tmp_path / "ignored", None), held_out)["output"]
    step = (prepared.ranges()["head"][1] - prepared.ranges()["head"][0]) / 255
    assert np.abs(found - expected).max() <= 3 * step
    assert sqnr_db(expected, found) > 30
    assert sqnr_db(expected, ignored) < sqnr_db(expected, found) - 6


@pytest.mark.parametrize(
    ("module", "inputs", "kind", "first"),
    [
        (Residual, images(1), Kind.CONVOLUTIONAL, "static_int8"),
        (SqueezeExcite, images(1), Kind.DEPTHWISE, "static_int8"),
        (Transformer, sequences(1), Kind.TRANSFORMER, "dynamic_int8"),
        (Recurrent, sequences(1), Kind.RECURRENT, "dynamic_int8"),
    ],
)
def test_the_structure_of_real_tflite_files_leads_to_the_proposal(
    module: type[nn.Module], inputs: Mapping[str, Array], kind: Kind, first: str, tmp_path: Path
) -> None:
    made = convert(module(), inputs, tmp_path)
    found = structure_of(made)
    assert found.kind is kind, found.text()
    assert propose(made, LITERT)[0].scheme == first


class ConvAttention(nn.Module):
    """Two convolutions, a depthwise one, and an attention over what they give."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.query, self.key, self.value, self.head = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.deep(torch.relu(self.two(torch.relu(self.one(image)))))).flatten(2).transpose(1, 2)
        weights = torch.softmax(self.query(x) @ self.key(x).transpose(1, 2) / 4.0, -1)
        made: torch.Tensor = self.head((weights @ self.value(x)).mean(1))
        return made


def test_rules_of_a_proposal_make_a_file_of_both_kinds_of_int8(tmp_path: Path) -> None:
    inputs = images(16)
    source = convert(ConvAttention().eval(), inputs, tmp_path / "float")
    proposal = propose(source, LITERT)[0]
    assert proposal.label == "dynamic_int8 with CONV_2D static_int8, DEPTHWISE_CONV_2D static_int8"
    calibration = calibration_set(inputs, split="train")
    recipe = make_recipe(proposal.scheme, "minmax", calibration, op_rules=dict(proposal.op_rules))
    (tmp_path / "int8").mkdir()
    asked = ConvertRequest(source=source, folder=tmp_path / "int8", iospec=source.record.iospec, example=inputs, recipe=recipe, calibration=calibration)
    made = load("converters", "quantized-tflite-from-tflite")().convert(asked)
    graph = read_graph(load_model(made.entry))
    types = {kind: {op.inputs[0].dtype for op in graph.ops if op.kind == kind} for kind in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")}
    assert types == {"CONV_2D": {"int8"}, "DEPTHWISE_CONV_2D": {"int8"}, "FULLY_CONNECTED": {"float32"}}
    assert {op.inputs[1].dtype for op in graph.ops if op.kind == "FULLY_CONNECTED" and op.inputs[1].constant} == {"int8"}
    assert sqnr_db(_litert.host_infer(source, inputs)["output"], _litert.host_infer(made, inputs)["output"]) > 25


class LiteRtHost(HostTarget):
    """What `quantize` needs of a target, on LiteRT in this process."""

    @property
    def capabilities(self) -> Capabilities:
        return LITERT


class LiteRtRuntime:
    """The interpreter in this process."""

    infer = staticmethod(_litert.host_infer)

    def supports(self, model: StoredArtifact) -> SupportReport:
        """Every file is run."""
        return SupportReport(supported=True)


def computing_float(model: StoredArtifact) -> int:
    """Operators with weights whose weights are float."""
    return sum(op.kind in ("CONV_2D", "FULLY_CONNECTED") and op.inputs[1].dtype == "float32" for op in read_graph(load_model(model.entry)).ops)


def test_exactly_the_fragile_operator_returns_to_float_on_tflite(tmp_path: Path) -> None:
    train, validation = {"image": noise(64, 3, 8, 8, seed=5)}, {"image": noise(64, 3, 8, 8, seed=6)}
    module = FragileNet().eval()
    with torch.no_grad():
        features = module(torch.from_numpy(validation["image"]))
        module.head.weight.mul_(1.0 / features.std(0)[:, None])
        module.head.bias.copy_((module.head.bias - features.mean(0)) / features.std(0))
    source = convert(module, {"image": train["image"][:1]}, tmp_path / "float")
    labels = _litert.host_infer(source, validation)["output"].argmax(1)
    result = quantize(
        source,
        target=LiteRtHost(runtime=LiteRtRuntime()),  # type: ignore[arg-type]
        calibration=calibration_set(train, split="train"),
        validation_inputs=validation,
        validation_targets=labels,
        task=Classification(),
        reference_scores=np.ones(len(labels)),
        options=QuantizeOptions(methods=("minmax",), sensitivity_samples=32),
        allowed_drop=0.1,
        time_ms=lambda models: {name: 0.4 + 0.6 * (computing_float(model)) for name, model in models.items()},
        folder=tmp_path / "work",
        seed=0,
    )
    assert result.recipe.float_ops == ("conv2/CONV_2D",)
    assert computing_float(result.artifact) == 1
    assert result.scores.mean() >= 0.9
    assert json.loads(result.artifact.record.metadata["left_in_float"]) == {"CONV_2D": 1}
