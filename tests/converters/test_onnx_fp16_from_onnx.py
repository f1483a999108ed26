"""float16 ONNX: what stays in float32 and why, overflow that is pinned or named, parity, borders, reproducible bytes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from edgekd.artifact import StoredArtifact
from edgekd.contracts import ConvertRequest
from edgekd.errors import ConfigError, ConversionRejected, DataError, ModelError
from edgekd.models.onnx_artifact import import_onnx
from edgekd.parity.compare import compare_hop
from edgekd.quantize.calibrate import calibration_set
from edgekd.records import Precision
from edgekd.registry import load
from edgekd.testing import ConverterContract
from tests.contracts.tiny_models import TwoInputs, UNet, changed, export, exported_convnet, noise, ort_infer

pytestmark = pytest.mark.torch

IMAGE = {"image": noise(8, 3, 8, 8)}


def request_for(source: StoredArtifact, inputs: Mapping[str, np.ndarray], folder: Path, **options: str | float | bool) -> ConvertRequest:
    return ConvertRequest(
        source=source, folder=folder, iospec=source.record.iospec, example=inputs, calibration=calibration_set(inputs, split="train"), options=options
    )


def halved(source: StoredArtifact, inputs: Mapping[str, np.ndarray], folder: Path, **options: str | float | bool) -> StoredArtifact:
    folder.mkdir(parents=True, exist_ok=True)
    return load("converters", "onnx-fp16-from-onnx")().convert(request_for(source, inputs, folder, **options))  # type: ignore[no-any-return]


def in_numpy(model: StoredArtifact, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """The first output by onnx's reference in numpy, which rounds every float16 result to float16."""
    with np.errstate(all="ignore"):
        answer: Any = ReferenceEvaluator(str(model.entry)).run(None, dict(inputs))
    return np.asarray(answer[0])


def pinned(made: StoredArtifact) -> dict[str, str]:
    return {name: reason for name, _, reason in json.loads(made.record.metadata["float_ops"])}


def types_of(made: StoredArtifact) -> set[int]:
    return {item.data_type for item in onnx.load(str(made.entry)).graph.initializer}


def built(folder: Path, nodes: list[onnx.NodeProto], constants: Mapping[str, np.ndarray], width: int = 8) -> StoredArtifact:
    """A graph from `x` `(1, width)` to `y`, written by hand."""
    shape = [1, width]
    graph = helper.make_graph(
        nodes,
        "built",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "source.onnx").write_bytes(model.SerializeToString())
    return import_onnx(folder / "source.onnx", folder / "in")


