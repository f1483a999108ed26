"""What is proposed for which network on which target, read from real files; and that the measurement has the last word."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.artifact import StoredArtifact
from edgekd.contracts import Array
from edgekd.errors import ModelError, UnsupportedModel
from edgekd.options import QuantizeOptions
from edgekd.quantize import PROPOSALS, SCHEMES, propose, quantize
from edgekd.quantize.calibrate import calibration_set
from edgekd.quantize.module_structure import module_structure
from edgekd.quantize.proposals import int8_proposals, proposed_text, timed_proposals
from edgekd.quantize.structure import Kind, Structure, structure_of
from edgekd.records import Artifact, Capabilities, Format, IOSpec, Precision, TensorSpec
from edgekd.tasks import Regression
from tests.contracts.litert_nets import Recurrent, SqueezeExcite, Transformer, images, sequences
from tests.contracts.tiny_models import ConvNet, HostTarget, exported_convnet, noise, ort_infer
from tests.contracts.tiny_models import export as to_onnx

pytestmark = pytest.mark.torch


def file_of(format: Format) -> StoredArtifact:
    """A record of a file that is not read."""
    spec = TensorSpec(name="x", dtype="float32", shape=(1, 2))
    record = Artifact(files={"m": "0"}, entry="m", format=format, precision=Precision.FP32, iospec=IOSpec(inputs=(spec,), outputs=(spec,)), size_bytes=1)
    return StoredArtifact(record, Path("."))


def able(format: Format, *schemes: str, delegate: str = "", precisions: tuple[Precision, ...] = (Precision.INT8, Precision.FP32)) -> Capabilities:
    return Capabilities(formats=(format,), precisions=precisions, schemes=schemes, delegate=delegate)


LITERT = able(Format.TFLITE, "static_int8", "dynamic_int8")
STRUCTURES = {
    Kind.TRANSFORMER: Structure(attentions=4, convolutions=1, dense=17, ops=frozenset({"CONV_2D", "BATCH_MATMUL", "SOFTMAX"})),
    Kind.DEPTHWISE: Structure(depthwise=5, pointwise=11, convolutions=1, dense=1, ops=frozenset({"CONV_2D", "DEPTHWISE_CONV_2D"})),
    Kind.RECURRENT: Structure(recurrent=2, dense=4, ops=frozenset({"FULLY_CONNECTED", "TANH"})),
    Kind.CONVOLUTIONAL: Structure(convolutions=20, dense=1, ops=frozenset({"CONV_2D"})),
    Kind.MIXED: Structure(attentions=2, convolutions=6, depthwise=3, dense=9, ops=frozenset({"CONV_2D", "DEPTHWISE_CONV_2D", "BATCH_MATMUL"})),
    Kind.DENSE: Structure(dense=3, ops=frozenset({"FULLY_CONNECTED"})),
    Kind.OTHER: Structure(),
}


@pytest.mark.parametrize("kind", Kind)
def test_the_kind_follows_from_the_counts(kind: Kind) -> None:
    assert STRUCTURES[kind].kind is kind
    assert kind.value in STRUCTURES[kind].text()


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        (Kind.TRANSFORMER, ["dynamic_int8", "static_int8"]),
        (Kind.DEPTHWISE, ["static_int8", "dynamic_int8"]),
        (Kind.RECURRENT, ["dynamic_int8", "static_int8"]),
        (Kind.CONVOLUTIONAL, ["static_int8", "dynamic_int8"]),
        (Kind.MIXED, ["dynamic_int8 with CONV_2D static_int8, DEPTHWISE_CONV_2D static_int8", "dynamic_int8", "static_int8"]),
        (Kind.DENSE, ["static_int8", "dynamic_int8"]),
    ],
)
def test_litert_on_a_processor_gets_what_suits_the_structure_first_and_all_of_its_schemes(kind: Kind, labels: list[str]) -> None:
    made = propose(file_of(Format.TFLITE), LITERT, STRUCTURES[kind])
    assert [one.label for one in made] == labels
    assert timed_proposals(made) == made
    assert all(one.reason and one.evidence for one in made)
    said = proposed_text(STRUCTURES[kind], made)
    assert f"1. {labels[0]}: {made[0].reason}" in said
    assert STRUCTURES[kind].text() in said


@pytest.mark.parametrize("kind", Kind)
def test_targets_get_nothing_that_they_do_not_name(kind: Kind) -> None:
    structure = STRUCTURES[kind]
    assert {one.scheme for one in propose(file_of(Format.TFLITE), able(Format.TFLITE, "static_int8"), structure)} == {"static_int8"}
    assert propose(file_of(Format.TFLITE), able(Format.TFLITE, "static_int8", precisions=(Precision.FP32,)), structure) == ()
    for one in PROPOSALS:
        assert one.scheme in {*SCHEMES, "fp16"}
        assert one.scheme == "fp16" or SCHEMES[one.scheme].format == one.format.value
    with pytest.raises(UnsupportedModel, match="int8 scheme"):
        int8_proposals(file_of(Format.TFLITE), able(Format.TFLITE), structure)


@pytest.mark.parametrize("kind", Kind)
def test_a_gpu_delegate_gets_fp16_and_int8_only_behind_it(kind: Kind) -> None:
    precisions = (Precision.FP16, Precision.FP32)
    (only,) = propose(file_of(Format.TFLITE), able(Format.TFLITE, delegate="gpu", precisions=precisions), STRUCTURES[kind])
    assert (only.scheme, only.precision) == ("fp16", Precision.FP16)
    both = able(Format.TFLITE, "static_int8", delegate="gpu", precisions=(*precisions, Precision.INT8))
    assert [one.label for one in propose(file_of(Format.TFLITE), both, STRUCTURES[kind])] == ["fp16", "static_int8"]
    assert [one.label for one in int8_proposals(file_of(Format.TFLITE), both, STRUCTURES[kind])] == ["static_int8"]


def test_tensorrt_gets_explicit_pairs_and_processors_keep_their_own_order() -> None:
    trt = able(Format.ONNX, "s8s8", "s8s8_tensorrt")
    assert [one.scheme for one in propose(file_of(Format.ONNX), trt, STRUCTURES[Kind.DEPTHWISE])] == ["s8s8_tensorrt", "s8s8"]
    for schemes in (("u8s8", "s8s8"), ("s8s8", "u8s8"), ("u8s8_reduced",)):
        made = propose(file_of(Format.ONNX), able(Format.ONNX, *schemes), STRUCTURES[Kind.CONVOLUTIONAL])
        assert tuple(one.scheme for one in made) == schemes
        assert [one.scheme for one in timed_proposals(made)] == [schemes[0]]


class Depthwise(nn.Module):
    """A stem, a depthwise convolution and a pointwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep, self.point = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.point(torch.relu(self.deep(torch.relu(self.stem(image))))))


