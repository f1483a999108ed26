"""Fake-quant modules: rounding as int8 does it, gradients, folding, the two roads from a trained network to an int8 ONNX file."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from edgekd.artifact import StoredArtifact
from edgekd.contracts import ConvertRequest
from edgekd.errors import ConfigError, DataError, ModelError
from edgekd.quantize import SCHEMES, make_recipe
from edgekd.quantize.calibrate import calibration_set
from edgekd.quantize.qat import FakeQuantize, LearnedRanges, Phase, QatModule, QuantWeighted, learned_ranges, prepare_qat
from edgekd.quantize.recipes import Scheme
from edgekd.records import Precision
from edgekd.registry import load
from tests.contracts.litert_nets import Recurrent, Residual, images, sequences
from tests.contracts.tiny_models import ConvNet, TwoInputs, UNet, exact_infer, export, noise, ort_infer, prepare

pytestmark = pytest.mark.torch

IMAGE = {"image": noise(8, 3, 8, 8)}
TRAINABLE = [name for name in SCHEMES if name != "dynamic_int8"]


def by_hand(values: torch.Tensor, low: float, high: float, scheme: Scheme) -> torch.Tensor:
    """8 bits in numpy's double precision, written out."""
    x = values.double().numpy()
    if scheme.symmetric_activations:
        step = max(-low, high) / 127
        return torch.from_numpy(np.clip(np.rint(x / step), -128, 127) * step)
    step = (high - low) / 255
    zero = np.rint(-low / step)
    return torch.from_numpy((np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step)


def outputs(module: nn.Module, inputs: dict[str, np.ndarray]) -> torch.Tensor:
    with torch.no_grad():
        made: torch.Tensor = module(*[torch.from_numpy(array) for array in inputs.values()])
    return made


@pytest.mark.parametrize("phase", [Phase.OBSERVE, Phase.LEARN, Phase.FREEZE])
@pytest.mark.parametrize("scheme", TRAINABLE)
def test_activations_are_rounded_as_8_bits_are(scheme: str, phase: Phase) -> None:
    torch.manual_seed(0)
    point = FakeQuantize(SCHEMES[scheme]).eval()
    point.set_range(-0.75, 1.5)
    point.set_phase(phase)
    values = torch.randn(500, 4)
    expected = by_hand(values, -0.75, 1.5, SCHEMES[scheme])
    low, high = point.ends()
    away = (point(values).detach() - expected).abs()
    assert float(away.max()) < 1.02 * (high - low) / 254
    assert float((away > 1e-5).float().mean()) < 0.01  # a value on the border of two steps may fall to either side
    assert point(torch.zeros(1, 1)).item() == 0.0


@pytest.mark.parametrize("scheme", TRAINABLE)
def test_ranges_that_are_given_come_back_and_hold_zero(scheme: str) -> None:
    point = FakeQuantize(SCHEMES[scheme])
    symmetric = SCHEMES[scheme].symmetric_activations
    for low, high in ((-1.0, 3.0), (0.0, 2.0), (0.5, 2.0), (-2.0, -1.0), (0.0, 0.0)):
        point.set_range(low, high)
        found = point.ends()
        wanted = (min(low, 0.0), max(high, 0.0)) if low < high else (0.0, 1.0)
        bound = max(-wanted[0], wanted[1])
        assert found == pytest.approx((-bound, bound) if symmetric else wanted, abs=(wanted[1] - wanted[0]) / 255)
    for low, high in ((1.0, 0.0), (0.0, float("nan")), (float("-inf"), 1.0)):
        with pytest.raises(ConfigError, match="finite ends"):
            point.set_range(low, high)


def test_the_gradient_of_the_step_is_that_of_lsq() -> None:
    point = FakeQuantize(SCHEMES["s8s8"]).train()
    point.set_range(-2.0, 2.0)
    point.set_phase(Phase.LEARN)
    values = torch.tensor([[0.4, -1.3, 2.6, -9.0]], requires_grad=True)
    point(values).sum().backward()
    step = 2.0 / 127
    places = values.detach() / step
    inner = (places.round() - places) * (places.abs() <= 127)
    outer = 127.0 * (places > 127) - 128.0 * (places < -128)
    wanted = float((inner + outer).sum()) * step / (4 * 127) ** 0.5  # by the logarithm: the step times LSQ's gradient
    assert point.log_high.grad is not None
    assert float(point.log_high.grad) == pytest.approx(wanted, rel=1e-4)
    assert values.grad is not None
    assert values.grad.tolist() == [[1.0, 1.0, 0.0, 0.0]]


def test_both_ends_are_trained_and_an_end_at_zero_stays() -> None:
    torch.manual_seed(0)
    values = torch.randn(256, 8) * 0.5
    for low, high in ((-4.0, 4.0), (0.0, 4.0)):
        point = FakeQuantize(SCHEMES["u8s8"]).train()
        point.set_range(low, high)
        point.set_phase(Phase.LEARN)
        seen = values.clamp_min(0) if low == 0 else values
        optimizer = torch.optim.Adam(point.parameters(), 0.05)
        before = float(((point(seen).detach() - seen) ** 2).mean())
        for _ in range(60):
            optimizer.zero_grad()
            ((point(seen) - seen) ** 2).mean().backward()
            optimizer.step()
        assert float(((point(seen).detach() - seen) ** 2).mean()) < 0.5 * before
        assert point.ends()[1] < 3.0
        assert point.ends()[0] == 0.0 if low == 0 else point.ends()[0] > -3.0


def test_warm_up_follows_the_batches_and_evaluation_does_not() -> None:
    point = FakeQuantize(SCHEMES["u8s8"])
    point.set_range(0.0, 1.0)
    point.eval()(torch.full((1, 3), 5.0))
    assert point.ends()[1] == pytest.approx(1.0)
    point.train()(torch.full((1, 3), 5.0))
    assert point.ends()[1] == pytest.approx(0.9 * 1.0 + 0.1 * 5.0)


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 5, 3), nn.Conv1d(3, 5, 3), nn.Linear(4, 5), nn.ConvTranspose2d(3, 5, 2, stride=2)])
@pytest.mark.parametrize("scheme", ["s8s8", "u8s8_reduced"])
def test_weights_are_rounded_per_output_channel_in_every_phase(layer: nn.Module, scheme: str) -> None:
    wrapped = QuantWeighted(layer, SCHEMES[scheme])
    axis, bound = (1 if isinstance(layer, nn.ConvTranspose2d) else 0), 64 if scheme == "u8s8_reduced" else 127
    weight = np.moveaxis(wrapped.weight.detach().numpy().astype(np.float64), axis, 0)
    scale = np.abs(weight).reshape(5, -1).max(1).reshape(-1, *[1] * (weight.ndim - 1)) / bound
    expected = np.moveaxis(np.rint(weight / scale) * scale, 0, axis)
    for phase in (Phase.OBSERVE, Phase.LEARN, Phase.FREEZE):
        wrapped.set_phase(phase)
        np.testing.assert_allclose(wrapped.rounded().detach().numpy(), expected, atol=1e-6)
    wrapped.set_phase(Phase.OFF)
    values = torch.randn(2, 4) if isinstance(layer, nn.Linear) else torch.randn(2, 3, *[8] * (weight.ndim - 2))
    torch.testing.assert_close(wrapped(values), layer(values))


