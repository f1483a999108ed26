"""The quantize run: schemes timed once, methods by accuracy, and exactly the fragile layer back in float."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from edgekd.artifact import StoredArtifact
from edgekd.errors import UnsupportedModel
from edgekd.options import QuantizeOptions
from edgekd.quantize import QuantizeResult, quantize
from edgekd.quantize.calibrate import calibration_set
from edgekd.quantize.sensitivity import measure_sensitivity, output_error, suspects
from edgekd.quantize.workshop import Workshop
from edgekd.registry import load
from edgekd.target import connect
from edgekd.tasks import Classification, Regression
from tests.contracts.tiny_models import ConvNet, FragileNet, HostTarget, UNet, exact_infer, export, noise, ort_infer

pytestmark = pytest.mark.torch

TRAIN = {"image": noise(128, 3, 8, 8, seed=5)}
VALIDATION = {"image": noise(64, 3, 8, 8, seed=6)}
WEIGHTED = {"Conv", "Gemm", "MatMul", "ConvTranspose"}


class Clock:
    """A latency made from the graph: a weighted operator takes 1 ms in float, `int8_ms` in int8, more in s8s8."""

    def __init__(self, int8_ms: float = 0.4) -> None:
        self.int8_ms = int8_ms
        self.asked: list[str] = []

    def __call__(self, models: Mapping[str, StoredArtifact]) -> dict[str, float]:
        self.asked.extend(models)
        return {label: self._latency(model) for label, model in models.items()}

    def _latency(self, model: StoredArtifact) -> float:
        proto = onnx.load(str(model.entry))
        factor = 3.0 if model.record.metadata.get("scheme") == "s8s8" else 1.0
        made_by = {name: node.op_type for node in proto.graph.node for name in node.output}
        return sum(self.int8_ms * factor if made_by.get(node.input[1]) == "DequantizeLinear" else 1.0 for node in proto.graph.node if node.op_type in WEIGHTED)


_KEPT = tempfile.TemporaryDirectory(prefix="edgekd.tests.")


@functools.cache
def exported(kind: Callable[[], nn.Module]) -> StoredArtifact:
    """A net of this kind with spread logits, exported once."""
    return export(spread_logits(kind()), TRAIN, Path(tempfile.mkdtemp(dir=_KEPT.name)))


def run(
    kind: Callable[[], nn.Module],
    folder: Path,
    *,
    target: HostTarget | None = None,
    clock: Clock | None = None,
    options: QuantizeOptions | None = None,
    allowed_drop: float = 0.1,
) -> QuantizeResult:
    source = exported(kind)
    labels = ort_infer(source, VALIDATION)["output"].argmax(1)
    return quantize(
        source,
        target=target or HostTarget(),  # type: ignore[arg-type]
        calibration=calibration_set(TRAIN, split="train"),
        validation_inputs=VALIDATION,
        validation_targets=labels,
        task=Classification(),
        reference_scores=np.ones(len(labels)),
        options=options or QuantizeOptions(methods=("minmax", "percentile")),
        allowed_drop=allowed_drop,
        time_ms=clock or Clock(),
        folder=folder / "work",
        seed=0,
    )


def spread_logits(module: Any) -> Any:
    """Logits centred and spread, so that the four classes all occur."""
    with torch.no_grad():
        features = module.eval()(torch.from_numpy(VALIDATION["image"]))
        scale = 1.0 / features.std(0)
        module.head.weight.mul_(scale[:, None])
        module.head.bias.copy_((module.head.bias - features.mean(0)) * scale)
    return module


def test_a_sturdy_net_stays_int8_throughout(tmp_path: Path) -> None:
    clock = Clock()
    result = run(ConvNet, tmp_path, clock=clock)
    assert result.recipe.float_ops == ()
    assert result.recipe.scheme == "u8s8"
    assert result.scores.mean() >= 0.9
    assert clock.asked == ["float", "u8s8"]
    assert result.latency_ms < result.float_ms
    result.artifact.verify()


def test_exactly_the_fragile_layer_returns_to_float(tmp_path: Path) -> None:
    clock = Clock()
    result = run(FragileNet, tmp_path, clock=clock)
    assert result.recipe.float_ops == ("conv2/Conv",)
    assert clock.asked[-2:] == ["float", "mixed"]  # side by side
    assert result.scores.mean() >= 0.9
    plain = [row for row in result.tried if not row.float_ops]
    assert all(row.drop is not None and row.drop > 0.1 for row in plain)
    proto = onnx.load(str(result.artifact.entry))
    floats = [node.name for node in proto.graph.node if node.op_type in WEIGHTED and node.input[1] in {item.name for item in proto.graph.initializer}]
    assert floats == ["conv2/Conv"]
    assert result.latency_ms == pytest.approx(1.0 + 3 * 0.4)
    assert any("conv2/Conv in float" in note for note in result.notes)


def test_nothing_returns_to_float_when_the_drop_is_allowed(tmp_path: Path) -> None:
    assert run(FragileNet, tmp_path, allowed_drop=1.0).recipe.float_ops == ()


def test_each_scheme_is_timed_once_and_slow_ones_are_left(tmp_path: Path) -> None:
    clock = Clock()
    result = run(ConvNet, tmp_path, target=HostTarget(schemes=("s8s8", "u8s8")), clock=clock)
    assert clock.asked == ["float", "s8s8", "u8s8"]
    assert result.recipe.scheme == "u8s8"
    (left,) = [row for row in result.tried if row.scheme == "s8s8"]
    assert left.latency_ms == pytest.approx(4.8)
    assert left.accuracy is None
    assert "not faster" in left.reason


def test_int8_that_is_slower_is_reported_and_not_repaired(tmp_path: Path) -> None:
    result = run(FragileNet, tmp_path, clock=Clock(int8_ms=1.5))
    assert result.latency_ms > result.float_ms
    assert result.recipe.float_ops == ()
    assert any("faster than float" in note for note in result.notes)


def test_the_method_with_the_highest_accuracy_is_taken(tmp_path: Path) -> None:
    options = QuantizeOptions(methods=("percentile", "minmax", "entropy"), percentile=60.0)
    result = run(ConvNet, tmp_path, options=options)
    rows = {row.method: row.accuracy for row in result.tried}
    assert set(rows) == {"minmax", "percentile", "entropy"}
    assert rows["percentile"] is not None
    assert rows["minmax"] is not None
    assert rows["percentile"] < rows["minmax"]
    assert result.recipe.calibration.method != "percentile"


def test_two_runs_give_the_same_bytes_and_record(tmp_path: Path) -> None:
    first, second = (run(FragileNet, tmp_path / name) for name in ("a", "b"))
    assert first.artifact.record == second.artifact.record
    assert first.recipe == second.recipe
    assert first.tried == second.tried


def test_a_unet_with_a_dense_output_is_quantized_and_its_preparation_noted(tmp_path: Path) -> None:
    inputs = {"image": noise(12, 3, 16, 16)}
    source = export(UNet(), inputs, tmp_path / "float", batch="dynamic")
    outputs = ort_infer(source, inputs)["output"]
    result = quantize(
        source,
        target=HostTarget(schemes=("u8s8", "s8s8")),  # type: ignore[arg-type]
        calibration=calibration_set(inputs, split="train"),
        validation_inputs=inputs,
        validation_targets=outputs,
        task=Regression(),
        reference_scores=np.zeros(len(outputs)),
        options=QuantizeOptions(methods=("minmax",)),
        allowed_drop=0.05,
        time_ms=Clock(),
        folder=tmp_path / "work",
        seed=0,
    )
    assert output_error({"output": outputs}, exact_infer(result.artifact, inputs)) < 0.01
    assert any("no-symbolic" in note for note in result.notes)


def test_targets_that_cannot_calibrate_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="int8 scheme"):
        run(ConvNet, tmp_path / "a", target=HostTarget(schemes=()))
    with pytest.raises(UnsupportedModel, match="inside the model"):
        run(ConvNet, tmp_path / "b", target=HostTarget(taps=False))


class DeepFragile(nn.Module):
    """Eight convolutions, the sixth of which int8 destroys."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convs = nn.ModuleList(nn.Conv2d(3 if index == 0 else 6, 6, 1) for index in range(8))
        with torch.no_grad():
            for name, value in self.named_parameters():
                value.copy_(torch.randn_like(value) * (0.6 if name.endswith("weight") else 0.1))
            self.get_parameter("convs.4.weight")[0] = 0
            self.get_parameter("convs.4.bias")[0] = 0
            self.get_parameter("convs.5.weight")[:, 0] = 1000.0

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = image
        for conv in self.convs:
            x = torch.relu(conv(x))
        return x


