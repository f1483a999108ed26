"""Preparation and QDQ quantization: schemes, U-Net-like graphs, dynamic batch, reproducible bytes, honest notes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from edgekd.artifact import StoredArtifact
from edgekd.contracts import ConvertRequest
from edgekd.errors import ConfigError, ConversionRejected, DataError
from edgekd.models.onnx_artifact import import_onnx
from edgekd.parity.compare import compare_hop
from edgekd.quantize import make_recipe
from edgekd.quantize.calibrate import calibration_set, observe
from edgekd.records import Precision
from edgekd.registry import load
from edgekd.storage import sha256_file
from edgekd.testing import ConverterContract
from tests.contracts.tiny_models import TwoInputs, UNet, exact_infer, export, exported_convnet, noise, ort_infer, prepare

pytestmark = pytest.mark.torch

IMAGE = {"image": noise(16, 3, 8, 8)}


def quantized(
    source: StoredArtifact, inputs: Mapping[str, np.ndarray], folder: Path, scheme: str = "u8s8", method: str = "minmax", float_ops: tuple[str, ...] = ()
) -> StoredArtifact:
    folder.mkdir(parents=True, exist_ok=True)
    return load("converters", "qdq-from-onnx")().convert(quantize_request(source, inputs, folder, scheme, method, float_ops))  # type: ignore[no-any-return]


def quantize_request(
    source: StoredArtifact, inputs: Mapping[str, np.ndarray], folder: Path, scheme: str = "u8s8", method: str = "minmax", float_ops: tuple[str, ...] = ()
) -> ConvertRequest:
    calibration = calibration_set(inputs, split="train")
    recipe = make_recipe(scheme, method, calibration, float_ops)
    return ConvertRequest(source=source, folder=folder, iospec=source.record.iospec, example=inputs, recipe=recipe, calibration=calibration, infer=ort_infer)


class TestPrepareOnnxContract(ConverterContract):
    converter_name = "prepare-onnx"

    def request(self, folder: Path) -> ConvertRequest:
        source = exported_convnet()
        return ConvertRequest(source=source, folder=folder, iospec=source.record.iospec, example=IMAGE)

    def unusable_source(self, folder: Path) -> object:
        return quantized(exported_convnet(), IMAGE, folder.parent / "int8")


class TestQdqFromOnnxContract(ConverterContract):
    converter_name = "qdq-from-onnx"

    def request(self, folder: Path) -> ConvertRequest:
        return quantize_request(exported_convnet(), IMAGE, folder)

    def unusable_source(self, folder: Path) -> object:
        return "not an artifact"


@pytest.mark.parametrize("scheme", ["u8s8", "s8s8", "u8s8_reduced"])
def test_int8_keeps_25_db_and_float_borders(scheme: str, tmp_path: Path) -> None:
    source = exported_convnet()
    made = quantized(source, IMAGE, tmp_path / scheme, scheme)
    assert made.record.precision is Precision.INT8
    assert made.record.metadata["scheme"] == scheme
    assert {tensor.dtype for tensor in (*made.record.iospec.inputs, *made.record.iospec.outputs)} == {"float32"}
    fresh = {"image": noise(16, 3, 8, 8, seed=9)}
    hop = compare_hop("onnx -> int8", ort_infer(source, fresh), exact_infer(made, fresh), precision=Precision.INT8, depth=int(made.record.metadata["depth"]))
    assert hop.passed, hop.tensors
    assert hop.tensors[0].sqnr_db > 25


def test_schemes_differ_in_what_they_say(tmp_path: Path) -> None:
    source = exported_convnet()
    zero_points: dict[str, set[int]] = {}
    weights: dict[str, np.ndarray] = {}
    for scheme in ("u8s8", "s8s8", "u8s8_reduced"):
        proto = onnx.load(str(quantized(source, IMAGE, tmp_path / scheme, scheme).entry))
        arrays = {item.name: onnx.numpy_helper.to_array(item) for item in proto.graph.initializer}
        activations = [node for node in proto.graph.node if node.op_type == "QuantizeLinear"]
        zero_points[scheme] = {int(arrays[node.input[2]]) for node in activations}
        assert {arrays[node.input[2]].dtype for node in activations} == {np.dtype(np.int8 if scheme == "s8s8" else np.uint8)}
        weights[scheme] = next(array for name, array in arrays.items() if "conv2.weight" in name and array.ndim == 4)
    assert zero_points["s8s8"] == {0}
    assert len(zero_points["u8s8"]) > 1
    assert np.abs(weights["u8s8"].astype(int)).max() == 127
    assert np.abs(weights["u8s8_reduced"].astype(int)).max() <= 64


def test_preparation_says_what_failed_when_the_graph_is_like_a_unet_of_dynamic_batch(tmp_path: Path) -> None:
    inputs = {"image": noise(8, 3, 16, 16)}
    before = set(Path.cwd().iterdir())
    source = export(UNet(), inputs, tmp_path / "float", batch="dynamic")
    made = quantized(source, inputs, tmp_path / "int8")
    assert made.record.metadata["prepared"] == "no-symbolic"
    assert "Incomplete symbolic shape inference" in made.record.metadata["prepared_reason"]
    assert set(Path.cwd().iterdir()) == before
    reference, outputs = ort_infer(source, inputs), exact_infer(made, inputs)
    assert compare_hop("onnx -> int8", reference, outputs, precision=Precision.INT8, depth=int(made.record.metadata["depth"])).passed
    static = quantized(export(UNet(), inputs, tmp_path / "static"), inputs, tmp_path / "static8")
    assert static.record.metadata["prepared"] == "symbolic"


def test_int8_runs_a_whole_batch_when_the_batch_is_dynamic(tmp_path: Path) -> None:
    import onnxruntime as ort

    made = quantized(exported_convnet("dynamic"), IMAGE, tmp_path / "int8")
    assert made.record.iospec.inputs[0].shape[0] == "batch"
    session = ort.InferenceSession(str(made.entry), providers=["CPUExecutionProvider"])
    (together,) = session.run(None, IMAGE)
    np.testing.assert_allclose(together, ort_infer(made, IMAGE)["output"], atol=1e-4)


def test_int8_of_two_inputs_keeps_every_output_name(tmp_path: Path) -> None:
    inputs = {"image": noise(8, 3, 8, 8), "extra": noise(8, 5, seed=1)}
    source = export(TwoInputs(), inputs, tmp_path / "float")
    made = quantized(source, inputs, tmp_path / "int8")
    assert [tensor.name for tensor in made.record.iospec.outputs] == ["cls.logits", "parts.0", "parts.1"]
    assert compare_hop("onnx -> int8", ort_infer(source, inputs), exact_infer(made, inputs), precision=Precision.INT8, depth=6).passed


def test_float_ops_stay_float_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    source = exported_convnet()
    made = quantized(source, IMAGE, tmp_path / "mixed", float_ops=("conv2/Conv",))
    proto = onnx.load(str(made.entry))
    inputs = {node.name: node.input[1] for node in proto.graph.node if node.op_type == "Conv"}
    assert inputs["conv2/Conv"] == "model.conv2.weight"
    assert inputs["conv1/Conv"].endswith("_DequantizeLinear_Output")
    with pytest.raises(ConfigError, match="conv2/Conv"):
        quantized(source, IMAGE, tmp_path / "wrong", float_ops=("conv2/Comv",))


@pytest.mark.parametrize("name", ["conv1/Conv", "conv2/Conv", "head/Gemm"])
def test_float_ops_are_computed_in_float_when_the_runtime_optimizes(name: str, tmp_path: Path) -> None:
    made = quantized(exported_convnet(), IMAGE, tmp_path, float_ops=(name,))
    proto = onnx.load(str(made.entry))
    (node,) = [node for node in proto.graph.node if node.name == name]
    arrays = {item.name: torch.from_numpy(onnx.numpy_helper.to_array(item).copy()) for item in proto.graph.initializer}
    weight, bias = arrays[node.input[1]], arrays[node.input[2]]
    taps = [tensor for tensor in (node.input[0], node.output[0]) if tensor not in ("image", "output")]
    seen = IMAGE | ort_infer(made, IMAGE, taps)
    given = torch.from_numpy(seen[node.input[0]])
    expected = nn.functional.linear(given, weight, bias) if "Gemm" in name else nn.functional.conv2d(given, weight, bias, padding=1)
    np.testing.assert_allclose(seen[node.output[0]], expected.numpy(), atol=1e-5)


def test_quantizing_is_refused_when_everything_stays_float(tmp_path: Path) -> None:
    source = prepare(exported_convnet(), IMAGE, tmp_path / "prepared")
    everything = tuple(node.name for node in onnx.load(str(source.entry)).graph.node)
    with pytest.raises(ConversionRejected, match="nothing in this model"):
        quantized(source, IMAGE, tmp_path / "int8", float_ops=everything)


def test_own_minmax_ranges_equal_those_of_onnxruntime(tmp_path: Path) -> None:
    from onnxruntime.quantization import CalibrationMethod, create_calibrator

    prepared = prepare(exported_convnet(), IMAGE, tmp_path / "prepared")
    sizes = json.loads(prepared.record.metadata["tensors"])

    class Reader:
        def __init__(self) -> None:
            self.left = iter(range(len(IMAGE["image"])))

        def get_next(self) -> dict[str, np.ndarray] | None:
            position = next(self.left, None)
            return None if position is None else {"image": IMAGE["image"][position : position + 1]}

    calibrator = create_calibrator(prepared.entry, None, str(tmp_path / "augmented.onnx"), calibrate_method=CalibrationMethod.MinMax)
    calibrator.collect_data(Reader())
    theirs = {name: tuple(float(np.ravel(bound)[0]) for bound in seen.range_value) for name, seen in calibrator.compute_data().items()}
    from edgekd.converters._onnx_io import host_infer  # type: ignore[import-not-found]

    ours = observe(host_infer, prepared, IMAGE, sizes).ranges("minmax")
    assert len(ours) > 5
    assert ours == {name: theirs[name] for name in ours}


def test_ranges_are_observed_within_the_memory_that_is_given(tmp_path: Path) -> None:
    convert = load("converters", "qdq-from-onnx")().convert
    blocks: list[int] = []

    def infer(model: StoredArtifact, inputs: Mapping[str, np.ndarray], taps: Sequence[str] = ()) -> dict[str, np.ndarray]:
        blocks.append(len(inputs["image"]))
        return ort_infer(model, inputs, taps)

    many = {"image": noise(512, 3, 8, 8)}
    request = dataclasses.replace(quantize_request(exported_convnet(), many, tmp_path), infer=infer)
    for memory_mb in (2, 512):
        convert(dataclasses.replace(request, options={"memory_mb": memory_mb}))
    convert(request)
    assert blocks[-2:] == [512, 512]
    assert max(blocks[:-2]) < 512
    assert sum(blocks[:-2]) >= 512
    with pytest.raises(ConfigError, match="memory_mb"):
        convert(dataclasses.replace(request, options={"memory": 1}))


def test_missing_ranges_are_named(tmp_path: Path) -> None:
    source = exported_convnet()
    request = dataclasses.replace(quantize_request(source, IMAGE, tmp_path), ranges={"image": (0.0, 1.0)})
    with pytest.raises(ConfigError, match="no activation range"):
        load("converters", "qdq-from-onnx")().convert(request)
    with pytest.raises(ConfigError, match="recipe"):
        load("converters", "qdq-from-onnx")().convert(dataclasses.replace(request, recipe=None))


_SCRIPT = """
import sys, numpy, pathlib
sys.modules["torch"] = None
from edgekd.contracts import ConvertRequest
from edgekd.models.onnx_artifact import import_onnx
from edgekd.quantize import make_recipe
from edgekd.quantize.calibrate import calibration_set
from edgekd.registry import load
source, folder = map(pathlib.Path, sys.argv[1:])
inputs = {"image": numpy.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype("float32")}
model = import_onnx(source, folder / "in")
calibration = calibration_set(inputs, split="train")
recipe = make_recipe("u8s8", "entropy", calibration)
request = ConvertRequest(source=model, folder=folder, iospec=model.record.iospec, example=inputs, recipe=recipe, calibration=calibration)
print(load("converters", "qdq-from-onnx")().convert(request).record.files["model.onnx"])
"""


def test_int8_has_the_same_bytes_in_another_process_and_needs_no_torch(tmp_path: Path) -> None:
    source = exported_convnet()
    said = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", _SCRIPT, str(source.entry), str(folder)],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            check=True,
        )
        said.append(done.stdout)
    assert said[0] == said[1]
    assert len(said[0].strip()) == 64


def test_old_operator_sets_are_raised_and_recorded(tmp_path: Path) -> None:
    weight = onnx.numpy_helper.from_array(noise(4, 3, 3, 3), "w")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1]), onnx.helper.make_node("Relu", ["y"], ["z"])],
        "old",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 3, 8, 8])],
        [onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, ["N", 4, 8, 8])],
        [weight],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 11)])
    model.ir_version = 6
    (tmp_path / "old.onnx").write_bytes(model.SerializeToString())
    imported = import_onnx(tmp_path / "old.onnx", tmp_path / "in")
    assert imported.record.iospec.inputs[0].shape == (1, 3, 8, 8)
    inputs = {"x": noise(4, 3, 8, 8)}
    made = quantized(imported, inputs, tmp_path / "int8")
    assert made.record.opset == 13
    assert made.record.metadata["upgraded_from_opset"] == "11"
    assert sha256_file(made.entry) == made.record.files["model.onnx"]


def test_calibration_on_the_host_tells_what_onnxruntime_says(tmp_path: Path) -> None:
    """Without a runtime of a target the ranges are observed here, and ONNX Runtime's own errors must not come out as they are."""
    request = dataclasses.replace(quantize_request(prepare(exported_convnet(), IMAGE, tmp_path / "p"), IMAGE, tmp_path), infer=None)
    wide = {"image": noise(16, 3, 8, 9)}
    with pytest.raises(ConversionRejected, match=r"does not run the model on this host; found: InvalidArgument: .*invalid dimensions for input: image"):
        load("converters", "qdq-from-onnx")().convert(dataclasses.replace(request, calibration=calibration_set(wide, split="train")))
    other = {"picture": IMAGE["image"]}
    with pytest.raises(DataError, match="the input 'image' is missing"):
        load("converters", "qdq-from-onnx")().convert(dataclasses.replace(request, calibration=calibration_set(other, split="train")))
    assert load("converters", "qdq-from-onnx")().convert(request).record.precision is Precision.INT8