@pytest.mark.parametrize(("kind", "inputs"), [(ConvNet, IMAGE), (Residual, images(4)), (UNet, {"image": noise(4, 3, 16, 16)})])
def test_without_rounding_the_folded_copy_is_the_network(kind: type[nn.Module], inputs: dict[str, np.ndarray]) -> None:
    module = kind().eval()
    prepared = prepare_qat(module, "u8s8", inputs)
    assert prepared.report.traced, prepared.report.reason
    torch.testing.assert_close(outputs(prepared.without_rounding(), inputs), outputs(module, inputs), rtol=1e-4, atol=1e-5)
    assert not any(isinstance(one, nn.BatchNorm2d) for one in prepared.modules())
    assert any(isinstance(one, nn.BatchNorm2d) for one in module.modules()) == bool(prepared.report.folded)  # the caller's own is as it was


def test_residual_adds_and_concatenations_are_placed_by_the_scheme() -> None:
    points = {scheme: set(prepare_qat(Residual(), scheme, images(4)).report.points) for scheme in TRAINABLE}
    assert {"image", "relu", "relu_1", "skip", "mean", "head"} <= points["u8s8"]
    assert points["u8s8"] == points["u8s8_reduced"] == points["static_int8"]
    assert points["s8s8"] - points["u8s8"] == {"add", "add_1", "first_0", "second_0", "stem_0"}  # a symmetric range keeps the ReLU apart
    assert len(points["s8s8_tensorrt"]) == 7
    assert not {"first_3", "second_3", "head"} & points["s8s8_tensorrt"]
    assert "skip" in points["s8s8_tensorrt"]
    unet = {scheme: prepare_qat(UNet(), scheme, {"image": noise(4, 3, 16, 16)}) for scheme in ("u8s8", "static_int8")}
    shared = set(unet["u8s8"].report.points) - set(unet["static_int8"].report.points)
    assert shared == {"interpolate", "up"}  # what only a concatenation reads has its range


