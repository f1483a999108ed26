"""Planted faults: a fragile layer returns to float alone, and a fault at a hop is named at that hop with its tensor."""

from __future__ import annotations

from pathlib import Path

import msgspec
import onnx
import pytest
import torch
from torch import nn

from edgekd.bundle import open_bundle
from edgekd.options import TrainOptions
from edgekd.records import Budget, Outcome, QuantRecipe
from edgekd.report.data import ReportData
from edgekd.result import Result, RunSummary
from edgekd.spaces import Fixed
from tests.pipeline import pipeline_kit as kit
from tests.pipeline.plugin_kit import install_runtimes

pytestmark = pytest.mark.torch

FROZEN = kit.options(
    train=TrainOptions(epochs=1, batch_size=64, learning_rate=1e-7, threads=1, precision="fp32", teacher_outputs="cached", views=1, init_from_teacher="no")
)
WEIGHTED = {"Conv", "Gemm", "MatMul"}


class DeepTrunk(kit.Trunk):
    """The trunk with two more convolutions; int8 destroys `conv2`: a huge weight on an input channel that is always zero."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1)
        self.conv4 = nn.Conv2d(width, width, 3, padding=1)
        with torch.no_grad():
            self.conv1.weight[0] = 0
            self.get_parameter("conv1.bias")[0] = 0
            self.conv2.weight[:, 0] = 1000.0

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv2(torch.relu(self.conv1(image))))
        x = torch.relu(self.conv4(torch.relu(self.conv3(x))))
        return torch.flatten(self.pool(x), 1)


def fragile() -> nn.Module:
    """A solved student of width 16 with the fragile layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        module = kit.Plain(16, kit.CLASSES)
        module.trunk = DeepTrunk(16)
    kit.solve(module, "classification")
    return module


def float_weights(path: Path) -> list[str]:
    """The weighted operators of an ONNX file whose weight is stored in float, by name."""
    proto = onnx.load(str(path))
    stored = {item.name for item in proto.graph.initializer if item.data_type == onnx.TensorProto.FLOAT}
    return [node.name for node in proto.graph.node if node.op_type in WEIGHTED and node.input[1] in stored]


@pytest.mark.slow
def test_exactly_the_fragile_layer_ships_in_float_inside_an_int8_artifact(tmp_path: Path) -> None:
    result = kit.run(
        "classification",
        tmp_path / "run",
        teacher=kit.make_teacher("classification", 64),
        student=Fixed(fragile()),
        options=FROZEN,
        budget=Budget(latency_share=0.25, max_drop=0.1),
    )
    assert result.verdict.outcome is Outcome.PASS, result.verdict.reason
    assert result.bundle is not None
    bundle = open_bundle(result.bundle)
    assert bundle.manifest.artifact.precision.value == "int8"
    recipe = QuantRecipe.load(result.bundle / "recipe.json")
    assert len(recipe.float_ops) == 1
    assert "conv2" in recipe.float_ops[0]
    assert tuple(float_weights(bundle.artifact.entry)) == recipe.float_ops
    plain = [row for row in kit.rows_of(result, "quantize", "u8s8") if "back in float" not in row.reason and "in float:" not in row.reason]
    assert plain
    assert all(float(row.details["accuracy"]) < 0.9 for row in plain)
    assert any("conv2" in row.reason and "back in float" in row.reason for row in kit.rows_of(result, "quantize"))


