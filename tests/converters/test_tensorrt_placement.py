"""Q/DQ pairs where TensorRT wants them: residual, concatenating and depthwise nets; structure and onnxruntime's numbers, no TensorRT."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from edgekd.artifact import StoredArtifact
from edgekd.contracts import ConvertRequest
from edgekd.errors import ConfigError, ConversionRejected
from edgekd.parity.compare import compare_hop
from edgekd.quantize import make_recipe
from edgekd.quantize.calibrate import calibration_set
from edgekd.records import Precision
from edgekd.registry import load
from edgekd.testing import ConverterContract
from tests.contracts.tiny_models import UNet, export, exported_convnet, noise, ort_infer

pytestmark = pytest.mark.torch

SCHEME = "s8s8_tensorrt"
IMAGE = {"image": noise(16, 3, 8, 8)}


class Residual(nn.Module):
    """Two basic blocks, the second with a convolution on its skip connection, as in ResNet."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a1, self.a2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.b1, self.b2 = nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.skip = nn.Conv2d(8, 16, 1, stride=2)
        self.head = nn.Linear(16, 4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(image))
        x = torch.relu(self.a2(torch.relu(self.a1(x))) + x)
        x = torch.relu(self.b2(torch.relu(self.b1(x))) + self.skip(x))
        logits: torch.Tensor = self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