def test_what_is_not_quantized_is_named() -> None:
    report = prepare_qat(Recurrent(), "u8s8", sequences(4)).report
    assert report.left_in_float == {"lstm": "LSTM", "gru": "GRU"}
    assert report.weighted == ("head",)


class Branching(nn.Module):
    """A network whose path depends on values: torch.fx cannot trace it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1))
        self.scale = nn.PReLU()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.scale(self.body(image))
        return made if made.mean() < 100 else made * 2


def test_attention_in_a_network_without_a_trace_stays_in_float_and_is_named() -> None:
    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mixed = self.attention(x, x, x, need_weights=False)[0] if float(x.sum()) > -1e9 else x
            return self.head(mixed.mean(1))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    inputs = {"x": np.random.default_rng(0).standard_normal((4, 6, 8)).astype(np.float32)}
    prepared = prepare_qat(Untraceable(), "u8s8", inputs)
    assert "attention.out_proj" in prepared.report.left_in_float
    assert [name.split(".")[0] for name in prepared.report.weighted] == ["head"]
    assert prepared(torch.from_numpy(inputs["x"])).shape == (4, 3)


def test_a_network_without_a_trace_is_covered_by_its_modules_and_says_so() -> None:
    module = Branching().eval()
    prepared = prepare_qat(module, "u8s8", IMAGE)
    assert not prepared.report.traced
    assert "torch.fx cannot trace" in prepared.report.reason
    assert prepared.report.folded == ("body.0",)
    assert prepared.report.weighted == ("body.0.layer", "body.3.layer")
    assert prepared.report.left_in_float == {"scale": "PReLU"}
    torch.testing.assert_close(outputs(prepared.without_rounding(), IMAGE), outputs(module, IMAGE), rtol=1e-4, atol=1e-5)
    assert 0 < float((outputs(prepared, IMAGE) - outputs(module, IMAGE)).abs().max()) < 0.05


def test_several_inputs_and_nested_outputs_keep_their_form() -> None:
    inputs = {"image": noise(8, 3, 8, 8), "extra": noise(8, 5)}
    made = prepare_qat(TwoInputs(), "s8s8", inputs)(*[torch.from_numpy(array) for array in inputs.values()])
    assert made["cls"]["logits"].shape == (8, 3)
    assert [tuple(part.shape) for part in made["parts"]] == [(8, 8), (8, 1)]


def test_a_trained_state_is_saved_and_loaded(tmp_path: Path) -> None:
    first = prepare_qat(Residual(), "u8s8", images(4)).train().learn()
    optimizer = torch.optim.SGD(first.parameters(), 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        first(torch.from_numpy(images(4)["image"])).square().sum().backward()
        optimizer.step()
    first.eval().freeze()
    save_file(first.state_dict(), tmp_path / "state.safetensors")
    second = prepare_qat(Residual(), "u8s8", images(4, seed=3))
    assert second.ranges() != first.ranges()
    second.load_state_dict(load_file(tmp_path / "state.safetensors"), strict=True)
    second.freeze()
    assert second.ranges() == first.ranges()
    torch.testing.assert_close(outputs(second, images(4)), outputs(first, images(4)), rtol=0, atol=0)


def optimized(artifact: StoredArtifact, folder: Path) -> Counter[str]:
    """The operators that ONNX Runtime runs."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimized.onnx"), 4
    ort.InferenceSession(str(artifact.entry), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(str(folder / "optimized.onnx")).graph.node)


@pytest.mark.parametrize(("kind", "inputs", "convolutions"), [(ConvNet, IMAGE, 3), (Residual, images(8), 6)])
def test_the_frozen_network_is_exported_as_pairs_that_onnx_runtime_fuses(kind: Any, inputs: dict[str, np.ndarray], convolutions: int, tmp_path: Path) -> None:
    prepared = prepare_qat(kind().eval(), "u8s8_reduced", inputs).freeze()
    made = export(prepared, inputs, tmp_path)
    assert made.record.precision is Precision.INT8
    kinds = Counter(node.op_type for node in onnx.load(str(made.entry)).graph.node)
    assert kinds["QuantizeLinear"] == kinds["DequantizeLinear"] > convolutions
    ran = optimized(made, tmp_path)
    assert ran["QLinearConv"] == convolutions
    assert ran["Conv"] == ran["FusedConv"] == 0
    low, high = prepared.ranges()["head"]
    assert np.abs(ort_infer(made, inputs)["output"] - outputs(prepared, inputs).numpy()).max() <= 1.01 * (high - low) / 255


