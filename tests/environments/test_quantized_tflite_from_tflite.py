"""Quantized TFLite: the merged calibration against the library's own, int8 throughout, single operators in float, borders as they were."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from edgekd.artifact import StoredArtifact, store_artifact
from edgekd.contracts import Array, ConvertRequest, Infer
from edgekd.errors import ConfigError, ConversionRejected, DataError, ModelError
from edgekd.models.tflite_file import TfliteGraph, load_model, read_graph
from edgekd.quantize import make_recipe
from edgekd.quantize.calibrate import calibration_set, observe
from edgekd.records import Format, Precision
from edgekd.registry import load
from edgekd.testing import ConverterContract
from tests.contracts.litert_nets import Borders, Recurrent, Residual, SqueezeExcite, Transformer, convert, images, native, sequences, sqnr_db
from tests.contracts.tiny_models import ConvNet, noise

pytestmark = [pytest.mark.torch, pytest.mark.environments]

_litert: Any = importlib.import_module("edgekd.converters._litert")
quantized_tflite_from_tflite: Any = importlib.import_module("edgekd.converters.quantized_tflite_from_tflite")

CALIBRATION, HELD_OUT = images(32), images(48, seed=9)


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory) -> StoredArtifact:
    return convert(Residual(), images(1), tmp_path_factory.mktemp("residual"))


def request(
    source: StoredArtifact,
    inputs: Mapping[str, Array],
    folder: Path,
    scheme: str = "static_int8",
    method: str = "minmax",
    float_ops: tuple[str, ...] = (),
    op_rules: dict[str, str] | None = None,
    infer: Infer | None = None,
) -> ConvertRequest:
    folder.mkdir(parents=True, exist_ok=True)
    calibration = calibration_set(inputs, split="train")
    recipe = msgspec.structs.replace(make_recipe(scheme, method, calibration, float_ops), op_rules=op_rules or {})
    return ConvertRequest(source=source, folder=folder, iospec=source.record.iospec, example=inputs, recipe=recipe, calibration=calibration, infer=infer)


def quantize(asked: ConvertRequest) -> StoredArtifact:
    made = load("converters", "quantized-tflite-from-tflite")().convert(asked)
    assert isinstance(made, StoredArtifact)
    return made


def graph_of(artifact: StoredArtifact) -> TfliteGraph:
    return read_graph(load_model(artifact.entry))


def types_of(artifact: StoredArtifact, kind: str) -> dict[str, set[str]]:
    """Types of activations and weights (not biases) per operator of a kind."""
    return {op.name: {op.inputs[0].dtype, op.inputs[1].dtype, op.outputs[0].dtype} for op in graph_of(artifact).ops if op.kind == kind}


def fidelity(source: StoredArtifact, made: StoredArtifact, inputs: Mapping[str, Array] = HELD_OUT) -> float:
    return sqnr_db(_litert.host_infer(source, inputs)["output"], _litert.host_infer(made, inputs)["output"])


class TestQuantizedTfliteContract(ConverterContract):
    converter_name = "quantized-tflite-from-tflite"

    @pytest.fixture(autouse=True)
    def _source(self, residual: StoredArtifact) -> None:
        self.residual = residual

    def request(self, folder: Path) -> ConvertRequest:
        return request(self.residual, images(4), folder)

    def unusable_source(self, folder: Path) -> object:
        return quantize(request(self.residual, images(2), folder.parent / "int8"))


class TestPrepareTfliteContract(ConverterContract):
    converter_name = "prepare-tflite"

    @pytest.fixture(autouse=True)
    def _source(self, residual: StoredArtifact) -> None:
        self.residual = residual

    def request(self, folder: Path) -> ConvertRequest:
        return ConvertRequest(source=self.residual, folder=folder, iospec=self.residual.record.iospec, example=images(1))

    def unusable_source(self, folder: Path) -> object:
        return "not an artifact"


def by_the_library(source: StoredArtifact, inputs: Mapping[str, Array], folder: Path) -> StoredArtifact:
    """Static int8 as the library makes it by itself: its calibration over all samples, which is a moving average."""
    from ai_edge_quantizer import quantizer, recipe

    with _litert.quiet():
        made = quantizer.Quantizer(str(source.entry), recipe.static_wi8_ai8())
        for border in ("INPUT", "OUTPUT"):
            made.update_quantization_recipe(".*", border, None, "no_quantize")
        samples = [{name: array[at : at + 1] for name, array in inputs.items()} for at in range(len(next(iter(inputs.values()))))]
        found = made.calibrate({"serving_default": samples}, num_threads=1)
        data = made.quantize(found, enable_progress_report=False).quantized_model
    folder.mkdir()
    (folder / "model.tflite").write_bytes(bytes(data))
    return store_artifact(folder, "model.tflite", format=Format.TFLITE, precision=Precision.INT8, iospec=source.record.iospec)


def test_merged_calibration_beats_the_librarys_moving_average(residual: StoredArtifact, tmp_path: Path) -> None:
    own = by_the_library(residual, CALIBRATION, tmp_path / "library")
    merged = quantize(request(residual, CALIBRATION, tmp_path / "merged"))
    assert merged.record.metadata["ranges"] == "calibrate"
    assert fidelity(residual, merged, CALIBRATION) > 35
    assert fidelity(residual, merged) > fidelity(residual, own) + 10


def test_static_int8_computes_every_operator_in_int8_and_keeps_the_borders(residual: StoredArtifact, tmp_path: Path) -> None:
    made = quantize(request(residual, CALIBRATION, tmp_path))
    convolutions = types_of(made, "CONV_2D")
    assert len(convolutions) == 6
    assert set(map(frozenset, convolutions.values())) == {frozenset({"int8"})}
    graph = graph_of(made)
    assert {tensor.dtype for tensor in (*graph.inputs.values(), *graph.outputs.values())} == {"float32"}
    weights = {op.name: op.inputs[1] for op in graph.ops if op.kind == "CONV_2D"}
    assert len(weights["second.0/CONV_2D"].scales) == 16
    assert set(weights["second.0/CONV_2D"].zero_points) == {0}
    assert made.record.precision is Precision.INT8
    assert made.record.metadata["left_in_float"] == "{}"
    assert [tensor.layout for tensor in made.record.iospec.inputs] == ["NCHW"]


def test_float_ops_leaves_exactly_that_operator_in_float(residual: StoredArtifact, tmp_path: Path) -> None:
    made = quantize(request(residual, CALIBRATION, tmp_path, float_ops=("first.0/CONV_2D",)))
    types = types_of(made, "CONV_2D")
    assert types.pop("first.0/CONV_2D") == {"float32"}
    assert set(map(frozenset, types.values())) == {frozenset({"int8"})}
    assert json.loads(made.record.metadata["left_in_float"]) == {"CONV_2D": 1}


def test_op_rules_give_kinds_a_scheme_of_their_own(residual: StoredArtifact, tmp_path: Path) -> None:
    made = quantize(request(residual, CALIBRATION, tmp_path, op_rules={"ADD": "float", "FULLY_CONNECTED": "dynamic_int8"}))
    assert set(map(frozenset, types_of(made, "ADD").values())) == {frozenset({"float32"})}
    assert types_of(made, "FULLY_CONNECTED") == {"output": {"float32", "int8"}}
    assert set(map(frozenset, types_of(made, "CONV_2D").values())) == {frozenset({"int8"})}


def test_observed_and_given_ranges_agree_with_the_merged_ones(residual: StoredArtifact, tmp_path: Path) -> None:
    sizes = json.loads(residual.record.metadata["tensors"])
    merged = quantize(request(residual, CALIBRATION, tmp_path / "merged"))
    observed = quantize(request(residual, CALIBRATION, tmp_path / "observed", infer=_litert.host_infer))
    ranges = observe(_litert.host_infer, residual, CALIBRATION, sizes).ranges("minmax")
    given = quantize(dataclasses.replace(request(residual, CALIBRATION, tmp_path / "given"), ranges=ranges, calibration=None))
    assert [made.record.metadata["ranges"] for made in (merged, observed, given)] == ["calibrate", "infer", "given"]
    scales = [{tensor.name: tensor.scales for tensor in graph_of(made).tensors if tensor.scales} for made in (merged, observed, given)]
    assert scales[1] == scales[2]
    for name, found in scales[0].items():
        np.testing.assert_allclose(found, scales[1][name], rtol=1e-4)


def test_given_ranges_decide_the_scales(residual: StoredArtifact, tmp_path: Path) -> None:
    ranges = dict.fromkeys(json.loads(residual.record.metadata["tensors"]), (-2.0, 3.1)) | {"stem.0/CONV_2D": (1.0, 2.55)}
    made = quantize(dataclasses.replace(request(residual, CALIBRATION, tmp_path), ranges=ranges))
    tensors = {tensor.name: tensor for tensor in graph_of(made).tensors}
    assert tensors["first.0/CONV_2D"].scales == pytest.approx((0.02,))
    assert tensors["stem.0/CONV_2D"].scales == pytest.approx((0.01,))
    assert tensors["stem.0/CONV_2D"].zero_points == (-128,)


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_other_calibration_methods_work(method: str, residual: StoredArtifact, tmp_path: Path) -> None:
    made = quantize(request(residual, CALIBRATION, tmp_path, method=method))
    assert made.record.metadata["ranges"] == "host"
    assert fidelity(residual, made, CALIBRATION) > 35


def test_dynamic_int8_and_fp16_need_no_calibration(residual: StoredArtifact, tmp_path: Path) -> None:
    def make(scheme: str) -> StoredArtifact:
        (tmp_path / scheme).mkdir()
        asked = ConvertRequest(source=residual, folder=tmp_path / scheme, iospec=residual.record.iospec, example=images(1), options={"scheme": scheme})
        return quantize(asked)

    dynamic, half = make("dynamic_int8"), make("fp16")
    assert set(map(frozenset, types_of(dynamic, "CONV_2D").values())) == {frozenset({"float32", "int8"})}
    assert fidelity(residual, dynamic) > 40
    assert dynamic.record.precision is Precision.INT8
    assert half.record.precision is Precision.FP16
    assert half.record.metadata["fp16_weights"] == "7"
    assert fidelity(residual, half) > 65


def test_a_file_whose_weights_the_quantizer_puts_outside_is_stored_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = {"x": noise(4, 512)}
    source = convert(torch.nn.Linear(512, 600), inputs, tmp_path / "float")
    made = quantize(request(source, inputs, tmp_path / "int8", scheme="dynamic_int8"))
    assert 600 * 512 < made.record.size_bytes < 1.1 * 600 * 512
    assert fidelity(source, made, inputs) > 35


@pytest.mark.parametrize(
    ("net", "inputs", "floor_db"), [(SqueezeExcite, images, 40), (Transformer, sequences, 28), (Recurrent, sequences, 18)], ids=["se", "transformer", "rnn"]
)
def test_other_nets_are_quantized_statically(net: type, inputs: object, floor_db: float, tmp_path: Path) -> None:
    assert callable(inputs)
    source = convert(net(), inputs(1), tmp_path / "float")
    made = quantize(request(source, inputs(16), tmp_path / "int8"))
    assert made.record.metadata["left_in_float"] == "{}"
    assert fidelity(source, made, inputs(32, seed=9)) > floor_db


def test_odd_outputs_keep_their_names_and_values(tmp_path: Path) -> None:
    inputs = {"image": noise(8, 3, 8, 8), "extra": noise(8, 5), "idle": noise(8, 2)}
    source = convert(Borders(), inputs, tmp_path / "float")
    made = quantize(request(source, inputs, tmp_path / "int8"))
    before, after = _litert.host_infer(source, inputs), _litert.host_infer(made, inputs)
    assert list(after) == list(before)
    np.testing.assert_array_equal(after["passed"], inputs["extra"])
    np.testing.assert_array_equal(after["constant"], before["constant"])
    np.testing.assert_array_equal(after["again"], after["parts.0"])
    assert sqnr_db(before["cls.logits"], after["cls.logits"]) > 30


def test_calibration_inputs_are_turned_to_the_layout_of_the_file(tmp_path: Path) -> None:
    inputs = {"image": noise(8, 3, 8, 8)}
    source = convert(ConvNet(), inputs, tmp_path / "float", channel_last=True)
    asked = request(source, inputs, tmp_path / "int8")
    made = quantize(dataclasses.replace(asked, iospec=native(ConvNet(), inputs)))
    assert made.record.iospec.inputs[0].layout == "NHWC"
    with pytest.raises(DataError, match="NCHW or NHWC"):
        quantize(asked)


def test_a_file_of_others_is_prepared_and_quantized(residual: StoredArtifact, tmp_path: Path) -> None:
    from edgekd.models.tflite_file import pack_model

    model = load_model(residual.entry)
    model.signatureDefs = None
    model.subgraphs[0].tensors[4].name = model.subgraphs[0].tensors[5].name
    (tmp_path / "model.tflite").write_bytes(pack_model(model))
    foreign = store_artifact(tmp_path, "model.tflite", format=Format.TFLITE, precision=Precision.FP32, iospec=residual.record.iospec)
    (tmp_path / "prepared").mkdir()
    prepared = load("converters", "prepare-tflite")().convert(
        ConvertRequest(source=foreign, folder=tmp_path / "prepared", iospec=foreign.record.iospec, example=images(1))
    )
    assert prepared.record.metadata["renamed_tensors"] == "1"
    assert prepared.record.parent == foreign.record.content_hash()
    for source, name in ((foreign, "a"), (prepared, "b")):
        made = quantize(request(source, CALIBRATION, tmp_path / name, method="percentile"))
        assert fidelity(prepared, made, CALIBRATION) > 35


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"scheme": "u8s8"}, ConfigError, "static_int8"),
        ({"float_ops": ("first.0/CONV",)}, ConfigError, r"first\.0/CONV_2D"),
        ({"op_rules": {"SOFTMAX": "float"}}, ConfigError, "lacks"),
        ({"op_rules": {"ADD": "int4"}}, ConfigError, "unknown"),
    ],
)
def test_what_the_recipe_gets_wrong_is_refused(change: dict[str, object], error: type[Exception], match: str, residual: StoredArtifact, tmp_path: Path) -> None:
    with pytest.raises(error, match=match):
        quantize(request(residual, images(2), tmp_path, **change))  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_missing_broken_and_superfluous_ranges_are_refused(residual: StoredArtifact, tmp_path: Path) -> None:
    asked = request(residual, images(2), tmp_path)
    names = json.loads(residual.record.metadata["tensors"])
    with pytest.raises(ConfigError, match=r"stem\.0/CONV_2D"):
        quantize(dataclasses.replace(asked, ranges={name: (0.0, 1.0) for name in names if name != "stem.0/CONV_2D"}))
    with pytest.raises(DataError, match="is none"):
        quantize(dataclasses.replace(asked, ranges=dict.fromkeys(names, (0.0, float("nan")))))
    with pytest.raises(ConfigError, match="ranges"):
        quantize(dataclasses.replace(asked, calibration=None))
    with pytest.raises(ConfigError, match="recipe"):
        quantize(dataclasses.replace(asked, recipe=None))
    with pytest.raises(ModelError, match="TFLite"):
        quantize(dataclasses.replace(asked, source=None))


def test_nothing_to_quantize_is_told(residual: StoredArtifact, tmp_path: Path) -> None:
    kinds = {op.kind for op in graph_of(residual).ops}
    with pytest.raises(ConversionRejected, match="nothing in this model"):
        quantize(request(residual, images(2), tmp_path, op_rules=dict.fromkeys(kinds, "float")))


def test_the_rules_escape_names_for_the_librarys_patterns(residual: StoredArtifact) -> None:
    calibration = calibration_set(images(2), split="train")
    recipe = make_recipe("static_int8", "minmax", calibration, ("first.0/CONV_2D",))
    rules = quantized_tflite_from_tflite._rules(graph_of(residual), "static_int8", recipe)
    assert rules[1]["regex"] == r"^first\.0/CONV_2D;$"


def test_a_tensor_that_is_always_zero_gets_a_range_that_the_delegate_runs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dead = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.ReLU(), torch.nn.Conv2d(4, 5, 1))
    with torch.no_grad():
        dead[0].bias.fill_(-100.0)  # type: ignore[operator]
    made = quantize(request(convert(dead, images(1), tmp_path / "float"), CALIBRATION, tmp_path / "int8"))
    with torch.no_grad():
        expected = dead(torch.from_numpy(HELD_OUT["image"])).numpy()
    assert sqnr_db(expected, _litert.host_infer(made, HELD_OUT)["output"]) > 20.0


class Joined(torch.nn.Module):
    """Two convolutions of other magnitudes side by side, and one behind them; the first is read by another one too where `again`."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.small, self.large = torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(3, 4, 1)
        self.last, self.other = torch.nn.Conv2d(8, 4, 1), torch.nn.Conv2d(4, 4, 1)
        self.again = again
        with torch.no_grad():
            self.large.weight.mul_(8.0)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """A map of four channels."""
        small = self.small(image)
        joined: torch.Tensor = self.last(torch.cat([small, self.large(image)], 1))
        return joined + self.other(small) if self.again else joined


@pytest.mark.parametrize(("again", "requantized"), [(False, 0), (True, 1)])
def test_what_is_concatenated_has_the_scale_of_the_result_unless_others_read_it(tmp_path: Path, again: bool, requantized: int) -> None:
    module = Joined(again).eval()
    made = quantize(request(convert(module, images(1), tmp_path / "float"), CALIBRATION, tmp_path / "int8"))
    assert json.loads(made.record.metadata["op_counts"])["QUANTIZE"] == 1 + requantized
    with torch.no_grad():
        expected = module(torch.from_numpy(HELD_OUT["image"])).numpy()
    assert sqnr_db(expected, _litert.host_infer(made, HELD_OUT)["output"]) > 20.0