class ExportsWrong(kit.TwoInTwoOut):
    """Adds an offset to `size` while it is exported."""

    def forward(self, image: torch.Tensor, extra: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = super().forward(image, extra)
        if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
            outputs["size"] = outputs["size"] + 0.25
        return outputs


def exports_wrong() -> nn.Module:
    """A student whose export computes something else."""
    return ExportsWrong(16)


class ExportsScaled(kit.TwoInTwoOut):
    """Scales its image by 255 while it is exported."""

    def forward(self, image: torch.Tensor, extra: torch.Tensor) -> dict[str, torch.Tensor]:
        return super().forward(image * 255 if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export() else image, extra)


def exports_scaled() -> nn.Module:
    """A student whose export reads another range of pixels."""
    return ExportsScaled(16)


def stopped_at(result: Result, stage: str, hop: str, tensor: str, *, trained: bool = True) -> None:
    """The run ended at this stage because of this hop and tensor, and ledger, verdict, report data and report say so; `trained`: after a training."""
    assert (result.verdict.outcome, result.exit_code) == (Outcome.REFUSE, 2), "nothing was measured against a line of the budget"
    assert result.bundle is None
    (row,) = [row for row in result.ledger.rows if row.decision == "rolled back" and row.step == "fixed"]
    assert row.stage == stage
    for text in (row.reason, result.verdict.reason):
        assert hop in text
        assert f"{tensor}: " in text
    bad = [parity for parity in ReportData.load(result.run_dir / "report.json").parity if not parity.passed]
    assert [(parity.hop, parity.first_bad) for parity in bad] == [(hop, tensor)]
    assert [row.decision for row in kit.rows_of(result, "distil", "fixed")] == (["kept"] if trained else [])


@pytest.mark.slow
def test_a_fault_of_the_export_is_named_at_torch_to_onnx(tmp_path: Path) -> None:
    result = kit.run("multi", tmp_path / "run", student=Fixed(exports_wrong), options=FROZEN, budget=Budget(latency_share=0.4))
    stopped_at(result, "search", "torch -> onnx", "size", trained=False)


@pytest.mark.slow
def test_an_export_that_scales_its_input_is_named_as_such(tmp_path: Path) -> None:
    result = kit.run("multi", tmp_path / "run", student=Fixed(exports_scaled), options=FROZEN, budget=Budget(latency_share=0.4))
    (bad,) = [parity for parity in ReportData.load(result.run_dir / "report.json").parity if not parity.passed]
    assert bad.hop == "torch -> onnx"
    assert bad.findings == ("input scale 255: the outputs agree with those of the input 255 times as large",)
    assert bad.findings[0] in result.verdict.reason


class ExportsAnotherShape(kit.Plain):
    """Gives an axis more while it is exported."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        outputs = super().forward(image)
        return outputs[:, None].repeat(1, 3, 1) if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export() else outputs


def exports_another_shape() -> nn.Module:
    """A student whose export has another shape."""
    return ExportsAnotherShape(16, kit.CLASSES)


@pytest.mark.slow
def test_an_export_of_another_shape_is_named_and_the_quantized_teacher_ships(tmp_path: Path) -> None:
    result = kit.run("classification", tmp_path / "run", student=Fixed(exports_another_shape), options=FROZEN, budget=Budget(latency_share=0.5))
    (row,) = [row for row in result.ledger.rows if row.decision == "rolled back" and row.step == "fixed"]
    assert row.stage == "search"
    assert "'torch -> onnx'" in row.reason
    assert "output: shape (4, 3, 4) instead of (4, 4)" in row.reason
    assert result.verdict.outcome is Outcome.PASS
    assert RunSummary.load(result.run_dir / "run.json").student == "teacher int8"


class TeacherExportsWrong(ExportsWrong):
    """A teacher with the same fault."""


@pytest.mark.slow
def test_a_teacher_that_exports_wrong_is_named_and_does_not_compete(tmp_path: Path) -> None:
    teacher = TeacherExportsWrong(kit.TEACHER_WIDTH)
    teacher.load_state_dict(kit.make_teacher("multi").state_dict())
    result = kit.run("multi", tmp_path / "run", teacher=teacher, student=kit.fixed("multi"), budget=Budget(latency_share=0.6, max_drop=0.3))
    (row,) = kit.rows_of(result, "baseline", "teacher -> onnx")
    assert "'teacher -> onnx', size: " in row.reason
    assert not kit.rows_of(result, "baseline", "quantize the teacher")
    assert result.verdict.outcome is Outcome.PASS
    assert result.student is not None


FAULTY = '''
class WireFault(Null):
    """Adds to `size` whenever a float model runs on the device: a fault of the wire, not of the file."""

    def infer(self, model, inputs, taps=()):
        outputs = super().infer(model, inputs, taps)
        if model.record.precision.value == "fp32" and "size" in outputs:
            outputs["size"] = outputs["size"] + np.float32(0.25)
        return outputs


class Int8Fault(Null):
    """Adds the same to all logits of an int8 model: the classes stay, the numbers do not."""

    def infer(self, model, inputs, taps=()):
        outputs = super().infer(model, inputs, taps)
        if model.record.precision.value == "int8" and "output" in outputs:
            outputs["output"] = outputs["output"] + np.float32(50)
        return outputs


class CompileFault(Null):
    """Damages one bias of the file while it compiles."""

    def compile(self, model, folder):
        import onnx

        folder.mkdir(parents=True, exist_ok=True)
        proto = onnx.load(str(model.entry))
        bias = next(item for item in proto.graph.initializer if item.data_type == onnx.TensorProto.FLOAT and list(item.dims) == [4])
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(50), bias.name))
        (folder / "compiled.onnx").write_bytes(proto.SerializeToString())
        record = model.record
        return store_artifact(folder, "compiled.onnx", format=record.format, precision=record.precision, iospec=record.iospec)
'''
NAMES = {"wire-fault": "WireFault", "int8-fault": "Int8Fault", "compile-fault": "CompileFault"}


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three runtimes with a fault each, as plug-ins."""
    install_runtimes(tmp_path / "plugin", monkeypatch, FAULTY, NAMES)


@pytest.mark.usefixtures("faults")
@pytest.mark.slow
def test_a_fault_of_the_device_is_named_at_onnx_to_device(tmp_path: Path) -> None:
    result = kit.run(
        "multi", tmp_path / "run", overrides=["runtime.kind=wire-fault"], student=kit.fixed("multi"), options=FROZEN, budget=Budget(latency_share=0.4)
    )
    (row,) = [row for row in result.ledger.rows if row.decision == "rolled back" and row.step == "fixed"]
    assert row.stage == "search"
    assert "'onnx -> device'" in row.reason
    assert "size: " in row.reason
    assert (result.verdict.outcome, result.exit_code) == (Outcome.REFUSE, 2), "nothing was measured against a line of the budget"
    assert result.bundle is None


@pytest.mark.slow
@pytest.mark.usefixtures("faults")
def test_a_fault_of_int8_is_named_at_onnx_to_int8_and_rolled_back(tmp_path: Path) -> None:
    result = kit.run(
        "classification",
        tmp_path / "run",
        overrides=["runtime.kind=int8-fault"],
        student=Fixed(kit.make_teacher("classification", 16)),
        options=FROZEN,
        budget=Budget(latency_share=0.6, max_drop=0.2),
    )
    (row,) = [row for row in kit.rows_of(result, "quantize", "int8") if row.decision == "rolled back"]
    assert "onnx -> int8: output" in row.reason
    (teacher,) = kit.rows_of(result, "baseline", "quantize the teacher")
    assert teacher.decision == "rolled back"
    assert "'teacher onnx -> int8', output: " in teacher.reason
    bad = [parity.hop for parity in ReportData.load(result.run_dir / "report.json").parity if not parity.passed]
    assert bad == ["teacher onnx -> int8", "onnx -> int8"]
    assert result.verdict.outcome is Outcome.PASS
    assert result.bundle is not None
    assert open_bundle(result.bundle).manifest.artifact.precision.value == "fp32"


@pytest.mark.usefixtures("faults")
@pytest.mark.slow
def test_a_fault_of_compiling_is_named_at_portable_to_compiled(tmp_path: Path) -> None:
    floats = msgspec.structs.replace(FROZEN, bundle_data_mb=1.0)
    result = kit.run(
        "classification",
        tmp_path / "run",
        overrides=["runtime.kind=compile-fault", 'runtime.precisions=["fp32"]'],
        student=Fixed(kit.make_teacher("classification", 16)),
        options=floats,
        budget=Budget(latency_share=0.6, max_drop=0.2),
    )
    stopped_at(result, "validate", "portable -> compiled", "output")
    assert {row.stage for row in result.ledger.rows} == {"baseline", "search", "distil", "convert", "quantize", "validate"}