def norm_by_hand(folder: Path) -> StoredArtifact:
    """Linear, then a layer norm in single operators, then linear: at inputs around 400 the squares are beyond 65504, all else is not."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"], name="first"),
        helper.make_node("ReduceMean", ["h", "axes"], ["mean"], name="mean"),
        helper.make_node("Sub", ["h", "mean"], ["centred"], name="centre"),
        helper.make_node("Mul", ["centred", "centred"], ["squares"], name="square"),
        helper.make_node("ReduceMean", ["squares", "axes"], ["variance"], name="average"),
        helper.make_node("Add", ["variance", "epsilon"], ["shifted"], name="shift"),
        helper.make_node("Sqrt", ["shifted"], ["deviation"], name="root"),
        helper.make_node("Div", ["centred", "deviation"], ["normed"], name="divide"),
        helper.make_node("MatMul", ["normed", "w2"], ["y"], name="last"),
    ]
    weights = {"w1": np.eye(8, dtype=np.float32), "w2": noise(8, 8, seed=3)}
    return built(folder, nodes, weights | {"epsilon": np.array([1e-5], np.float32), "axes": np.array([1])})


LARGE = {"x": 400 * noise(16, 8, seed=1)}
SMALL = {"x": noise(16, 8, seed=1)}


class TestOnnxFp16FromOnnxContract(ConverterContract):
    converter_name = "onnx-fp16-from-onnx"

    def request(self, folder: Path) -> ConvertRequest:
        return request_for(exported_convnet(), IMAGE, folder)

    def unusable_source(self, folder: Path) -> object:
        return halved(exported_convnet(), IMAGE, folder.parent / "half")


def test_fp16_keeps_parity_and_float32_borders_at_half_the_size(tmp_path: Path) -> None:
    source = exported_convnet()
    made = halved(source, IMAGE, tmp_path / "half")
    assert made.record.precision is Precision.FP16
    assert types_of(made) <= {TensorProto.FLOAT16, TensorProto.INT64}
    onnx.checker.check_model(str(made.entry), full_check=True)
    assert {tensor.dtype for tensor in (*made.record.iospec.inputs, *made.record.iospec.outputs)} == {"float32"}
    assert made.record.size_bytes < 0.75 * source.record.size_bytes
    fresh = {"image": noise(16, 3, 8, 8, seed=9)}
    hop = compare_hop("onnx -> fp16", ort_infer(source, fresh), ort_infer(made, fresh), precision=Precision.FP16, depth=int(made.record.metadata["depth"]))
    assert hop.passed, hop.tensors
    assert hop.tensors[0].max_abs > 0
    assert pinned(made) == {}


@pytest.mark.parametrize(("module", "inputs"), [(UNet(), {"image": noise(4, 3, 16, 16)}), (TwoInputs(), {"image": noise(4, 3, 8, 8), "extra": noise(4, 5)})])
def test_fp16_keeps_parity_when_the_net_resizes_or_has_many_borders(module: nn.Module, inputs: dict[str, np.ndarray], tmp_path: Path) -> None:
    source = export(module, inputs, tmp_path / "float")
    made = halved(source, inputs, tmp_path / "half")
    assert [tensor.name for tensor in made.record.iospec.outputs] == [tensor.name for tensor in source.record.iospec.outputs]
    depth = int(made.record.metadata["depth"])
    hop = compare_hop("onnx -> fp16", ort_infer(source, inputs), ort_infer(made, inputs), precision=Precision.FP16, depth=depth)
    assert hop.passed, hop.tensors


def test_borders_are_float16_when_keep_io_is_false(tmp_path: Path) -> None:
    made = halved(exported_convnet(), IMAGE, tmp_path, keep_io=False)
    assert {tensor.dtype for tensor in (*made.record.iospec.inputs, *made.record.iospec.outputs)} == {"float16"}
    with pytest.raises(ConversionRejected, match="'x' cannot be float16"):
        halved(norm_by_hand(tmp_path / "norm"), {"x": 1e5 * noise(4, 8)}, tmp_path / "half", keep_io=False)


def test_squares_that_overflow_are_right_by_the_pins_and_wrong_without(tmp_path: Path) -> None:
    source = norm_by_hand(tmp_path)
    reference = ort_infer(source, LARGE)["y"]
    made = halved(source, LARGE, tmp_path / "half")
    assert {"square", "average", "shift", "root"} <= set(pinned(made)) <= {"square", "average", "shift", "root", "divide"}
    assert pinned(made)["square"] == "ReduceMean of squares"
    rows = np.concatenate([in_numpy(made, {"x": row[None]}) for row in LARGE["x"]])
    assert compare_hop("fp16", {"y": reference}, {"y": rows}, precision=Precision.FP16, depth=9).passed
    with pytest.raises(ConversionRejected) as raised:
        halved(source, LARGE, tmp_path / "bare", pins="none")
    assert raised.value.subject == "squares"
    wrong = halved(source, SMALL, tmp_path / "wrong", pins="none")
    rows = np.concatenate([in_numpy(wrong, {"x": row[None]}) for row in LARGE["x"]])
    hop = compare_hop("fp16", {"y": reference}, {"y": rows}, precision=Precision.FP16, depth=9)
    assert not hop.passed
    assert not list((tmp_path / "bare").iterdir())


def test_rules_hold_where_calibration_was_too_small_to_show_the_overflow(tmp_path: Path) -> None:
    source = norm_by_hand(tmp_path)
    made = halved(source, SMALL, tmp_path / "half")
    rows = np.concatenate([in_numpy(made, {"x": row[None]}) for row in LARGE["x"]])
    reference = ort_infer(source, LARGE)["y"]
    assert compare_hop("fp16", {"y": reference}, {"y": rows}, precision=Precision.FP16, depth=9).passed
    proto = onnx.load(str(made.entry))
    makers = {name: node for node in proto.graph.node for name in node.output}
    (average,) = [node for node in proto.graph.node if node.name == "average"]
    assert makers[average.input[0]].name == "square", "no cast may stand between two operators in float32"


def test_ranges_alone_pin_what_goes_too_far_or_becomes_zero(tmp_path: Path) -> None:
    made = halved(norm_by_hand(tmp_path), LARGE, tmp_path / "half", pins="ranges")
    reasons = pinned(made)
    assert reasons["square"].startswith("|squares| reaches ")
    assert reasons["average"].endswith("above 3.275e+04")
    assert not {"first", "last", "centre"} & set(reasons)
    tiny = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="linear"),
        helper.make_node("Mul", ["h", "small"], ["t"], name="shrink"),
        helper.make_node("Div", ["h", "t"], ["y"], name="divide"),
    ]
    source = built(tmp_path / "tiny", tiny, {"w": np.eye(8, dtype=np.float32), "small": np.array([1e-4], np.float32)})
    inputs = {"x": np.full((4, 8), 1e-4, np.float32)}
    made = halved(source, inputs, tmp_path / "tiny16", pins="ranges", float_ops="shrink")
    assert list(pinned(made)) == ["shrink", "divide"]
    assert pinned(made)["shrink"] == "asked for"
    assert pinned(made)["divide"] == "100.0% of the non-zero values of t become zero, the smallest is 1e-08"
    np.testing.assert_allclose(in_numpy(made, {"x": inputs["x"][:1]}), 1e4, rtol=2e-3)
    bare = halved(source, inputs, tmp_path / "bare16", pins="none")
    assert np.isinf(in_numpy(bare, {"x": inputs["x"][:1]})).all()


def test_exported_norm_and_softmax_stay_in_float32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4), nn.Softmax(-1))
    inputs = {"x": 1000 * noise(8, 8)}
    source = export(module, inputs, tmp_path / "float")
    made = halved(source, inputs, tmp_path / "half")
    kinds = {kind for _, kind, _ in json.loads(made.record.metadata["float_ops"])}
    assert {"LayerNormalization", "Softmax"} <= kinds
    assert TensorProto.FLOAT16 in types_of(made)
    hop = compare_hop("fp16", ort_infer(source, inputs), ort_infer(made, inputs), precision=Precision.FP16, depth=int(made.record.metadata["depth"]))
    assert hop.passed, hop.tensors


def test_weights_beyond_float16_are_refused_by_name_unless_their_node_stays_float32(tmp_path: Path) -> None:
    def edit(proto: onnx.ModelProto) -> None:
        for item in proto.graph.initializer:
            if item.name.endswith("conv2.weight"):
                array = numpy_helper.to_array(item).copy()
                array[0, 0, 0, 0] = 7e4
                item.CopyFrom(numpy_helper.from_array(array, item.name))

    source = changed(exported_convnet(), tmp_path / "planted", edit)
    (tmp_path / "half").mkdir()
    with pytest.raises(ConversionRejected, match=r"conv2\.weight") as raised:
        halved(source, IMAGE, tmp_path / "half", pins="rules")
    assert raised.value.subject == "model.conv2.weight"
    assert list((tmp_path / "half").iterdir()) == []
    made = halved(source, IMAGE, tmp_path / "half", float_ops="conv2/Conv")
    weights = {item.name: item.data_type for item in onnx.load(str(made.entry)).graph.initializer}
    assert weights["model.conv2.weight"] == TensorProto.FLOAT
    assert weights["model.conv1.weight"] == TensorProto.FLOAT16


def test_a_tensor_that_is_never_finite_is_the_models_fault(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], name="linear"), helper.make_node("Log", ["h"], ["y"], name="log")]
    source = built(tmp_path, nodes, {"w": -np.eye(8, dtype=np.float32)})
    with pytest.raises(DataError, match="'y' is not finite"):
        halved(source, {"x": np.ones((2, 8), np.float32)}, tmp_path / "half")


@pytest.mark.parametrize(
    ("options", "word"), [({"keepio": True}, "keep_io"), ({"max_share": 2.0}, "max_share"), ({"pins": "some"}, "pins"), ({"float_ops": "conv9"}, "conv9")]
)
def test_unusable_options_are_refused(options: dict[str, str | float | bool], word: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=word):
        halved(exported_convnet(), IMAGE, tmp_path / "half", **options)


def test_graphs_inside_nodes_and_other_sources_are_refused(tmp_path: Path) -> None:
    branch = helper.make_graph([helper.make_node("Neg", ["x"], ["b"])], "branch", [], [helper.make_tensor_value_info("b", TensorProto.FLOAT, [1, 8])])
    nodes = [helper.make_node("If", ["flag"], ["y"], name="choose", then_branch=branch, else_branch=branch)]
    source = built(tmp_path, nodes, {"flag": np.array(True)})
    with pytest.raises(ConversionRejected, match="graph of its own") as raised:
        halved(source, SMALL, tmp_path / "half")
    assert raised.value.subject == "choose"
    with pytest.raises(ModelError, match="ONNX artifact"):
        load("converters", "onnx-fp16-from-onnx")().convert(dataclasses.replace(request_for(source, SMALL, tmp_path), source="file"))