class FrontEnd(nn.Module):
    """Two convolutions in front of a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.gru = nn.Conv1d(4, 8, 3), nn.Conv1d(8, 6, 3), nn.GRU(6, 5, batch_first=True)

    def forward(self, sequence: torch.Tensor) -> torch.Tensor:
        x = self.two(torch.relu(self.one(sequence.transpose(1, 2))))
        steps: torch.Tensor = self.gru(x.transpose(1, 2))[0]
        return steps


class Gate(nn.Module):
    """A softmax over dense scores, multiplied elementwise: no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, sequence: torch.Tensor) -> torch.Tensor:
        gated: torch.Tensor = self.two(torch.softmax(self.one(sequence), -1) * sequence)
        return gated


@pytest.mark.parametrize(
    ("module", "inputs", "kind"),
    [
        (ConvNet, {"image": noise(1, 3, 8, 8)}, Kind.CONVOLUTIONAL),
        (Depthwise, images(1), Kind.DEPTHWISE),
        (SqueezeExcite, images(1), Kind.DEPTHWISE),
        (Recurrent, sequences(1), Kind.RECURRENT),
        (Transformer, sequences(1), Kind.TRANSFORMER),
        (FrontEnd, sequences(1), Kind.MIXED),
        (Gate, sequences(1), Kind.DENSE),
    ],
)
def test_the_structure_is_read_from_real_onnx_files_and_from_their_modules(
    module: type[nn.Module], inputs: dict[str, Array], kind: Kind, tmp_path: Path
) -> None:
    found = structure_of(to_onnx(module(), inputs, tmp_path))
    assert found.kind is kind, found.text()
    before = module_structure(module(), inputs)
    assert before.kind is kind, before.text()


def test_formats_that_cannot_be_read_are_refused() -> None:
    with pytest.raises(ModelError, match="onnx, tflite"):
        structure_of(file_of(Format.KERAS))


def test_the_measurement_decides_against_the_proposal_and_the_notes_say_both(tmp_path: Path) -> None:
    inputs = {"image": noise(24, 3, 8, 8)}
    source = exported_convnet()
    outputs = ort_infer(source, inputs)["output"]

    def time_ms(models: dict[str, StoredArtifact]) -> dict[str, float]:
        return {label: {"float": 2.0, "u8s8_reduced": 1.5}.get(label, 1.0) for label in models}

    result = quantize(
        source,
        target=HostTarget(schemes=("u8s8_reduced", "s8s8")),  # type: ignore[arg-type]
        calibration=calibration_set(inputs, split="train"),
        validation_inputs=inputs,
        validation_targets=outputs,
        task=Regression(),
        reference_scores=np.zeros(len(outputs)),
        options=QuantizeOptions(),
        allowed_drop=float("inf"),
        time_ms=time_ms,
        folder=tmp_path,
        seed=0,
    )
    assert (result.proposed, result.recipe.scheme) == ("u8s8_reduced", "s8s8")
    assert "the network is convolutional" in result.notes[0]
    assert "1. u8s8_reduced" in result.notes[0]
    assert "s8s8 is taken, 1 ms against 2 ms in float; proposed first was u8s8_reduced, 1.5 ms" in result.notes[-1]
    assert result.stability is not None
    assert result.stability.samples == 24
    assert {row.method for row in result.tried} == {"minmax", "percentile", "entropy", "mse"}
