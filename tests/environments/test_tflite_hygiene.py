"""TFLite files kept clean: transpositions within what the network asks for, no batch norm left, outputs cut, processing inside, notes in the last file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import edgekd
from edgekd.conversion.bounds import module_bound
from edgekd.errors import ConversionRejected
from edgekd.models.notes import read_metadata
from edgekd.models.tflite_file import load_model, op_counts, read_graph
from edgekd.parity.compare import tolerance_for
from edgekd.records import InputProcessing, OutputProcessing, Precision, Processing
from tests.contracts.litert_nets import Residual, Transformer, images, native, one_by_one, sequences
from tests.contracts.tiny_models import ConvNet, TwoInputs, UNet, noise

pytestmark = [pytest.mark.torch, pytest.mark.environments]

LIMIT = tolerance_for(Precision.FP32).value


def convert(module: nn.Module, example: dict[str, np.ndarray], out: Path, **more: Any) -> Any:
    return edgekd.convert(module, to="tflite", example=example, out=out, progress=False, **more)


def run(path: Path, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(model_path=str(path), num_threads=1).get_signature_runner()
    parts = [runner(**{name: array[at : at + 1] for name, array in inputs.items()}) for at in range(len(next(iter(inputs.values()))))]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize(("net", "inputs"), [(Residual, images(4)), (Transformer, sequences(4)), (UNet, {"image": noise(3, 3, 8, 8)})])
def test_a_network_stays_within_what_it_asks_for(tmp_path: Path, net: Any, inputs: dict[str, np.ndarray]) -> None:
    made = convert(net(), inputs, tmp_path / "m.tflite")
    bound = module_bound(net(), inputs, native(net(), inputs))
    assert made.transposes <= bound.limit
    assert made.transposes == op_counts(load_model(tmp_path / "m.tflite")).get("TRANSPOSE", 0)
    assert made.layout_ops >= made.transposes


def test_more_transpositions_than_asked_are_refused_with_the_remedy_that_works(tmp_path: Path) -> None:
    inputs, out = {"image": noise(3, 3, 8, 8)}, tmp_path / "m.tflite"
    with pytest.raises(ConversionRejected, match=r"in 2 transpositions.*channel_last.*--max-transposes 2"):
        convert(UNet(), inputs, out, max_transposes=0)
    assert not out.exists()
    made = convert(UNet(), inputs, out, max_transposes=0, options={"tflite-from-torch": {"channel_last": True}})
    assert made.transposes == 0


@pytest.mark.parametrize("net", [Residual, ConvNet])
def test_no_arithmetic_of_a_batch_norm_is_left_behind_a_convolution(tmp_path: Path, net: Any) -> None:
    inputs = images(2) if net is Residual else {"image": noise(2, 3, 8, 8)}
    convert(net(), inputs, tmp_path / "m.tflite")
    graph = read_graph(load_model(tmp_path / "m.tflite"))
    makers = {tensor.index: op for op in graph.ops for tensor in op.outputs}
    for op in graph.ops:
        constants = [tensor for tensor in op.inputs if tensor.constant]
        behind = [makers[tensor.index].kind for tensor in op.inputs if tensor.index in makers]
        assert not (op.kind in ("MUL", "ADD", "SUB", "DIV") and constants and "CONV_2D" in behind), op
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in net().modules()) > 0


def test_outputs_are_cut_and_the_rest_computes_as_before(tmp_path: Path) -> None:
    inputs = {"image": noise(4, 3, 8, 8), "extra": noise(4, 5, seed=1)}
    made = convert(TwoInputs(), inputs, tmp_path / "m.tflite", outputs=("cls.logits",))
    assert [tensor.name for tensor in made.artifact.iospec.outputs] == ["cls.logits"]
    found = run(tmp_path / "m.tflite", **inputs)
    assert list(found) == ["cls.logits"]
    np.testing.assert_allclose(found["cls.logits"], one_by_one(TwoInputs(), inputs)["cls.logits"], atol=1e-5)


@pytest.mark.parametrize("channel_last", [False, True])
def test_processing_inside_on_raw_pixels_equals_the_network_on_normalised_ones(tmp_path: Path, channel_last: bool) -> None:
    raw = np.random.default_rng(0).integers(0, 256, (24, 3, 8, 8)).astype(np.float32)
    mean, std = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
    normal = (raw / 255 - mean[:, None, None]) / std[:, None, None]
    processing = Processing(
        inputs={"image": InputProcessing(where="inside", scale=1 / 255, mean=tuple(map(float, mean)), std=tuple(map(float, std)))},
        outputs=(OutputProcessing(kind="softmax", where="inside"),),
        labels=("a", "b", "c", "d"),
    )
    options = {"tflite-from-torch": {"channel_last": channel_last}}
    made = convert(ConvNet(), {"image": raw[:8]}, tmp_path / "m.tflite", processing=processing, options=options)
    fed = raw.transpose(0, 2, 3, 1).copy() if channel_last else raw
    expected = torch.from_numpy(one_by_one(ConvNet(), {"image": normal})["output"]).softmax(1).numpy()
    assert np.abs(run(tmp_path / "m.tflite", image=fed)["output"] - expected).max() <= LIMIT * expected.max()
    assert made.artifact.iospec.inputs[0].value_range == (0.0, pytest.approx(255.0))
    int8 = convert(ConvNet(), {"image": raw[:8]}, tmp_path / "i.tflite", processing=processing, options=options, precision="int8", calibration={"image": raw})
    assert int8.passed
    told = read_metadata(tmp_path / "i.tflite")
    assert json.loads(told["labels"]) == ["a", "b", "c", "d"]
    assert Processing.from_json(told["processing"]).inputs["image"].where == "inside"
    assert (told["precision"], told["parent"], told["recipe"]) == ("int8", int8.artifact.parent, int8.artifact.recipe)
    assert len(told["source"]) == 64
    assert int8.artifact.metadata["labels"] == told["labels"]
    assert int8.artifact.iospec.inputs[0].value_range == (0.0, pytest.approx(255.0))