def test_many_operators_are_probed_in_blocks_first(tmp_path: Path) -> None:
    target = HostTarget()
    source = export(DeepFragile(), TRAIN, tmp_path / "float")
    workshop = Workshop(
        source,
        prepare=load("converters", "prepare-onnx")(),
        converter=load("converters", "qdq-from-onnx")(),
        infer=target.runtime.infer,
        calibration=calibration_set(TRAIN, split="train"),
        options=QuantizeOptions(),
        folder=tmp_path / "work",
    )
    assert len(workshop.ops) == 8
    probe = {"image": VALIDATION["image"][:8]}
    chosen = [op.name for op in suspects(workshop, "u8s8", "minmax", probe, limit=6)]
    assert "convs.5/Conv" in chosen
    assert len(chosen) < 8
    ranked = measure_sensitivity(workshop, "u8s8", "minmax", probe, kept=(), time_ms=Clock())
    assert ranked[0].op.name == "convs.5/Conv"
    assert ranked[0].cost_ms == pytest.approx(0.6)


def test_a_target_made_by_connect_quantizes_on_its_own_runtime(tmp_path: Path) -> None:
    source = exported(FragileNet)
    with connect("null") as target:
        reference = target.runtime.infer(source, VALIDATION)["output"]
        result = quantize(
            source,
            target=target,
            calibration=calibration_set(TRAIN, split="train"),
            validation_inputs=VALIDATION,
            validation_targets=reference.argmax(1),
            task=Classification(),
            reference_scores=np.ones(len(reference)),
            options=QuantizeOptions(methods=("minmax",)),
            allowed_drop=0.1,
            time_ms=Clock(),
            folder=tmp_path / "work",
            seed=0,
        )
        assert result.recipe.float_ops == ("conv2/Conv",)
        assert target.runtime.supports(result.artifact).supported


def test_output_error_is_relative_to_the_variance() -> None:
    reference = {"y": noise(100, 4)}
    assert output_error(reference, reference) == 0
    assert output_error(reference, {"y": np.zeros((100, 4))}) == pytest.approx(1.0, rel=0.05)
    assert output_error(reference, {"y": np.full((100, 4), np.nan)}) == float("inf")