@pytest.mark.parametrize("scheme", TRAINABLE)
def test_every_scheme_exports_what_it_computes(scheme: str, tmp_path: Path) -> None:
    prepared = prepare_qat(Residual().eval(), scheme, images(8)).freeze()
    made = export(prepared, images(8), tmp_path)
    expected = outputs(prepared, images(8)).numpy()
    step = max(abs(end) for end in prepared.ranges().get("head", (0.0, float(np.abs(expected).max())))) / 100
    assert np.abs(exact_infer(made, images(8))["output"] - expected).max() <= step


def to_int8(prepared: QatModule, inputs: dict[str, np.ndarray], folder: Path, scheme: str) -> tuple[StoredArtifact, LearnedRanges]:
    """The trained network by the other road: a float file, quantized with the learned ranges."""
    source = prepare(export(prepared.without_rounding(), inputs, folder / "float"), inputs, folder / "prepared")
    learned = learned_ranges(prepared, source, ort_infer, inputs)
    calibration = calibration_set(inputs, split="train")
    (folder / "int8").mkdir()
    asked = ConvertRequest(
        source=source,
        folder=folder / "int8",
        iospec=source.record.iospec,
        example=inputs,
        recipe=make_recipe(scheme, "minmax", calibration),
        calibration=calibration,
        ranges=learned.ranges,
    )
    made: StoredArtifact = load("converters", "qdq-from-onnx")().convert(asked)
    return made, learned


def test_learned_ranges_reach_the_file_that_the_quantizer_makes(tmp_path: Path) -> None:
    inputs = images(8)
    prepared = prepare_qat(Residual().eval(), "u8s8_reduced", inputs, ranges={"relu": (0.0, 0.77), "head": (-1.5, 1.05)})
    made, learned = to_int8(prepared, inputs, tmp_path, "u8s8_reduced")
    assert set(learned.learned.values()) == set(prepared.report.points)
    proto = onnx.load(str(made.entry))
    arrays = {item.name: onnx.numpy_helper.to_array(item) for item in proto.graph.initializer}
    steps = {float(arrays[node.input[1]]) for node in proto.graph.node if node.op_type == "QuantizeLinear" and arrays[node.input[1]].ndim == 0}
    for name in ("relu", "head"):
        low, high = prepared.ranges()[name]
        assert min(abs(step - (high - low) / 255) for step in steps) < 1e-7
    stored = {name.removesuffix("_quantized"): array for name, array in arrays.items() if array.dtype == np.int8 and array.ndim == 4}
    weights = [array * arrays[f"{name}_scale"].reshape(-1, 1, 1, 1) for name, array in stored.items()]
    rounded = [one.rounded().detach().numpy() for one in prepared.modules() if isinstance(one, QuantWeighted) and one.weight.ndim == 4]
    assert len(weights) == len(rounded) == 6
    for weight in weights:  # the same integers by both roads
        assert any(weight.shape == one.shape and np.allclose(weight, one, atol=1e-6) for one in rounded)
    expected = outputs(prepared.freeze(), inputs).numpy()
    low, high = prepared.ranges()["head"]
    assert np.abs(ort_infer(made, inputs)["output"] - expected).max() <= 2.01 * (high - low) / 255


def test_what_cannot_be_prepared_is_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at run time"):
        prepare_qat(ConvNet(), "dynamic_int8", IMAGE)
    with pytest.raises(ConfigError, match="u8s8"):
        prepare_qat(ConvNet(), "u8s9", IMAGE)
    with pytest.raises(ConfigError, match="conv1"):
        prepare_qat(ConvNet(), "s8s8", IMAGE, ranges={"convl": (0.0, 1.0)})
    with pytest.raises(DataError, match="example"):
        prepare_qat(ConvNet(), "u8s8", {})
    with pytest.raises(ModelError, match="order and shapes"):
        prepare_qat(ConvNet(), "u8s8", {"image": noise(2, 5, 8, 8)})
    with pytest.raises(ModelError, match="Linear"):
        prepare_qat(nn.Sequential(nn.ReLU()), "u8s8", IMAGE)
    prepared = prepare_qat(ConvNet(), "u8s8", IMAGE)
    with pytest.raises(ModelError, match="prepare-onnx"):
        learned_ranges(prepared, export(prepared.without_rounding(), IMAGE, tmp_path / "float"), ort_infer, IMAGE)
    other = prepare(export(ConvNet(seed=9), IMAGE, tmp_path / "other"), IMAGE, tmp_path / "prepared")
    found = learned_ranges(prepared, other, ort_infer, IMAGE)
    assert set(found.learned.values()) == {"image"}


def test_the_core_stays_without_torch() -> None:
    code = "import sys, edgekd, edgekd.quantize; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"