class Depthwise(nn.Module):
    """An inverted bottleneck with a depthwise convolution and a linear skip connection, as in MobileNetV2."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.expand, self.depth, self.project = nn.Conv2d(8, 24, 1), nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.Conv2d(24, 8, 1)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = nn.functional.relu6(self.stem(image))
        y = self.project(nn.functional.relu6(self.depth(nn.functional.relu6(self.expand(x)))))
        features = x + y
        return features, self.last(features)


_KEPT = tempfile.TemporaryDirectory(prefix="edgekd.tests.")


_NETS: dict[str, type[nn.Module]] = {"residual": Residual, "depthwise": Depthwise, "unet": UNet}


@functools.cache
def exported(kind: str, size: int = 8) -> StoredArtifact:
    """The net as ONNX, exported once per test process."""
    return export(_NETS[kind](), {"image": noise(4, 3, size, size)}, Path(_KEPT.name) / kind)


def request_for(source: StoredArtifact, inputs: Mapping[str, np.ndarray], folder: Path, float_ops: tuple[str, ...] = (), **recipe: Any) -> ConvertRequest:
    calibration = calibration_set(inputs, split="train")
    made = make_recipe(SCHEME, "minmax", calibration, float_ops)
    if recipe:
        import msgspec

        made = msgspec.structs.replace(made, **recipe)
    return ConvertRequest(source=source, folder=folder, iospec=source.record.iospec, example=inputs, recipe=made, calibration=calibration, infer=ort_infer)


def placed(source: StoredArtifact, inputs: Mapping[str, np.ndarray], folder: Path, float_ops: tuple[str, ...] = ()) -> StoredArtifact:
    folder.mkdir(parents=True, exist_ok=True)
    return load("converters", "qdq-from-onnx")().convert(request_for(source, inputs, folder, float_ops))  # type: ignore[no-any-return]


class Graph:
    """A quantized file as these tests ask about it."""

    def __init__(self, made: StoredArtifact) -> None:
        self.proto = onnx.load(str(made.entry))
        self.makers = {name: node for node in self.proto.graph.node for name in node.output}
        self.arrays = {item.name: numpy_helper.to_array(item) for item in self.proto.graph.initializer}

    def of(self, kind: str) -> list[onnx.NodeProto]:
        return [node for node in self.proto.graph.node if node.op_type == kind]

    def named(self, name: str) -> onnx.NodeProto:
        (node,) = [node for node in self.proto.graph.node if node.name == name]
        assert isinstance(node, onnx.NodeProto)
        return node

    def chain(self, tensor: str, length: int = 3) -> list[str]:
        """The operators before a tensor, nearest first, each by its first input."""
        found: list[str] = []
        while tensor in self.makers and len(found) < length:
            found.append(self.makers[tensor].op_type)
            tensor = self.makers[tensor].input[0]
        return found

    def scale(self, tensor: str) -> float:
        return float(self.arrays[self.makers[tensor].input[1]])


class TestPlacedQdqContract(ConverterContract):
    converter_name = "qdq-from-onnx"

    def request(self, folder: Path) -> ConvertRequest:
        return request_for(exported_convnet(), IMAGE, folder)

    def unusable_source(self, folder: Path) -> object:
        return "not an artifact"


@pytest.mark.parametrize(
    ("kind", "size", "weighted", "adds", "concats"),
    [("residual", 8, 7, 2, 0), ("depthwise", 8, 5, 1, 0), ("unet", 16, 6, 0, 2)],
)
def test_every_weighted_operator_has_both_inputs_in_int8(kind: str, size: int, weighted: int, adds: int, concats: int, tmp_path: Path) -> None:
    inputs = {"image": noise(16, 3, size, size)}
    source = exported(kind, size)
    made = placed(source, inputs, tmp_path / "int8")
    told = made.record.metadata
    assert [told[key] for key in ("weighted_ops", "quantized_ops", "float_weighted_ops")] == [str(weighted), str(weighted), ""]
    assert (told["residual_adds"], told["shared_scales"]) == (str(adds), str(concats))
    onnx.checker.check_model(str(made.entry), full_check=True)
    graph = Graph(made)
    zeros = [graph.arrays[node.input[2]] for node in (*graph.of("QuantizeLinear"), *graph.of("DequantizeLinear"))]
    assert {zero.dtype for zero in zeros} == {np.dtype(np.int8)}
    assert not np.concatenate([zero.reshape(-1) for zero in zeros]).any()
    coded = [array for name, array in graph.arrays.items() if array.dtype == np.int8 and array.ndim > 1]
    assert len(coded) == weighted
    assert all(np.abs(array.astype(int)).max() == 127 for array in coded)
    for node in (*graph.of("Conv"), *graph.of("ConvTranspose"), *graph.of("Gemm")):
        assert graph.arrays[node.input[2]].dtype == np.float32
        channels = graph.arrays[graph.makers[node.input[1]].input[1]]
        assert channels.shape == graph.arrays[node.input[2]].shape
    assert not {item.name for item in graph.proto.graph.output} & {name for node in graph.of("DequantizeLinear") for name in node.output}
    fresh = {"image": noise(16, 3, size, size, seed=9)}
    hop = compare_hop("onnx -> int8", ort_infer(source, fresh), ort_infer(made, fresh), precision=Precision.INT8, depth=int(told["depth"]))
    assert hop.passed, hop.tensors
    assert hop.tensors[0].sqnr_db > 25


def test_an_add_takes_its_convolution_in_float_and_the_other_branch_in_int8(tmp_path: Path) -> None:
    graph = Graph(placed(exported("residual"), IMAGE, tmp_path / "int8"))
    first, second = graph.of("Add")
    chains = [sorted(graph.chain(name) for name in node.input) for node in (first, second)]
    assert chains[0] == [["Conv", "DequantizeLinear", "QuantizeLinear"], ["DequantizeLinear", "QuantizeLinear", "Relu"]]
    assert chains[1] == [["Conv", "DequantizeLinear", "QuantizeLinear"], ["DequantizeLinear", "QuantizeLinear", "Conv"]]
    straight = next(graph.makers[name] for name in second.input if name in graph.makers and graph.makers[name].op_type == "Conv")
    assert straight.name.startswith("b2"), "the longer branch is computed with the Add"
    for node in graph.of("QuantizeLinear"):
        assert graph.chain(node.input[0])[:1] != ["Conv"] or node.input[0] in graph.named("skip/Conv").output, "no pair between a convolution and its Relu"


def test_concatenated_tensors_have_one_scale_and_pairs_stand_before_pools(tmp_path: Path) -> None:
    inputs = {"image": noise(16, 3, 16, 16)}
    graph = Graph(placed(exported("unet", 16), inputs, tmp_path / "int8"))
    for node in graph.of("Concat"):
        (after,) = [other for other in graph.of("QuantizeLinear") if other.input[0] == node.output[0]]
        scales = {graph.scale(name) for name in node.input} | {float(graph.arrays[after.input[1]])}
        assert len(scales) == 1
    pools = graph.of("MaxPool")
    assert [graph.chain(node.input[0], 2) for node in pools] == [["DequantizeLinear", "QuantizeLinear"]] * 2
    for node in graph.of("Conv"):
        if graph.makers[node.input[0]].op_type == "MaxPool":
            assert graph.makers[node.input[0]] in pools
    assert not [node for node in graph.of("QuantizeLinear") if node.input[0] in {name for pool in pools for name in pool.output}]
    assert len({float(graph.arrays[node.input[1]]) for node in graph.of("QuantizeLinear")}) > 3


def test_float_ops_read_and_give_float_and_are_told(tmp_path: Path) -> None:
    made = placed(exported("residual"), IMAGE, tmp_path / "int8", ("a2/Conv",))
    told = made.record.metadata
    assert (told["weighted_ops"], told["quantized_ops"], told["float_weighted_ops"]) == ("7", "6", "a2/Conv")
    graph = Graph(made)
    node = graph.named("a2/Conv")
    assert graph.makers[node.input[0]].op_type == "Relu"
    assert graph.arrays[node.input[1]].dtype == np.float32
    assert all(graph.makers[name].op_type == "DequantizeLinear" for name in graph.of("Add")[0].input)


def test_an_add_that_no_convolution_joins_stays_float_unless_int8_reads_it(tmp_path: Path) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(5)
            self.one, self.two, self.three = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            inner = torch.relu(self.one(image)) + torch.relu(self.two(image))
            return torch.relu(self.three(inner)) + torch.relu(inner)

    graph = Graph(placed(export(Sum(), IMAGE, tmp_path / "float"), IMAGE, tmp_path / "int8"))
    inner, last = graph.of("Add")
    assert [graph.makers[name].op_type for name in inner.input] == ["DequantizeLinear"] * 2
    assert [graph.makers[name].op_type for name in last.input] == ["Relu"] * 2


def test_broken_placements_are_refused_by_name(tmp_path: Path) -> None:
    from edgekd.converters._placement import PLACEMENTS, check_placement  # type: ignore[import-not-found]

    inputs = {"image": noise(4, 3, 16, 16)}
    made = placed(exported("unet", 16), inputs, tmp_path / "int8")

    def zero_point(graph: Graph) -> None:
        name = graph.of("QuantizeLinear")[1].input[2]
        item = next(item for item in graph.proto.graph.initializer if item.name == name)
        item.CopyFrom(numpy_helper.from_array(np.array(3, np.int8), name))

    def lone(graph: Graph) -> None:
        node = graph.of("QuantizeLinear")[0]
        after = next(other for other in graph.of("DequantizeLinear") if other.input[0] == node.output[0])
        after.input[0] = next(name for name, array in graph.arrays.items() if array.dtype == np.int8 and array.ndim == 4)

    def scale(graph: Graph) -> None:
        node = graph.of("Concat")[0]
        after = graph.makers[node.input[0]]
        graph.proto.graph.initializer.append(numpy_helper.from_array(np.array(0.5, np.float32), "other_scale"))
        after.input[1] = graph.makers[after.input[0]].input[1] = "other_scale"

    def output(graph: Graph) -> None:
        graph.proto.graph.output[0].name = graph.of("DequantizeLinear")[0].output[0]

    def bias(graph: Graph) -> None:
        graph.of("Conv")[0].input[2] = graph.of("Conv")[1].input[1]

    for plant, word in ((zero_point, "zero point"), (lone, "alone"), (scale, "different scales"), (output, "output of the network"), (bias, "bias")):
        graph = Graph(made)
        check_placement(graph.proto, PLACEMENTS[SCHEME])
        plant(graph)
        with pytest.raises(ConversionRejected, match=word) as raised:
            check_placement(graph.proto, PLACEMENTS[SCHEME])
        assert raised.value.subject


def test_weights_per_tensor_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="per channel"):
        load("converters", "qdq-from-onnx")().convert(request_for(exported_convnet(), IMAGE, tmp_path, per_channel=False))
