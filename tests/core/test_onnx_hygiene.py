"""ONNX graphs kept clean: batch norms folded and proven, idle nodes removed, outputs cut, layout operators counted, notes in the file."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekd.errors import ConfigError
from edgekd.models.layout import layout_ops
from edgekd.models.notes import annotate, labels_text, read_metadata, shown_notes
from edgekd.models.onnx_artifact import import_onnx
from edgekd.models.onnx_batchnorm import fold_batch_norms
from edgekd.models.onnx_file import load_model, named_ops
from edgekd.models.onnx_trim import keep_outputs, trim
from edgekd.records import IOSpec, TensorSpec

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
_tidy: Any = importlib.import_module("edgekd.converters._onnx_tidy")

node, FLOAT = onnx.helper.make_node, onnx.TensorProto.FLOAT
RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((1, 4, 7, 7)).astype(np.float32)


def norm(channels: int, name: str, *, shift: bool = True) -> dict[str, np.ndarray]:
    """Scale, bias, mean and variance of a batch norm, all away from 1 and 0."""
    random = np.random.default_rng(channels + len(name))
    drift = random.uniform(0.2, 0.8, (2, channels)) if shift else np.zeros((2, channels))
    values = (random.uniform(0.5, 2.0, channels), drift[0], drift[1], random.uniform(0.3, 3.0, channels))
    return {f"{name}_{part}": value.astype(np.float32) for part, value in zip("sbmv", values, strict=True)}


def batch_norm(source: str, made: str, name: str, **attributes: Any) -> Any:
    return node("BatchNormalization", [source, *(f"{name}_{part}" for part in "sbmv")], [made], name=name, **attributes)


def weight(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def model(nodes: Sequence[Any], weights: dict[str, np.ndarray], outputs: Sequence[str] = ("y",), inputs: dict[str, Sequence[int]] | None = None) -> Any:
    graph = onnx.helper.make_graph(
        list(nodes),
        "net",
        [onnx.helper.make_tensor_value_info(name, FLOAT, list(shape)) for name, shape in (inputs or {"x": X.shape}).items()],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    made = onnx.shape_inference.infer_shapes(made, data_prop=True)
    onnx.checker.check_model(made, full_check=True)
    return made


def run(made: Any, **feeds: np.ndarray) -> dict[str, np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip([item.name for item in session.get_outputs()], session.run(None, feeds or {"x": X}), strict=True))


def kinds(made: Any) -> list[str]:
    return [item.op_type for item in made.graph.node]


FLAT = weight(1, 4)
FOLDS: dict[str, tuple[list[Any], dict[str, np.ndarray], dict[str, np.ndarray]]] = {
    "behind a convolution with bias": ([node("Conv", ["x", "w", "c"], ["a"], name="conv", pads=[1] * 4), batch_norm("a", "y", "bn")],
                                       {"w": weight(6, 4, 3, 3), "c": weight(6), **norm(6, "bn")}, {}),
    "behind a grouped convolution without bias": ([node("Conv", ["x", "w"], ["a"], name="conv", group=2), batch_norm("a", "y", "bn")],
                                                  {"w": weight(6, 2, 3, 3), **norm(6, "bn")}, {}),
    "behind a grouped transposed convolution": ([node("ConvTranspose", ["x", "w", "c"], ["a"], name="up", group=2, strides=[2, 2]),
                                                 batch_norm("a", "y", "bn")],
                                                {"w": weight(4, 3, 2, 2), "c": weight(6), **norm(6, "bn")}, {}),
    "behind a gemm with factors": ([node("Gemm", ["x", "w", "c"], ["a"], name="fc", alpha=0.5, beta=2.0, transB=1), batch_norm("a", "y", "bn")],
                                   {"w": weight(5, 4), "c": weight(5), **norm(5, "bn")}, {"x": FLAT}),
    "in front of a grouped convolution that does not pad": ([batch_norm("x", "a", "bn"), node("Conv", ["a", "w"], ["y"], name="conv", group=2)],
                                                            {"w": weight(6, 2, 3, 3), **norm(4, "bn")}, {}),
    "in front of a padding convolution without a shift": ([batch_norm("x", "a", "bn"), node("Conv", ["a", "w", "c"], ["y"], name="conv", pads=[1] * 4)],
                                                          {"w": weight(6, 4, 3, 3), "c": weight(6), **norm(4, "bn", shift=False)}, {}),
    "in front of a gemm": ([batch_norm("x", "a", "bn"), node("Gemm", ["a", "w", "c"], ["y"], name="fc", alpha=0.5)],
                           {"w": weight(4, 5), "c": weight(5), **norm(4, "bn")}, {"x": FLAT}),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDS)
def test_a_batch_norm_is_folded_and_the_outputs_stay(case: str) -> None:
    nodes, weights, feeds = FOLDS[case]
    made = model(nodes, weights, inputs={name: value.shape for name, value in feeds.items()} or None)
    before = run(made, **feeds)["y"]
    found = fold_batch_norms(made)
    assert (found.done, found.left) == (("bn",), ())
    assert len(kinds(made)) == 1
    trim(made)
    onnx.checker.check_model(made, full_check=True)
    assert len(made.graph.initializer) == 2
    np.testing.assert_allclose(run(made, **feeds)["y"], before, rtol=0, atol=2e-6 * np.abs(before).max())


def test_weights_that_others_read_are_copied_before_they_are_changed() -> None:
    nodes = [node("Conv", ["x", "w"], ["a"], name="one"), batch_norm("a", "y", "bn"), node("Conv", ["x", "w"], ["z"], name="two")]
    made = model(nodes, {"w": weight(6, 4, 3, 3), **norm(6, "bn")}, outputs=("y", "z"))
    before = run(made)
    assert fold_batch_norms(made).done == ("bn",)
    after = run(made)
    np.testing.assert_array_equal(after["z"], before["z"])
    np.testing.assert_allclose(after["y"], before["y"], rtol=0, atol=2e-5)


LEFT: dict[str, tuple[list[Any], dict[str, np.ndarray], tuple[str, ...], str]] = {
    "read elsewhere": ([node("Conv", ["x", "w"], ["a"], name="conv"), batch_norm("a", "b", "bn"), node("Add", ["a", "b"], ["y"])],
                       {"w": weight(6, 4, 3, 3), **norm(6, "bn")}, ("y",), "'conv' before it is read elsewhere"),
    "an output": ([node("Conv", ["x", "w"], ["a"], name="conv"), batch_norm("a", "y", "bn")],
                  {"w": weight(6, 4, 3, 3), **norm(6, "bn")}, ("y", "a"), "elsewhere"),
    "padding behind": ([batch_norm("x", "a", "bn"), node("Conv", ["a", "w"], ["y"], name="conv", pads=[1] * 4)],
                       {"w": weight(6, 4, 3, 3), **norm(4, "bn")}, ("y",), "pads with zeros"),
    "behind an activation": ([node("Relu", ["x"], ["a"]), batch_norm("a", "b", "bn"), node("Relu", ["b"], ["y"])],
                             norm(4, "bn"), ("y",), "behind Relu; and in front of Relu"),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
def test_a_batch_norm_that_cannot_be_folded_is_named_with_its_reason(case: str) -> None:
    nodes, weights, outputs, reason = LEFT[case]
    made = model(nodes, weights, outputs)
    before = made.SerializeToString()
    found = fold_batch_norms(made)
    assert found.done == ()
    assert [name for name, _ in found.left] == ["bn"]
    assert reason in found.left[0][1]
    assert made.SerializeToString() == before


def test_a_batch_norm_in_training_mode_or_with_computed_statistics_stays() -> None:
    nodes = [
        node("Conv", ["x", "w"], ["a"], name="conv"),
        node("BatchNormalization", ["a", *(f"bn_{part}" for part in "sbmv")], ["y", "m", "v"], name="bn", training_mode=1),
    ]
    assert "training" in fold_batch_norms(model(nodes, {"w": weight(6, 4, 3, 3), **norm(6, "bn")})).left[0][1]
    values = {"w": weight(6, 4, 3, 3), **norm(6, "bn")}
    values["raw"] = values.pop("bn_m")
    nodes = [node("Abs", ["raw"], ["bn_m"]), node("Conv", ["x", "w"], ["a"], name="conv"), batch_norm("a", "y", "bn")]
    assert "no constants" in fold_batch_norms(model(nodes, values)).left[0][1]


def test_folds_are_proven_on_the_example_and_one_that_is_wrong_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        node("Conv", ["x", "w"], ["a"], name="conv"), batch_norm("a", "b", "bn"), node("Relu", ["b"], ["c"]),
        node("Conv", ["c", "u"], ["d"], name="other"), batch_norm("d", "y", "bad"),
    ]  # fmt: skip
    weights = {"w": weight(6, 4, 3, 3), "u": weight(5, 6, 1, 1), **norm(6, "bn"), **norm(5, "bad")}
    spec = IOSpec(inputs=(TensorSpec(name="x", dtype="float32", shape=X.shape),), outputs=(TensorSpec(name="y", dtype="float32", shape=(1, 5, 5, 5)),))
    made, told = _tidy.tidy(model(nodes, weights), spec, {"x": X})
    assert kinds(made) == ["Conv", "Relu", "Conv"]
    assert (told["batch_norms_folded"], told["batch_normalizations"]) == ("2", "0")
    assert "is allowed" in told["batch_norm_error"]
    nodes[3] = node("Conv", ["c", "u", "far"], ["d"], name="other")
    weights["far"] = weights["bad_m"] = np.full(5, 1e6, np.float32)  # rounding at a million is lost in front of the norm, and not in a folded bias
    made, told = _tidy.tidy(model(nodes, weights), spec, {"x": X})
    assert kinds(made) == ["Conv", "Relu", "Conv", "BatchNormalization"]
    assert told["batch_norms_folded"] == "1"
    assert [name for name, _ in json.loads(told["batch_norms_left"])] == ["bad"]


def test_no_fold_is_made_in_a_model_that_does_not_run_and_the_reason_is_told() -> None:
    nodes = [node("Relu", ["x"], ["r"]), batch_norm("r", "s", "first"), node("Conv", ["s", "w"], ["a"], name="conv", pads=[1] * 4), batch_norm("a", "b", "bn")]
    made = model(nodes, {"w": weight(6, 4, 3, 3), **norm(4, "first"), **norm(6, "bn")}, outputs=("b",))
    made.graph.node.append(node("Glow", ["b"], ["y"], name="glow", domain="example.glow"))  # only its author's runtime has it
    made.opset_import.append(onnx.helper.make_opsetid("example.glow", 1))
    made.graph.output[0].name = "y"
    spec = IOSpec(inputs=(TensorSpec(name="x", dtype="float32", shape=X.shape),), outputs=(TensorSpec(name="y", dtype="float32", shape=(1, 6, 7, 7)),))
    found, told = _tidy.tidy(made, spec, {"x": X})
    assert kinds(found) == ["Relu", "BatchNormalization", "Conv", "BatchNormalization", "Glow"]
    assert (told["batch_norms_folded"], told["batch_normalizations"]) == ("0", "2")
    left = dict(json.loads(told["batch_norms_left"]))
    assert sorted(left) == ["bn", "first"]
    assert "stands behind Relu" in left["first"]
    assert "onnxruntime does not run the model" in left["bn"]
    assert "Glow" in left["bn"]


def test_a_fold_whose_weights_overflow_is_left() -> None:
    weights = {"w": weight(6, 4, 3, 3) * np.float32(1e20), **norm(6, "bn"), "bn_s": np.full(6, 1e30, np.float32)}
    made = model([node("Conv", ["x", "w"], ["a"], name="conv"), batch_norm("a", "y", "bn")], weights)
    assert "beyond" in fold_batch_norms(made).left[0][1]
    assert kinds(made) == ["Conv", "BatchNormalization"]


def test_idle_nodes_dead_nodes_and_weights_are_removed_and_counted() -> None:
    nodes = [
        node("Identity", ["x"], ["a"]), node("Relu", ["a"], ["b"]), node("Transpose", ["b"], ["c"], perm=[0, 1, 2, 3]), node("Dropout", ["c"], ["d"]),
        node("Sigmoid", ["b"], ["dead"]), node("Neg", ["d"], ["e"]), node("Identity", ["e"], ["y"]), node("Transpose", ["b"], ["z"], perm=[0, 2, 3, 1]),
        node("Identity", ["x"], ["passed"]),
    ]  # fmt: skip
    made = model(nodes, {"unused": weight(3)}, outputs=("y", "z", "passed"))
    before = run(made)
    found = trim(made)
    assert (found.idle_nodes, found.dead_nodes, found.weights) == (4, 1, 1)
    assert kinds(made) == ["Relu", "Neg", "Transpose", "Identity"]
    onnx.checker.check_model(made, full_check=True)
    for name, value in run(made).items():
        np.testing.assert_array_equal(value, before[name])
    assert layout_ops(named_ops(made)).metadata() == {"layout_ops": "1", "transposes": "1"}


def two_outputs() -> Any:
    nodes = [node("Relu", ["x"], ["a"]), node("Neg", ["a"], ["logits"]), node("Mul", ["e", "u"], ["boxes"], name="mul")]
    return model(nodes, {"u": weight(4)}, outputs=("logits", "boxes"), inputs={"x": X.shape, "e": (1, 4)})


def test_outputs_are_cut_with_what_only_fed_them() -> None:
    nodes = [node("Relu", ["x"], ["a"]), node("Neg", ["a"], ["logits"]), node("Conv", ["a", "u"], ["boxes"], name="conv")]
    made = model(nodes, {"u": weight(2, 4, 1, 1)}, outputs=("boxes", "logits"))
    before = run(made)["logits"]
    found = keep_outputs(made, ("logits",))
    assert (found.dead_nodes, found.weights) == (1, 1)
    assert [item.name for item in made.graph.output] == ["logits"]
    onnx.checker.check_model(made, full_check=True)
    np.testing.assert_array_equal(run(made)["logits"], before)


def test_a_cut_that_leaves_an_input_unread_or_names_no_output_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"reads the input 'e'.*take the input out"):
        keep_outputs(two_outputs(), ("logits",))
    with pytest.raises(ConfigError, match=r"'logit'.*logits \(did you mean this\?\)"):
        keep_outputs(two_outputs(), ("logit",))
    with pytest.raises(ConfigError, match="logits, boxes"):
        keep_outputs(two_outputs(), ())


def test_notes_stand_in_the_file_and_survive_an_import(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    made = model([node("Relu", ["x"], ["y"])], {})
    made.metadata_props.append(onnx.StringStringEntryProto(key="author", value="somebody"))
    onnx.save(made, str(path))
    like = IOSpec(
        inputs=(TensorSpec(name="x", dtype="float32", shape=X.shape, layout="NCHW", value_range=(0.0, 1.0), normalization="imagenet"),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=X.shape),),
    )
    first = import_onnx(path, tmp_path / "in", like=like)
    noted = annotate(first, tmp_path / "noted", {"labels": labels_text(("cat", "dog"))})
    again = annotate(first, tmp_path / "again", {"labels": labels_text(("cat", "dog"))})
    assert noted.record.files == again.record.files
    assert noted.record.parent == first.record.content_hash()
    told = read_metadata(noted.entry)
    assert json.loads(told["labels"]) == ["cat", "dog"]
    assert json.loads(told["normalization"]) == {"x": "imagenet"}
    assert told["parent"] == noted.record.parent
    assert {item.key: item.value for item in load_model(noted.entry).metadata_props}["author"] == "somebody"
    back = import_onnx(noted.entry, tmp_path / "back")
    assert back.record.iospec.inputs == first.record.iospec.inputs
    assert json.loads(back.record.metadata["labels"]) == ["cat", "dog"]
    assert json.loads(read_metadata(back.entry)["labels"]) == ["cat", "dog"]
    assert shown_notes(back.entry)["labels"] == "cat, dog"
    assert shown_notes(back.entry)["layouts"] == "x NCHW"
