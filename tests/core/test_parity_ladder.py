"""Faults planted at each hop of a real road (torch, ONNX, int8, device) are named at that hop, and inside it at their tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgekd.artifact import StoredArtifact
from edgekd.contracts import ConvertRequest
from edgekd.errors import ModelError
from edgekd.parity.bisection import bisect
from edgekd.parity.compare import compare_hop, first_bad_hop
from edgekd.quantize import make_recipe
from edgekd.quantize.calibrate import calibration_set
from edgekd.records import HopParity, Precision
from edgekd.registry import load
from tests.contracts.tiny_models import ConvNet, TwoInputs, changed, exact_infer, export, exported_convnet, noise, ort_infer, prepare, torch_outputs

pytestmark = pytest.mark.torch

INPUTS = {"image": noise(16, 3, 8, 8, seed=3)}


def to_int8(source: StoredArtifact, folder: Path, inputs: Mapping[str, np.ndarray] = INPUTS) -> StoredArtifact:
    folder.mkdir(parents=True)
    calibration = calibration_set(inputs, split="train")
    recipe = make_recipe("u8s8", "minmax", calibration)
    request = ConvertRequest(source=source, folder=folder, iospec=source.record.iospec, example=inputs, recipe=recipe, calibration=calibration)
    return load("converters", "qdq-from-onnx")().convert(request)  # type: ignore[no-any-return]


def ladder(
    exported: StoredArtifact,
    int8: StoredArtifact,
    device: Callable[[StoredArtifact, Mapping[str, np.ndarray]], dict[str, np.ndarray]] = ort_infer,
) -> list[HopParity]:
    depth = 8
    module = torch_outputs(ConvNet(), INPUTS)
    floats, quantized = ort_infer(exported, INPUTS), ort_infer(int8, INPUTS)
    return [
        compare_hop("torch -> onnx", module, floats, precision=Precision.FP32, depth=depth),
        compare_hop("onnx -> int8", floats, quantized, precision=Precision.INT8, depth=depth),
        compare_hop("int8 -> device", quantized, device(int8, INPUTS), precision=Precision.INT8, depth=depth, same_file=True),
    ]


def nudge_weight(name: str) -> Callable[[Any], None]:
    def edit(proto: Any) -> None:
        (item,) = [item for item in proto.graph.initializer if item.name == name]
        array = onnx.numpy_helper.to_array(item).copy()
        array.reshape(-1)[0] += 0.05
        item.CopyFrom(onnx.numpy_helper.from_array(array, name))

    return edit


def break_scale(tensor: str) -> Callable[[Any], None]:
    def edit(proto: Any) -> None:
        (item,) = [item for item in proto.graph.initializer if item.name == f"{tensor}_scale"]
        item.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(item) * np.float32(0.1), item.name))

    return edit


@pytest.fixture(scope="module")
def int8_of_convnet(tmp_path_factory: pytest.TempPathFactory) -> StoredArtifact:
    return to_int8(exported_convnet(), tmp_path_factory.mktemp("ladder") / "int8")


def test_every_hop_passes_when_nothing_is_wrong(int8_of_convnet: StoredArtifact) -> None:
    hops = ladder(exported_convnet(), int8_of_convnet)
    assert first_bad_hop(hops) is None, hops


def test_a_changed_weight_is_named_at_the_hop_from_torch_to_onnx(tmp_path: Path) -> None:
    broken = changed(exported_convnet(), tmp_path / "broken", nudge_weight("model.conv2.weight"))
    bad = first_bad_hop(ladder(broken, to_int8(broken, tmp_path / "int8")))
    assert bad is not None
    assert bad.hop == "torch -> onnx"


def test_a_broken_scale_is_named_at_the_hop_from_onnx_to_int8(tmp_path: Path, int8_of_convnet: StoredArtifact) -> None:
    broken = changed(int8_of_convnet, tmp_path / "broken", break_scale("relu_1"))
    bad = first_bad_hop(ladder(exported_convnet(), broken))
    assert bad is not None
    assert bad.hop == "onnx -> int8"
    assert bad.first_bad == "output"


def _flip(outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value[:, ::-1] for name, value in outputs.items()}


def _poison(outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.where(np.arange(len(value))[:, None] == 5, np.nan, value) for name, value in outputs.items()}


def _freeze(outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.repeat(value[:1], len(value), axis=0) for name, value in outputs.items()}


@pytest.mark.parametrize(("alter", "reason"), [(_flip, "signal to error"), (_poison, "NaN"), (_freeze, "same for every sample")])
def test_an_answer_altered_on_the_wire_is_named_at_the_hop_to_the_device(
    alter: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], reason: str, int8_of_convnet: StoredArtifact
) -> None:
    bad = first_bad_hop(ladder(exported_convnet(), int8_of_convnet, lambda model, inputs: alter(ort_infer(model, inputs))))
    assert bad is not None
    assert bad.hop == "int8 -> device"
    assert reason in bad.tensors[0].reason


def test_swapped_outputs_of_a_device_are_named(tmp_path: Path) -> None:
    inputs = {"image": noise(8, 3, 8, 8), "extra": noise(8, 5, seed=1)}
    model = export(TwoInputs(), inputs, tmp_path)
    expected = ort_infer(model, inputs)
    names = list(expected)
    swapped = dict(expected) | {names[0]: expected[names[1]], names[1]: expected[names[0]]}
    found = compare_hop("onnx -> device", expected, swapped, precision=Precision.FP32)
    assert found.first_bad == names[0]
    assert "shape" in found.tensors[0].reason or "swapped" in found.tensors[0].reason


def test_bisect_names_the_tensor_of_a_changed_weight(tmp_path: Path) -> None:
    broken = changed(exported_convnet(), tmp_path / "broken", nudge_weight("model.conv2.weight"))
    found = bisect(exported_convnet(), broken, ort_infer, INPUTS)
    assert found is not None
    assert found.op_name == "conv2/Conv"
    assert found.op_type == "Conv"
    assert bisect(exported_convnet(), exported_convnet(), ort_infer, INPUTS) is None


def test_bisect_names_the_operator_behind_a_broken_scale(tmp_path: Path, int8_of_convnet: StoredArtifact) -> None:
    prepared = prepare(exported_convnet(), INPUTS, tmp_path / "prepared")
    assert bisect(prepared, int8_of_convnet, exact_infer, INPUTS) is None
    broken = changed(int8_of_convnet, tmp_path / "broken", break_scale("relu_1"))
    found = bisect(prepared, broken, exact_infer, INPUTS)
    assert found is not None
    assert found.tensor == "relu_1"
    assert found.op_type == "Relu"
    assert not found.parity.passed


def test_bisect_names_the_tensor_that_only_a_device_computes_otherwise() -> None:
    source = exported_convnet()

    def device(model: StoredArtifact, inputs: Mapping[str, np.ndarray], taps: Sequence[str] = ()) -> dict[str, np.ndarray]:
        outputs = ort_infer(model, inputs, taps)
        return {name: value * np.float32(0.5) if name in ("relu_2", "mean", "output") else value for name, value in outputs.items()}

    found = bisect(source, source, ort_infer, INPUTS, other_infer=device)
    assert found is not None
    assert found.tensor == "relu_2"


def test_bisect_refuses_graphs_without_a_shared_tensor(tmp_path: Path) -> None:
    def rename(proto: Any) -> None:
        for node in proto.graph.node:
            node.input[:] = [f"{name}_" if name and not name.startswith(("model.", "val_")) and name != "image" else name for name in node.input]
            node.output[:] = [f"{name}_" for name in node.output]
        proto.graph.output[0].name += "_"
        del proto.graph.value_info[:]

    other = changed(exported_convnet(), tmp_path / "renamed", rename)
    with pytest.raises(ModelError, match="share no tensor"):
        bisect(exported_convnet(), other, ort_infer, INPUTS)
